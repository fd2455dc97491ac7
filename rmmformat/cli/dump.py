"""``rmm dump``: annotated hex."""

from __future__ import annotations

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._render import print_json
from rmmformat.collection import open_collection
from rmmformat.format.dump import dump_fields
from rmmformat.remote.download import local_file

__all__ = ["command"]

_WIDTH = 16


@click.command(cls=Verb, short_help="Show a file as annotated hex.")
@click.argument("file", type=click.Path())
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Records of each table, and lines of each range of bytes, that are shown.",
)
@click.option("--all", "everything", is_flag=True, help="Show all of them.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, one object a field.")
def command(file: str, limit: int, everything: bool, as_json: bool) -> None:
    """Show FILE field by field: offset, bytes, name, value, and the rule that speaks of it.

    \b
    Example:
      rmm dump skills.rmm --limit 2
    """
    with local_file(file) as path, open_collection(path) as collection:
        fields = dump_fields(collection.index, None if everything else limit)
        if as_json:
            print_json([{**vars(field), "raw": field.raw.hex()} for field in fields])
            return
        where = None
        for field in fields:
            if field.where != where:
                where = field.where
                click.echo(f"-- {where}")
            first = field.raw[:_WIDTH].hex(" ")
            click.echo(
                f"{field.offset:08x}  {first:<{_WIDTH * 3}} {field.name}: {field.value}  "
                f"{field.rule}"
            )
            for start in range(_WIDTH, len(field.raw), _WIDTH):
                raw = field.raw[start : start + _WIDTH].hex(" ")
                click.echo(f"{field.offset + start:08x}  {raw}")
