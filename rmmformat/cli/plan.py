"""``rmm plan``: size against error before anything is written."""

from __future__ import annotations

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._options import Pool, Reading, reads_sources, workers
from rmmformat.cli._render import percent, print_json, print_table, progress_bar, size
from rmmformat.methods import parse_fraction
from rmmformat.plan import ERRORS, SIZES, PlanReport, plan

__all__ = ["command"]


@click.command(cls=Verb, short_help="Foresee size and error of a collection.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--max-error",
    "max_errors",
    multiple=True,
    metavar="E",
    help="Show this setting (0.05 or 5%); may be repeated.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="FRACTION",
    help="Show this setting (0.03 or 3%); may be repeated.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Code everything at each setting and measure, instead of predicting.",
)
@workers
@reads_sources
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    sources: tuple[str, ...], max_errors: tuple[str, ...], sizes: tuple[str, ...], measure: bool,
    pool: Pool, reading: Reading, as_json: bool,
) -> None:  # fmt: skip
    """Show what the SOURCEs would take and lose at different settings; nothing is written.

    Errors are relative Frobenius errors of deltas.  RMM as published (--components) stands beside
    for comparison; its errors, unlike its sizes, are known only with --measure.

    \b
    Example:
      rmm plan adapters/
      rmm plan adapters/ --size 2% --max-error 8% --measure
    """
    errors = [parse_fraction(text, "max-error") for text in max_errors]
    parts = [parse_fraction(text, "size") for text in sizes]
    chosen = bool(errors or parts)
    with pool as executor, progress_bar(quiet=as_json) as progress:
        report = plan(
            sources,
            max_errors=errors if chosen else ERRORS,
            sizes=parts if chosen else SIZES,
            measure=measure,
            kind=reading.kind,
            options=reading.options,
            allow_base_mismatch=reading.allow_base_mismatch,
            executor=executor,
            progress=progress,
        )
    if as_json:
        print_json(report)
    else:
        _show(report)


def _show(report: PlanReport) -> None:
    measured = any(point.measured for point in report.points)
    rows = [
        (point.option, size(point.factor_bytes), percent(point.fraction), size(point.file_bytes),
         percent(point.mean_error), percent(point.median_error), percent(point.max_error),
         "" if point.saves else "no saving here")
        for point in report.points
    ]  # fmt: skip
    columns = ("option", ">factors", ">of originals", ">file", ">mean error", ">median", ">max", "")
    title = f"{len(report.tasks)} tasks, {report.n_targets} targets: " + (
        "measured" if measured else "predicted"
    )
    print_table(title, columns, rows)
    click.echo(
        f"factors {size(report.original_bytes)} in files of {size(report.source_bytes)}; "
        f"{report.n_distinct} of {report.n_deltas} deltas are distinct"
    )
