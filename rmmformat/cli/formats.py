"""``rmm formats``: what can be read and written."""

from __future__ import annotations

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._render import print_json, print_table
from rmmformat.converters.registry import formats

__all__ = ["command"]


@click.command(cls=Verb, short_help="List importers and exporters.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(as_json: bool) -> None:
    """List every importer and exporter, and how to install what one lacks.

    \b
    Example:
      rmm formats
    """
    rows = formats()
    if as_json:
        print_json([{**vars(row), "available": row.available} for row in rows])
        return
    table = [
        (row.name, "yes" if row.importer else "-", "yes" if row.exporter else "-",
         row.description, "installed" if row.available else row.install)
        for row in rows
    ]  # fmt: skip
    print_table("", ("format", "import", "export", "what", "library"), table)
    refused = [(row.name, "; ".join(row.refuses)) for row in rows if row.refuses]
    print_table("Refused by name", ("format", "what"), refused)
