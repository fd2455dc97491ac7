"""What must be known of a base model to place a LoRA adapter on it.

Three things say it: a GGUF file of the base, its ``config.json``, or the metadata of an adapter
that was once read from a GGUF file or written to one here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmmformat.converters.files import parse_json_object, read_json_object
from rmmformat.converters.gguf_arch import architecture_of_class, facts
from rmmformat.converters.gguf_names import Place
from rmmformat.converters.gguf_scan import has_magic, scan
from rmmformat.errors import RmmError, SourceError, UnsupportedError
from rmmformat.model import TargetKind, TargetShape

__all__ = ["HOW_TO_GIVE_BASE", "Base", "base_of_metadata", "base_of_text", "open_base"]

HOW_TO_GIVE_BASE = (
    "Give the base model: --base with its GGUF file, its config.json, or the folder that has one."
)

_HEADS_LIMIT = 1 << 16

Heads = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model, as far as an adapter must know it.

    Parameters
    ----------
    path
        What says so, for messages.
    architecture
        llama.cpp's name for it.
    n_heads, n_heads_kv
        Attention heads of query and key; one number, or one for each block; None if not known.
    shapes
        Every weight's shape in numpy's order by tensor name; None if not known.
    tied
        Whether the head is the embedding table; None if not known.
    """

    path: str
    architecture: str
    n_heads: Heads | None = None
    n_heads_kv: Heads | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    tied: bool | None = None

    def heads(self, place: Place) -> int:
        """Number of heads of a query or key projection.

        Raises
        ------
        UnsupportedError
            Not known.
        """
        number = self.n_heads if place.local == "attn_q" else self.n_heads_kv
        if isinstance(number, tuple):
            block = place.block
            number = number[block] if block is not None and block < len(number) else None
        if not number:
            raise UnsupportedError(
                f"tensor {place.tensor!r}: the rows of {self.architecture} models' query and key "
                "are in an order that depends on the number of heads, which is not known",
                path=self.path,
                hint=HOW_TO_GIVE_BASE,
            )
        return number

    def heads_in_order(self, target: str, place: Place, n_rows: int) -> int:
        """Give the heads by which the rows of a weight are ordered, 0 where they are not.

        Raises
        ------
        UnsupportedError
            The number is not known, or the rows do not make up so many heads.
        """
        if place.local not in ("attn_q", "attn_k") or not facts(self.architecture, self.path).rope:
            return 0
        n_heads = self.heads(place)
        if n_rows % (2 * n_heads):
            raise UnsupportedError(
                f"target {target!r} has {n_rows} rows, which {n_heads} heads of even width do not "
                "make up",
                path=self.path,
                hint="Is it the right base model?",
            )
        return n_heads

    def head_fields(self) -> tuple[tuple[str, Heads], ...]:
        """Give head counts as metadata of a GGUF file, for architectures that need them."""
        if not facts(self.architecture, self.path).rope:
            return ()
        pairs = (("head_count", self.n_heads), ("head_count_kv", self.n_heads_kv))
        return tuple(
            (f"{self.architecture}.attention.{key}", value)
            for key, value in pairs
            if value is not None
        )

    def check_shape(self, target: str, place: Place, shape: TargetShape) -> None:
        """Compare a target with the base's weight, where its shape is known.

        Raises
        ------
        UnsupportedError
            They differ, or the base has no such weight.
        """
        if self.shapes is None:
            return
        # An embedding's table is (vocabulary, width).
        embedded = shape.kind is TargetKind.EMBEDDING
        want = (shape.n_in, shape.n_out) if embedded else (shape.n_out, shape.n_in)
        have = self.shapes.get(place.tensor)
        if have != want:
            said = "does not exist" if have is None else f"has shape {have}"
            raise UnsupportedError(
                f"target {target!r} wants {place.tensor!r} of shape {want}, which {said} in the "
                "base model",
                path=self.path,
                hint="Is it the right base model?",
            )


def open_base(path: Path) -> Base:
    """Read a base model's GGUF header or ``config.json``.

    Raises
    ------
    SourceError
        Neither of the two, or broken.
    UnsupportedError
        A model class that is not known to be one of llama.cpp's architectures.
    """
    if has_magic(path):
        header = scan(path)
        if header.values.get("general.type", "model") != "model":
            raise SourceError(
                f"general.type is {header.values['general.type']!r}, expected 'model'",
                path=str(path),
                hint=HOW_TO_GIVE_BASE,
            )
        base = base_of_metadata(header.values, str(path))
        if not header.tensors or header.values.get("split.count", 1) != 1:
            return base
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        return dataclasses.replace(base, shapes=shapes, tied="output.weight" not in shapes)
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise SourceError(
            "neither a GGUF file nor a folder with config.json",
            path=str(path),
            hint=HOW_TO_GIVE_BASE,
        )
    _, fields = read_json_object(config)
    return _of_config(fields, str(config))


def base_of_metadata(values: Mapping[str, Any], path: str) -> Base:
    """Read the metadata of a GGUF file, of a base or of an adapter.

    Raises
    ------
    SourceError
        A value is not of its type.
    """
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise SourceError("general.architecture is missing or no text", path=path)
    heads = [
        _heads(values, f"{architecture}.attention.{key}", path)
        for key in ("head_count", "head_count_kv")
    ]
    # llama.cpp's own rule: as many key heads as query heads where it is not said.
    return Base(path, architecture, heads[0], heads[1] if heads[1] is not None else heads[0])


def base_of_text(text: str, path: str) -> Base | None:
    """Read what a task's configuration records, where it is one that came out of a GGUF file."""
    try:
        fields = parse_json_object(text, path) if text else {}
    except RmmError:
        return None
    if "general.architecture" not in fields:
        return None
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return base_of_metadata(values, path)


def _heads(values: Mapping[str, Any], key: str, path: str) -> Heads | None:
    value = values.get(key)
    if value is None:
        return None
    several = value if isinstance(value, tuple) else (value,)
    for number in several:
        if type(number) is not int or not 0 <= number <= _HEADS_LIMIT:
            raise SourceError(f"{key} is {number!r}, expected a number of heads", path=path)
    return value if isinstance(value, tuple) else int(value)


def _of_config(fields: Mapping[str, Any], path: str) -> Base:
    text = fields.get("text_config")
    inner: Mapping[str, Any] = {**fields, **text} if isinstance(text, dict) else fields
    classes = fields.get("architectures") or inner.get("architectures")
    known = [
        architecture_of_class(name)
        for name in (classes if isinstance(classes, list) else ())
        if isinstance(name, str)
    ]
    architecture = next((name for name in known if name is not None), None)
    if architecture is None:
        raise UnsupportedError(
            f"model class {classes!r:.80}: which of llama.cpp's architectures it is, is not known",
            path=path,
            hint="Give the base model as a GGUF file.",
        )
    n_heads = _heads(inner, "num_attention_heads", path)
    n_heads_kv = _heads(inner, "num_key_value_heads", path)
    # Where it is left out, the class's default holds, and classes differ.
    tied = inner.get("tie_word_embeddings")
    return Base(
        path,
        architecture,
        n_heads,
        n_heads if n_heads_kv is None else n_heads_kv,
        tied=tied if isinstance(tied, bool) else None,
    )
