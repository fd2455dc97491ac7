"""``rmm convert``: adapters to one file."""

from __future__ import annotations

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._options import Pool, Reading, reads_sources, workers
from rmmformat.cli._render import note, percent, print_json, print_table, progress_bar, size
from rmmformat.methods import DEFAULT_MAX_ERROR, choose_method
from rmmformat.pipeline import ConvertReport, convert

__all__ = ["command"]


def _grouping(_ctx: object, _param: object, value: str | None) -> str | int | None:
    if value is None or value in ("position", "factor", "row"):
        return value
    if value.isdigit() and int(value) > 0:
        return int(value)
    raise click.BadParameter("position, factor, row, or a number of positions")


@click.command(cls=Verb, short_help="Turn adapters into one file.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("-o", "--output", required=True, type=click.Path(), help="File to write.")
@click.option(
    "--max-error",
    metavar="E",
    help="Keep every delta within this relative error (0.05 or 5%), in as few bytes as "
    "can be.  [default: 5%]",
)
@click.option(
    "--size",
    "part",
    metavar="FRACTION",
    help="Take at most this part of the originals' factor bytes (0.03 or 3%), with "
    "errors as small as can be.",
)
@click.option("--exact", is_flag=True, help="Keep every factor bit for bit.")
@click.option(
    "--components",
    type=click.IntRange(0),
    metavar="P",
    help="RMM as published: P shared directions and P coefficients a position.",
)
@click.option(
    "--encoding",
    metavar="NAME",
    help="f32, f16, bf16, q8, q4, ... of all rows (default: as the originals); "
    "without --components: each task on its own.",
)
@click.option(
    "--grouping",
    callback=_grouping,
    metavar="position|factor|row|M",
    help="With --components: what shares a coefficient.  [default: position]",
)
@click.option(
    "--align",
    type=click.Choice(["none", "svd", "procrustes"]),
    help="Re-express factors before merging.  [default: none]",
)
@workers
@reads_sources
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--ledger", is_flag=True, help="List what became of every tensor, field and file.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    sources: tuple[str, ...], output: str, max_error: str | None, part: str | None,
    exact: bool, components: int | None, encoding: str | None, grouping: str | int | None,
    align: str | None, pool: Pool, reading: Reading, force: bool, ledger: bool, as_json: bool,
) -> None:  # fmt: skip
    """Turn adapters into one .rmm file.

    A SOURCE is an adapter folder, a folder of adapter folders, or NAME=SOURCE to choose the task's
    name.  One dial says how small or how faithful: --max-error, --size or --exact; --components and
    --encoding are methods of their own.  The last lines give the size against the originals and the
    measured error of every task.

    \b
    Example:
      rmm convert adapters/ -o skills.rmm --size 3%
    """
    method = choose_method(
        max_error=max_error,
        size=part,
        components=components,
        exact=exact,
        grouping=grouping,  # type: ignore[arg-type]  # the callback has narrowed it
        align=align,  # type: ignore[arg-type]
        encoding=encoding,
    )
    if (max_error, part, components, encoding) == (None,) * 4 and not exact:
        note(
            f"keeping every delta within {percent(DEFAULT_MAX_ERROR)}; choose with --max-error E, "
            "--size FRACTION or --exact"
        )
    with pool as executor, progress_bar(quiet=as_json) as progress:
        report = convert(
            sources,
            output,
            method,
            kind=reading.kind,
            options=reading.options,
            overwrite=force,
            allow_base_mismatch=reading.allow_base_mismatch,
            executor=executor,
            progress=progress,
        )
    _show(report, ledger, as_json)


def _show(report: ConvertReport, ledger: bool, as_json: bool) -> None:
    if as_json:
        print_json({**vars(report), "fraction": report.fraction})
        return
    for task in report.tasks:
        for line in task.ledger:
            if line.detail.startswith("notice:"):
                note(f"{task.name}: {line.item}: {line.detail}")
    if ledger:
        lines = [
            (task.name, line.item, line.action.value, line.detail)
            for task in report.tasks
            for line in task.ledger
        ]
        print_table("Ledger", ("task", "item", "became", "detail"), lines)
    rows = [
        (t.name, str(t.n_targets), size(t.original_bytes), percent(t.mean_error),
         percent(t.median_error), percent(t.max_error), t.worst_target)
        for t in report.tasks
    ]  # fmt: skip
    columns = ("task", ">targets", ">original", ">mean error", ">median", ">max", "worst target")
    print_table(report.path, columns, rows)
    extracted = [t for t in report.tasks if t.extraction_error is not None]
    if extracted:
        left_out = [(t.name, percent(t.extraction_error or 0.0)) for t in extracted]
        note("errors above are against the factors; extracting them had left, of what changed:")
        print_table("", ("task", ">left out by extraction"), left_out)
    click.echo(
        f"error of all deltas: mean {percent(report.mean_error)}, median "
        f"{percent(report.median_error)}, max {percent(report.max_error)}"
    )
    click.echo(
        f"factors {size(report.factor_bytes)} of {size(report.original_bytes)} "
        f"({percent(report.fraction)}), private tensors {size(report.private_bytes)}, "
        f"file {size(report.file_bytes)}"
    )
