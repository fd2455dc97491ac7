"""How the command line shows things: tables, progress, sizes.  The only user of rich."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rmmformat.text import percent, printable, size

__all__ = ["note", "percent", "print_json", "print_table", "progress_bar", "size"]

#: Progress is shown for work that takes longer than this (seconds).
_PATIENCE = 1.0


def print_json(value: Any) -> None:
    """Write a value (dataclasses included) to standard output as JSON."""

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        if hasattr(item, "value"):
            return item.value
        raise TypeError(f"{type(item).__name__} has no JSON form")

    click.echo(json.dumps(value, default=plain, indent=2, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to standard output; columns that start with ">" are set to the right."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", show_header=any(columns)
    )
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # what reads a pipe wants whole lines
    console.print(table)


def _plain(cell: str) -> str:
    # Names are data: square brackets in them must not become markup, nor escapes reach a terminal.
    return printable(cell).replace("[", r"\[")


def note(text: str) -> None:
    """Write a remark to standard error."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, shown only once the work has taken a second."""
    import time

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _what, _done, _total: None
        return
    start = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    known: dict[str, Any] = {}
    started = False

    def update(what: str, done: int, total: int) -> None:
        nonlocal started
        if not started and time.monotonic() - start > _PATIENCE:
            bar.start()
            started = True
        if what not in known:
            known[what] = bar.add_task(what, total=total)
        bar.update(known[what], completed=done, total=total)

    try:
        yield update
    finally:
        if started:
            bar.stop()
