"""``rmm onnx``: base models of ONNX Runtime that take tasks, or have one merged in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from rmmformat.cli._exit import Verb
from rmmformat.cli._options import as_json, force, names
from rmmformat.cli._render import note, print_json, print_table
from rmmformat.collection import open_collection

__all__ = ["command"]

_output = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Model to write."
)
_allow_unmatched = click.option(
    "--allow-unmatched", is_flag=True, help="Leave out targets that the model has no place for."
)
_base = click.argument("base", type=click.Path(path_type=Path))


@click.group(short_help="Prepare ONNX models for tasks, or merge one in.")
def command() -> None:
    """Prepare ONNX models for the tasks of a collection, or merge one in.

    \b
    Example:
      rmm onnx prepare base.onnx --collection skills.rmm -o base.lora.onnx
      rmm export skills.rmm imdb --to onnx --base base.lora.onnx -o imdb.onnx_adapter
      rmm onnx merge base.onnx skills.rmm imdb -o imdb.onnx
    """


@command.command(cls=Verb, short_help="Give a model inputs for the factors of a task.")
@_base
@_output
@click.option(
    "--collection",
    "file",
    type=click.Path(),
    metavar="FILE.rmm",
    help="Prepare for the targets, and the heads, of its tasks.",
)
@click.option(
    "--targets",
    "patterns",
    multiple=True,
    metavar="NAME",
    help="Prepare these: module paths, their last parts (query), or globs; commas or again.",
)
@names
@click.option(
    "--dtype", metavar="NAME", help="f32, f16 or bf16 of the inputs (default: the activations')."
)
@_allow_unmatched
@force
@as_json
def prepare(
    base: Path, output: Path, file: str | None, patterns: tuple[str, ...], names: dict[str, str],
    dtype: str | None, allow_unmatched: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a copy of BASE that takes the factors of a task as inputs.

    Without them it gives BASE's outputs, bit for bit where the runtime fuses nothing across an
    input. Initialisers with anonymous names are found by the names of their nodes or biases; for
    the rest there is --map TARGET=INITIALISER.

    \b
    Example:
      rmm onnx prepare base.onnx --collection skills.rmm -o base.lora.onnx
      rmm onnx prepare base.onnx --targets query,value -o base.lora.onnx
    """
    from rmmformat.runtimes import onnx

    targets = [name for text in patterns for name in text.split(",") if name]
    if file is None:
        report = onnx.prepare(
            base, output, targets=targets, names=names, dtype=dtype,
            allow_unmatched=allow_unmatched, force=force,
        )  # fmt: skip
    else:
        with open_collection(file) as collection:
            report = onnx.prepare(
                base, output, collection=collection, targets=targets, names=names, dtype=dtype,
                allow_unmatched=allow_unmatched, force=force,
            )  # fmt: skip
    if as_json:
        print_json(report)
        return
    rows = [
        (target, f"{place.n_out} x {place.n_in}", place.operator, str(len(place.nodes)),
         place.weight)
        for target, place in report.targets.items()
    ]  # fmt: skip
    rows += [(name, "", "", "", name) for name in report.parameters]
    print_table(str(output), ("target", ">out x in", "operator", ">nodes", "initialiser"), rows)
    _notes(report.unmatched, report.left)


@command.command(cls=Verb, short_help="Merge one task into a model.")
@_base
@click.argument("file", type=click.Path())
@click.argument("task")
@_output
@names
@_allow_unmatched
@click.option("--drop-private", is_flag=True, help="Leave heads and other private tensors out.")
@force
@as_json
def merge(
    base: Path, file: str, task: str, output: Path, names: dict[str, str], allow_unmatched: bool,
    drop_private: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a copy of BASE with the weights of TASK of FILE merged in, and its heads.

    \b
    Example:
      rmm onnx merge base.onnx skills.rmm imdb -o imdb.onnx
    """
    from rmmformat.runtimes import onnx

    with open_collection(file) as collection:
        report = onnx.merge(
            base, collection, task, output, names=names, allow_unmatched=allow_unmatched,
            drop_private=drop_private, force=force,
        )  # fmt: skip
    if as_json:
        print_json(report)
        return
    click.echo(
        f"{task} -> {output}: {len(report.weights)} weights, {len(report.parameters)} parameters"
    )
    _notes(report.unmatched, report.left)


def _notes(unmatched: tuple[str, ...], left: Mapping[str, str]) -> None:
    for target in unmatched:
        note(f"left out: target {target} has no place in the model")
    for name, reason in left.items():
        note(f"left out: private tensor {name}: {reason}")
