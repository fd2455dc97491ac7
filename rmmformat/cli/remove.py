"""``rmm remove``: fewer tasks in a file."""

from __future__ import annotations

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._render import note, print_json, size
from rmmformat.format.lock import DEFAULT_WAIT
from rmmformat.grow import remove

__all__ = ["command"]


@click.command(cls=Verb, short_help="Leave tasks out of a file.")
@click.argument("file", type=click.Path())
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=DEFAULT_WAIT,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for another writer.",
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    file: str, tasks: tuple[str, ...], dry_run: bool, wait: float, as_json: bool
) -> None:  # fmt: skip
    """Leave tasks out of FILE in place; other tasks keep every byte.

    The bytes of a task that is left out stay in the file, unused, until `rmm compact`.

    \b
    Example:
      rmm remove skills.rmm spam yelp
    """
    report = remove(file, tasks, dry_run=dry_run, wait=wait, notice=note)
    if as_json:
        print_json({**vars(report), "dry_run": dry_run})
        return
    click.echo(
        f"{'would remove' if dry_run else 'removed'} {', '.join(report.tasks)}; "
        f"{report.n_tasks} tasks left, {size(report.free_bytes)} unused (see `rmm compact`)"
    )
