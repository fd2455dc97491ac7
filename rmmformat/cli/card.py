"""``rmm card``: a model card for a file."""

from __future__ import annotations

from pathlib import Path

import click

from rmmformat.card import model_card
from rmmformat.cli._exit import Verb
from rmmformat.cli._options import force
from rmmformat.cli._render import note
from rmmformat.collection import open_collection
from rmmformat.converters.files import atomic_file

__all__ = ["command"]


@click.command(cls=Verb, short_help="Write a model card for a file.")
@click.argument("file", type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write it there instead of to the screen.",
)
@click.option(
    "--repo", metavar="OWNER/NAME", help="The repository on the hub that the file will lie in."
)
@click.option("--license", "licence", metavar="WORD", help="The hub's word for it: apache-2.0, ...")
@force
def command(
    file: str, output: Path | None, repo: str | None, licence: str | None, force: bool
) -> None:
    """Write a model card for FILE: base model, sizes and errors of every task, how to use it.

    Markdown behind a YAML head, as the Hugging Face Hub wants it in README.md.

    \b
    Example:
      rmm card skills.rmm -o README.md --repo me/skills --license apache-2.0
    """
    with open_collection(file) as collection:
        text = model_card(collection, repo=repo, licence=licence)
    if output is None:
        click.echo(text, nl=False)
        return
    with atomic_file(output, force=force) as path:
        path.write_text(text, encoding="utf-8")
    note(f"card: {output}")
