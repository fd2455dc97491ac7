"""``rmm export``: a task back in a foreign format."""

from __future__ import annotations

from pathlib import Path

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._options import force, names
from rmmformat.cli._render import print_json, print_table
from rmmformat.collection import open_collection
from rmmformat.converters.base import Options
from rmmformat.converters.registry import get_exporter

__all__ = ["command"]


@click.command(cls=Verb, short_help="Give a task back in a foreign format.")
@click.argument("file", type=click.Path())
@click.argument("task")
@click.option(
    "--to",
    "target_format",
    required=True,
    metavar="FORMAT",
    help="Any exporter that `rmm formats` lists.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="File or folder to write.",
)
@click.option("--drop-private", is_flag=True, help="Leave heads and other private tensors out.")
@click.option(
    "--dtype", metavar="NAME", help="f32, f16, bf16, ... of factors (default: the task's)."
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="The base model, for formats that can be written only beside it.",
)
@names
@force
@click.option("--ledger", is_flag=True, help="List what was written, changed and left out.")
@click.option("--json", "as_json", is_flag=True, help="Ledger as JSON.")
def command(
    file: str, task: str, target_format: str, output: Path, drop_private: bool,
    dtype: str | None, base: Path | None, names: dict[str, str], force: bool, ledger: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write TASK of FILE in a format that its ecosystem's own loader reads.

    \b
    Example:
      rmm export skills.rmm imdb --to peft -o imdb/
    """
    exporter = get_exporter(target_format)
    with open_collection(file) as collection:
        lines = exporter.export(
            collection.source(task),
            output,
            force=force,
            options=Options(drop_private=drop_private, base=base, dtype=dtype, names=names),
        )
    if as_json:
        print_json({"task": task, "output": str(output), "ledger": lines})
    elif ledger:
        rows = [(line.item, line.action.value, line.detail) for line in lines]
        print_table("Ledger", ("item", "became", "detail"), rows)
    else:
        click.echo(f"{task} -> {output}")
