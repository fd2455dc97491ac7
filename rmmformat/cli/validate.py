"""``rmm validate``: every rule, every checksum; and the file against its sources."""

from __future__ import annotations

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._options import Reading, reads_sources
from rmmformat.cli._render import note, percent, print_json, print_table, progress_bar
from rmmformat.collection import open_collection
from rmmformat.inspect import compare_with_sources, validate_path
from rmmformat.pipeline import open_sources

__all__ = ["command"]


@click.command(cls=Verb, short_help="Check a file against the specification.")
@click.argument("file", type=click.Path())
@click.option(
    "--against",
    multiple=True,
    metavar="SOURCE",
    help="Also measure each task against its original; may be given again.",
)
@reads_sources
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def command(
    ctx: click.Context, file: str, against: tuple[str, ...], reading: Reading, as_json: bool
) -> None:  # fmt: skip
    """Check every rule of the specification over every byte of FILE.

    Lists all violations with rule and offset.  Exit code 3 if there is one, 4 if the file only
    needs a newer reader, 1 if a task differs from its source by more than the file says.

    \b
    Example:
      rmm validate skills.rmm
      rmm validate skills.rmm --against adapters/
    """
    with progress_bar(quiet=as_json) as progress:
        report = validate_path(file, lambda done, total: progress("bytes", done, total))
    comparisons = []
    if report.ok and against:
        with open_collection(file) as collection, progress_bar(quiet=as_json) as progress:
            comparisons = compare_with_sources(
                collection,
                open_sources(against, kind=reading.kind, options=reading.options),
                lambda done, total: progress("tasks", done, total),
            )
    if as_json:
        print_json(
            {
                "file": file,
                "ok": report.ok,
                "violations": [
                    {"rule": v.id, "offset": v.offset, "message": v.message}
                    for v in report.violations
                ],
                "notices": report.notices,
                "against": comparisons,
            }
        )
    else:
        for violation in report.violations:
            click.echo(f"{violation.id} offset {violation.offset:#x}: {violation.message}")
        for text in report.notices:
            note(f"notice: {text}")
        n = len(report.violations)
        click.echo(f"{file}: " + ("valid" if report.ok else f"{n} violation{'s' * (n != 1)}"))
        if comparisons:
            rows = [
                (c.task, str(len(c.errors)), percent(c.mean_error), percent(c.max_error),
                 "; ".join(c.problems) or "as recorded")
                for c in comparisons
            ]  # fmt: skip
            columns = ("task", ">targets", ">mean error", ">max", "verdict")
            print_table("Against the sources", columns, rows)
    if not report.ok:
        ctx.exit(4 if report.unsupported else 3)
    if any(comparison.problems for comparison in comparisons):
        ctx.exit(1)
