"""``rmm compact``: a file without what nothing uses."""

from __future__ import annotations

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._render import note, print_json, size
from rmmformat.format.lock import DEFAULT_WAIT
from rmmformat.grow import compact

__all__ = ["command"]


@click.command(cls=Verb, short_help="Give back the space of tasks that were left out.")
@click.argument("file", type=click.Path())
@click.option("--dry-run", is_flag=True, help="Only say what it would gain.")
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=DEFAULT_WAIT,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for another writer.",
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(file: str, dry_run: bool, wait: float, as_json: bool) -> None:
    """Write FILE anew without what nothing uses, and put it in the old one's place at once.

    The result depends on the collection alone, not on how it came about.  Programs that have FILE
    open keep the old one until they open it again.

    \b
    Example:
      rmm compact skills.rmm
    """
    report = compact(file, dry_run=dry_run, wait=wait, notice=note)
    if as_json:
        print_json({**vars(report), "dry_run": dry_run})
        return
    click.echo(
        f"{report.path}: {size(report.bytes_before)} "
        f"{'would become' if dry_run else '->'} {size(report.bytes_after)}"
    )
