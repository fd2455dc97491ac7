"""Tables of a run: for a terminal, for a page of Markdown, and as values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

Value = float | int | str | None


@dataclasses.dataclass(frozen=True)
class Column:
    """One measured quantity: its key in a row, its heading, how a number is written."""

    key: str
    title: str
    form: str = ".2f"

    def text(self, value: Value) -> str:
        if value is None:
            return "–"
        return value if isinstance(value, str) else format(value, self.form)


@dataclasses.dataclass
class Table:
    """Contenders down, quantities across.

    Attributes
    ----------
    name
        What marks the table in a page: ``<!-- bench: NAME -->`` to ``<!-- end -->``.
    head
        Heading of the contenders; a name that starts with ``rmm`` is this product's.
    notes
        What was left out, and why.
    """

    name: str
    title: str
    head: str
    columns: Sequence[Column]
    rows: dict[str, dict[str, Value]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def put(self, contender: str, **values: Value) -> None:
        self.rows.setdefault(contender, {}).update(values)

    def compare(self, contender: str, key: str, ratio: str = "ratio") -> None:
        """Say of each row how many times the contender's value its own is."""
        if contender in self.rows:
            reference = self.rows[contender][key]
            for row in self.rows.values():
                value = row.get(key)
                if isinstance(value, (int, float)) and isinstance(reference, (int, float)):
                    row[ratio] = value / reference

    def cells(self) -> list[list[str]]:
        return [
            [name, *(column.text(row.get(column.key)) for column in self.columns)]
            for name, row in self.rows.items()
        ]

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        table.add_column(self.head)
        for column in self.columns:
            table.add_column(column.title, justify="right")
        for cells in self.cells():
            table.add_row(*cells, style="bold" if cells[0].startswith("rmm") else None)
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", style="dim", highlight=False)

    def markdown(self) -> str:
        titles = [self.head, *(column.title for column in self.columns)]
        lines = [titles, ["---", *("---:" for _ in self.columns)], *self.cells()]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join([text, *self.notes])

    def values(self) -> dict[str, Any]:
        return {"title": self.title, "rows": self.rows, "notes": self.notes}


def write_markdown(path: Path, parts: Mapping[str, str]) -> list[str]:
    """Put texts between their marks; without a page, or without marks, write all of them.

    Returns
    -------
    Names that the page has no mark for.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not marks(text):
        text = "\n\n".join(f"<!-- bench: {name} -->\n<!-- end -->" for name in parts) + "\n"
    missing = []
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)  # type: ignore[misc]
        if count == 0:
            missing.append(name)
    path.write_text(text, encoding="utf-8")
    return missing


def marks(text: str) -> list[str]:
    """Names of the parts that a page has a place for."""
    return re.findall(r"<!-- bench: (\S+) -->\n.*?<!-- end -->", text, re.DOTALL)
