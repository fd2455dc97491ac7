"""``rmm bench``: how fast a file loads here."""

from __future__ import annotations

import click

from rmmformat.bench import BenchReport, bench
from rmmformat.cli._exit import Verb
from rmmformat.cli._options import as_json
from rmmformat.cli._render import percent, print_json, print_table, progress_bar, size
from rmmformat.format.layout import FACTOR_DTYPES

__all__ = ["command"]


@click.command(cls=Verb, short_help="Measure how fast a file loads here.")
@click.argument("file", type=click.Path())
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="GLOB",
    help="Load these tasks; may be given again.  [default: up to eight]",
)
@click.option(
    "--dtype",
    type=click.Choice(sorted(FACTOR_DTYPES)),
    default="f32",
    show_default=True,
    help="What factors come as.",
)
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="For one load; 0 chooses by the size of the task.",
)
@as_json
def command(file: str, tasks: tuple[str, ...], dtype: str, threads: int, as_json: bool) -> None:
    """Measure opening FILE and loading tasks of it, against the limits of this machine.

    The limit is a streaming copy, measured in the same run: bytes that a load must read and write,
    over its time, are compared with those of a copy.  Times are medians, with the file in the page
    cache; run it on a machine that has nothing else to do.

    \b
    Example:
      rmm bench skills.rmm
      rmm bench skills.rmm --task 'imdb*' --dtype f16
    """
    with progress_bar(quiet=as_json) as progress:
        report = bench(file, tasks=tasks, dtype=dtype, threads=threads, progress=progress)
    if as_json:
        speeds = [{**vars(t), "rate": t.rate, "ratio": t.ratio} for t in report.tasks]
        copies = {
            name: {**vars(copy), "rate": copy.rate}
            for name, copy in (("copy", report.copy), ("same_size", report.same_size))
        }
        print_json({**vars(report), **copies, "tasks": speeds})
    else:
        _show(report)


def _show(report: BenchReport) -> None:
    rows = [
        (t.name, str(t.n_targets), size(t.read_bytes), size(t.written_bytes), _time(t.first),
         _time(t.switch), _rate(t.rate), _time(t.copy), percent(t.ratio))
        for t in report.tasks
    ]  # fmt: skip
    columns = ("task", ">targets", ">reads", ">writes", ">first load", ">switch", ">rate",
               ">as a copy", ">of copy's rate")  # fmt: skip
    print_table(f"{report.path}: factors as {report.dtype}", columns, rows)
    print_table(
        f"{report.cpus} processors",
        ("copy", ">block", ">threads", ">rate"),
        [
            (what, size(copy.n_bytes), str(copy.threads), _rate(copy.rate))
            for what, copy in (("streaming", report.copy), ("largest task", report.same_size))
        ],
    )
    click.echo(
        f"open {_time(report.open)} ({report.n_tasks} tasks, {size(report.file_bytes)}); a switch "
        f"moves its bytes at {percent(report.ratio)} of the streaming copy's rate (median)"
    )


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.2f} GB/s"
