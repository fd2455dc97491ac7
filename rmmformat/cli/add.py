"""``rmm add``: more tasks for a file."""

from __future__ import annotations

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._options import Pool, Reading, reads_sources, workers
from rmmformat.cli._render import note, percent, print_json, print_table, progress_bar, size
from rmmformat.format.lock import DEFAULT_WAIT
from rmmformat.grow import AddReport, add
from rmmformat.methods import choose_method

__all__ = ["command"]

#: Errors of projected tasks above this are worth a word.
_MUCH = 0.2


@click.command(cls=Verb, short_help="Add tasks to a file.")
@click.argument("file", type=click.Path())
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--replace", is_flag=True, help="Put a task in the place of one of its name.")
@click.option(
    "--max-error",
    metavar="E",
    help="Keep the new tasks' deltas within this relative error (0.05 or 5%).",
)
@click.option(
    "--size",
    "part",
    metavar="FRACTION",
    help="Take at most this part of the new tasks' factor bytes (0.03 or 3%).",
)
@click.option("--exact", is_flag=True, help="Keep the new tasks' factors bit for bit.")
@click.option("--encoding", metavar="NAME", help="Keep all rows of the new tasks in f16, q8, ...")
@workers
@reads_sources
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
    file: str, sources: tuple[str, ...], replace: bool, max_error: str | None, part: str | None,
    exact: bool, encoding: str | None, pool: Pool, reading: Reading, wait: float, as_json: bool,
) -> None:  # fmt: skip
    """Add tasks to FILE in place; tasks that it has keep every byte.

    A SOURCE is what `rmm convert` takes.  The new tasks are kept as FILE says of itself, unless one
    of --max-error, --size, --exact and --encoding is given; in a merged collection (--components)
    that means coefficients on the basis that is there, which was made without them.

    Whatever happens meanwhile, FILE is valid at every instant and has all new tasks or none.

    \b
    Example:
      rmm add skills.rmm new/sms
      rmm add skills.rmm imdb=new/imdb-v2 --replace
    """
    asked = (max_error, part, encoding) != (None,) * 3 or exact
    method = (
        choose_method(max_error=max_error, size=part, exact=exact, encoding=encoding)
        if asked
        else None
    )
    with pool as executor, progress_bar(quiet=as_json) as progress:
        report = add(
            file,
            sources,
            method,
            replace=replace,
            kind=reading.kind,
            options=reading.options,
            allow_base_mismatch=reading.allow_base_mismatch,
            wait=wait,
            notice=note,
            executor=executor,
            progress=progress,
        )
    _show(report, as_json)


def _show(report: AddReport, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    for task in report.tasks:
        for line in task.ledger:
            if line.detail.startswith("notice:"):
                note(f"{task.name}: {line.item}: {line.detail}")
    rows = [
        (t.name, "replaced" if t.name in report.replaced else "new", str(t.n_targets),
         size(t.original_bytes), percent(t.mean_error), percent(t.max_error), t.worst_target)
        for t in report.tasks
    ]  # fmt: skip
    columns = ("task", "", ">targets", ">original", ">mean error", ">max", "worst target")
    print_table(report.path, columns, rows)
    click.echo(
        f"{report.n_tasks} tasks, file {size(report.bytes_before)} -> {size(report.bytes_after)}"
    )
    worst = max((task.mean_error for task in report.tasks), default=0.0)
    if report.projected and worst > _MUCH:
        note(
            f"the basis of this file was made without the new tasks and leaves {percent(worst)} "
            "error; --max-error or --exact keep them on their own, converting all anew shares again"
        )
