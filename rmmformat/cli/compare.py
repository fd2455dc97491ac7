"""``rmm compare``: methods side by side."""

from __future__ import annotations

from pathlib import Path

import click

from rmmformat.base_model import common_base
from rmmformat.cli._exit import Verb
from rmmformat.cli._options import Pool, Reading, reads_sources, workers
from rmmformat.cli._render import note, percent, print_json, print_table, progress_bar, size
from rmmformat.compare import DENSE_LIMIT, Comparison, compare
from rmmformat.contenders import FAMILIES, contenders
from rmmformat.converters.files import atomic_file
from rmmformat.pipeline import open_tasks
from rmmformat.report import check_plots, render_page, show_change
from rmmformat.scores import load_evaluation

__all__ = ["command"]


def _words(_ctx: object, _param: object, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    words = tuple(word.strip() for word in value.split(",") if word.strip())
    unknown = [word for word in words if word not in FAMILIES]
    if unknown or not words:
        raise click.BadParameter(f"{', '.join(unknown) or 'nothing'}; known: {', '.join(FAMILIES)}")
    return words


def _show_methods(ctx: click.Context, _param: object, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        print_table("", ("method", "what it is"), list(FAMILIES.items()))
        ctx.exit()


@click.command(cls=Verb, short_help="Compare methods on your own adapters.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--methods",
    callback=_words,
    metavar="NAME,...",
    help="Only these (--list-methods shows all).  [default: all]",
)
@click.option(
    "--list-methods",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_methods,
    help="List the methods and exit.",
)
@click.option(
    "--size",
    "sizes",
    type=click.FloatRange(0, min_open=True),
    multiple=True,
    metavar="FRACTION",
    help="Sizes for the planner, as parts of the originals; "
    "may be given several times.  [default: 0.25 ... 0.01]",
)
@click.option(
    "--components",
    type=click.IntRange(1),
    multiple=True,
    metavar="P",
    help="For RMM; may be given several times.  [default: 1 ... n - 1]",
)
@click.option(
    "--eval",
    "evaluation",
    metavar="MODULE:FUNCTION",
    help="Score every task: called with its name, its deltas by target and its private "
    "tensors; higher is better: one number, or one for each example, which gives a standard error.",
)
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a page with plots.")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.2,
    show_default=True,
    help="Part of the entries that TIES and DARE keep.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For DARE.")
@click.option(
    "--dense-limit",
    type=click.IntRange(0),
    default=DENSE_LIMIT,
    show_default=True,
    metavar="VALUES",
    help="Skip methods that need more dense values at one target.",
)
@workers
@reads_sources
@click.option("--force", is_flag=True, help="Replace an existing page.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    sources: tuple[str, ...], methods: tuple[str, ...] | None, sizes: tuple[float, ...],
    components: tuple[int, ...], evaluation: str | None, page: Path | None, density: float,
    seed: int, dense_limit: int, pool: Pool, reading: Reading, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run many ways of keeping the same adapters, and show bytes, error, time and score of each.

    SOURCE is what `rmm convert` takes.  Nothing is kept but the page, if one is asked for.  Methods
    that the container holds are measured on a real file.  The first column marks rows that nothing
    as small comes closer than.

    \b
    Example:
      rmm compare adapters/ --methods planned,rmm,ties --html compare.html
    """
    evaluate = None if evaluation is None else load_evaluation(evaluation)
    if page is not None:
        check_plots()
    with progress_bar(quiet=as_json) as progress:
        tasks = open_tasks(sources, reading.kind, reading.options, progress)
    common_base(tasks, reading.options, allow_mismatch=reading.allow_base_mismatch)
    rank = max((info.rank for task in tasks for info in task.targets.values()), default=0)
    chosen = contenders(
        len(tasks),
        rank,
        families=methods,
        components=components or None,
        density=density,
        seed=seed,
        **({"sizes": sizes} if sizes else {}),
    )
    with pool as executor, progress_bar(quiet=as_json) as progress:
        found = compare(
            tasks,
            chosen,
            evaluate=evaluate,
            evaluation=evaluation or "",
            allow_base_mismatch=reading.allow_base_mismatch,
            dense_limit=dense_limit,
            executor=executor,
            progress=progress,
        )
    if page is not None:
        text = render_page(found, sources)
        with atomic_file(page, force=force) as path:
            path.write_text(text, encoding="utf-8")
    if as_json:
        print_json(vars(found))
    else:
        _show(found)
        if page is not None:
            note(f"page: {page}")


def _show(found: Comparison) -> None:
    columns = ["", "method", ">bytes", ">size", ">of stored", ">file", ">mean error", ">median",
               ">max", ">seconds"]  # fmt: skip
    if found.evaluation:
        columns += [">score", ">change"]
    rows = []
    for row in found.rows:
        cells = [
            "*" if row.best else "",
            row.method,
            "-" if row.n_bytes is None else size(row.n_bytes),
            percent(row.fraction),
            percent(row.fraction_stored),
            "-" if row.file_bytes is None else size(row.file_bytes),
            percent(row.mean_error),
            percent(row.median_error),
            percent(row.max_error),
            "-" if row.seconds is None else f"{row.seconds:.2f}",
        ]
        if found.evaluation:
            cells += ["-" if row.score is None else f"{row.score:.4g}", show_change(row) or "-"]
        rows.append(cells)
    print_table(
        f"{len(found.tasks)} tasks, {found.n_targets} targets; size: of {size(found.f32_bytes)} in "
        f"float32, of {size(found.original_bytes)} as stored",
        columns,
        rows,
    )
    for row in found.rows:
        if row.note:
            note(f"{row.method}: {row.note}")
