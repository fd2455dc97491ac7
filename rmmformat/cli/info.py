"""``rmm info``: what a file holds."""

from __future__ import annotations

from pathlib import Path

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._options import force
from rmmformat.cli._render import note, percent, print_json, print_table, progress_bar, size
from rmmformat.collection import open_collection
from rmmformat.converters.files import atomic_file
from rmmformat.inspect import FileInfo, entry_infos, file_info
from rmmformat.page import collection_page

__all__ = ["command"]


@click.command(cls=Verb, short_help="Show what a file holds.")
@click.argument("file", type=click.Path())
@click.option("--task", metavar="GLOB", help="List the entries of these tasks.")
@click.option("--target", metavar="GLOB", help="List the entries of these targets.")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    help="Write one page with pictures instead; it needs no other file.",
)
@force
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    file: str, task: str | None, target: str | None, page: Path | None, force: bool, as_json: bool
) -> None:
    """Show tasks, targets, encodings, sizes, fidelity and provenance of FILE.

    Reads the index only, whatever the size of the file; --html reads factors, too, and shows errors
    by task and layer, singular spectra, and how alike the tasks are.

    \b
    Example:
      rmm info skills.rmm
      rmm info skills.rmm --task imdb --target '*.query'
      rmm info skills.rmm --html skills.html
    """
    if page is not None and (task, target, as_json) != (None, None, False):
        raise click.UsageError("--html stands alone: it has everything")
    with open_collection(file) as collection:
        if page is not None:
            with progress_bar() as progress:
                text = collection_page(collection, progress)
            with atomic_file(page, force=force) as path:
                path.write_text(text, encoding="utf-8")
            note(f"page: {page}")
            return
        if task is not None or target is not None:
            entries = entry_infos(collection, task, target)
            if as_json:
                print_json(entries)
                return
            rows = [
                (e.task, e.target, str(e.rank), f"{e.n_out} x {e.n_in}", f"{e.scale:g}",
                 "; ".join(f"{what} {text}" for what, text in e.layouts.items()),
                 size(e.n_bytes), percent(e.error))
                for e in entries
            ]  # fmt: skip
            columns = ("task", "target", ">rank", "out x in", ">scale", "rows", ">bytes", ">error")
            print_table(file, columns, rows)
            return
        info = file_info(collection)
    if as_json:
        print_json(info)
    else:
        _show(info)


def _show(info: FileInfo) -> None:
    worst = max(
        (task for task in info.tasks if task.max_error is not None),
        key=lambda task: task.max_error or 0.0,
        default=None,
    )
    parameters = ", ".join(
        f"{key} {value}"
        for key, value in info.method.items()
        if key != "name" and value is not None
    )
    method = info.method.get("name", "")
    lines = [
        ("base model", (info.base_model or "not recorded")
         + (f", weights {info.base_digest[:12]}" if info.base_digest else "")),
        ("tasks, targets", f"{len(info.tasks)}, {len(info.targets)}"),
        ("size", "originals not recorded" if info.fraction is None or not info.original_bytes
         else f"{percent(info.fraction)} of the originals' {size(info.original_bytes)}"),
        ("worst error", "not measured" if worst is None
         else f"{percent(worst.max_error)} (task {worst.name}, {worst.worst_target})"),
        ("factors", f"{size(info.factor_bytes)}: {size(info.shared_bytes)} shared, "
         f"{size(info.factor_bytes - info.shared_bytes)} of single tasks"),
        ("private tensors", size(info.private_bytes)),
        ("file", f"{size(info.file_bytes)}; {percent(info.overhead)} header, index and padding"),
        ("rows", ", ".join(f"{n} {name}" for name, n in info.encodings.items()) or "none"),
        ("method", f"{method} ({parameters})" if parameters else method or "not recorded"),
        ("format", f"{info.version}, written by {info.producer or 'unknown'}"),
    ]  # fmt: skip
    if info.recovered:
        lines.append(("notice", "one header slot is damaged; the other one is used"))
    print_table(info.path, ("", ""), lines)
    rows = [
        [t.name, str(t.n_targets), "/".join(map(str, t.ranks)), size(t.own_bytes),
         "-" if t.original_bytes is None else size(t.original_bytes), str(t.n_privates),
         percent(t.mean_error), percent(t.max_error), percent(t.extraction_error)]
        for t in info.tasks
    ]  # fmt: skip
    columns = ["task", ">targets", ">rank", ">own", ">original", ">private", ">mean error", ">max"]
    if any(task.extraction_error is not None for task in info.tasks):
        columns.append(">extraction left out")
    rows = [row[: len(columns)] for row in rows]
    print_table("", columns, rows)
