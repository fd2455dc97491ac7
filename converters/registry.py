"""Every foreign format by name, without importing any of them.

A format is one line of :data:`BUILT_IN`: what it is, where its importer and exporter are
(``"module:Class"``), which libraries they need and what to say when one is missing, and what they
refuse.  Nothing heavy is imported until a format is asked for.  Other packages add formats through
the entry-point group ``rmmformat.converters``: each entry point loads to a :class:`Format`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from rmmformat.converters.base import DEFAULTS, Exporter, Importer, Joint, Options
from rmmformat.converters.names import check_task_names
from rmmformat.errors import NotFoundError, RmmError, SourceError, UnsupportedError
from rmmformat.model import SourceTask

__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "Format",
    "collect",
    "detect",
    "formats",
    "get",
    "get_exporter",
    "get_importer",
]

ENTRY_POINT_GROUP = "rmmformat.converters"


@dataclasses.dataclass(frozen=True)
class Format:
    """One row of the registry.

    Parameters
    ----------
    name
        The word for it on the command line.
    description
        One line for ``rmm formats``.
    importer, exporter
        ``"module:Class"``; None where that direction does not exist.
    needs
        Modules that must be importable.
    install
        The sentence to print when one of them is not.
    refuses
        What it turns away by name, for people who look before they try.
    """

    name: str
    description: str
    importer: str | None = None
    exporter: str | None = None
    needs: tuple[str, ...] = ()
    install: str = ""
    refuses: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        """Whether every library it needs is installed."""
        return not self.missing

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules that it needs and that cannot be found."""
        return tuple(module for module in self.needs if importlib.util.find_spec(module) is None)


BUILT_IN: tuple[Format, ...] = (
    Format(
        name="peft",
        description="PEFT LoRA adapter folder, or a folder of such folders",
        importer="rmmformat.converters.peft:PeftImporter",
        exporter="rmmformat.converters.peft:PeftExporter",
        needs=("safetensors",),
        install="pip install safetensors",
        refuses=(
            "PEFT types other than LORA",
            "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA adapters not converted to plain LoRA",
            "aLoRA, QALoRA, BD-LoRA, KaSA, Arrow and MonteCLoRA",
            "target_parameters (mixture-of-experts weights)",
            "layer_replication",
            "grouped convolutions and fused MergedLinear layers",
            "factors that are not float32, float16 or bfloat16",
            "torchtune and MLX key names (kohya's and diffusers' are the format kohya)",
        ),
    ),
    Format(
        name="safetensors",
        description="one safetensors file: TARGET.lora_A, TARGET.lora_B, scales in its metadata",
        exporter="rmmformat.converters.safetensors_file:SafetensorsExporter",
        needs=("safetensors",),
        install="pip install safetensors",
    ),
    Format(
        name="onnx",
        description="ONNX Runtime adapter (.onnx_adapter), for what `rmm onnx prepare` made",
        exporter="rmmformat.converters.onnx_adapter:OnnxAdapterExporter",
        needs=("onnxruntime",),
        install='pip install "rmmformat[onnx]"',
    ),
    Format(
        name="kohya",
        description="LoRA file of an image model (kohya, diffusers), or a folder of such files",
        importer="rmmformat.converters.kohya:KohyaImporter",
        exporter="rmmformat.converters.kohya:KohyaExporter",
        needs=("safetensors",),
        install="pip install safetensors",
        refuses=(
            "LyCORIS methods: LoHa (hada), LoKr, Tucker cores (lora_mid), GLoRA, IA3, OFT, norms",
            "factors that are not float32, float16 or bfloat16",
            "writing: embeddings, Conv1D, names of no component of an image model without --map",
        ),
    ),
    Format(
        name="gguf",
        description="GGUF LoRA adapter of llama.cpp, or a folder of such files",
        importer="rmmformat.converters.gguf:GgufImporter",
        exporter="rmmformat.converters.gguf:GgufExporter",
        needs=("gguf",),
        install="pip install 'rmmformat[gguf]'",
        refuses=(
            "activated LoRA (invocation tokens)",
            "tensors of types other than F32, F16, BF16 and Q8_0",
            "architectures whose weights llama.cpp orders in a way that is not known here",
            "weights that llama.cpp splits, joins or scales, and those it applies no pair to",
            "writing: private tensors, convolutions, Conv1D, embeddings that are the head, too",
        ),
    ),
    Format(
        name="lore",
        description="fine-tuned models of an unknown base, together; needs --from and --write-base",
        importer="rmmformat.converters.lore:LoreImporter",
        needs=("safetensors",),
        install="pip install safetensors",
        refuses=("quantised models", "models whose layers are not the same", "one model alone"),
    ),
    # Last: weights of a whole model are what they are only if they are nothing more special.
    Format(
        name="checkpoint",
        description="fine-tuned model, or a folder of such; needs --base",
        importer="rmmformat.converters.checkpoint:CheckpointImporter",
        needs=("safetensors",),
        install="pip install safetensors",
        refuses=(
            "quantised models",
            "models whose layers are not the base's",
            "tied weights of encoder-decoders and masked language models, where they have changed",
        ),
    ),
)


def formats() -> tuple[Format, ...]:
    """List every format, built-in ones first, installed or not.

    A plug-in may not take the name of a built-in format; one that fails to load is listed with the
    reason as its description, so that one broken package does not hide the others.
    """
    rows = {row.name: row for row in BUILT_IN}
    for row in _plug_ins(metadata.entry_points):
        rows.setdefault(row.name, row)
    return tuple(rows.values())


@functools.cache  # finding them reads the metadata of every installed package
def _plug_ins(find: Any) -> tuple[Format, ...]:
    found = []
    for point in sorted(find(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        if any(row.name == point.name for row in BUILT_IN):
            continue
        try:
            row = point.load()
            if not isinstance(row, Format):
                raise TypeError(f"expected a Format, got {type(row).__name__}")
        except Exception as error:  # a plug-in may fail in any way
            row = Format(point.name, f"plug-in {point.value} does not load: {error}")
        found.append(dataclasses.replace(row, name=point.name))
    return tuple(found)


def get(name: str) -> Format:
    """Look up a format.

    Raises
    ------
    NotFoundError
        There is none of that name.
    """
    rows = {row.name: row for row in formats()}
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(rows)}."
        raise NotFoundError(f"no format is called {name!r}", hint=hint)
    return rows[name]


def get_importer(name: str) -> Importer:
    """Load the importer of a format.

    Raises
    ------
    NotFoundError
        There is no such format.
    UnsupportedError
        It cannot be read, or a library that it needs is not installed.
    """
    return cast(Importer, _load(get(name), "importer"))


def get_exporter(name: str) -> Exporter:
    """Load the exporter of a format; raises as :func:`get_importer` does."""
    return cast(Exporter, _load(get(name), "exporter"))


def _load(row: Format, direction: str) -> Any:
    where: str | None = getattr(row, direction)
    if where is None:
        able = [other.name for other in formats() if getattr(other, direction)]
        raise UnsupportedError(
            f"{row.name} has no {direction}", hint=f"Formats that have one: {', '.join(able)}."
        )
    if row.missing:
        raise UnsupportedError(
            f"{row.name} needs {', '.join(row.missing)}, which is not installed", hint=row.install
        )
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def detect(path: Path) -> str:
    """Name the format of a source.

    Raises
    ------
    SourceError
        Nothing is there, or no importer knows it.
    """
    try:
        there = path.exists()
    except OSError as error:
        raise SourceError(f"cannot read: {error.strerror}", path=str(path)) from error
    if not there:
        raise SourceError("no such file or folder", path=str(path))
    readers = [row for row in formats() if row.importer is not None]
    for row in readers:
        if row.available and get_importer(row.name).detect(path):
            return row.name
    absent = [f"{row.name} ({row.install})" for row in readers if not row.available]
    hint = f"Not tried, because not installed: {', '.join(absent)}." if absent else None
    tried = ", ".join(row.name for row in readers if row.available)
    raise SourceError(f"not a known kind of source; tried {tried}", path=str(path), hint=hint)


def collect(
    sources: Iterable[tuple[str | None, Path]],
    *,
    fmt: str | None = None,
    options: Options = DEFAULTS,
) -> list[SourceTask]:
    """Open several sources as one collection.

    Parameters
    ----------
    sources
        (name, path) pairs; a name of None takes the source's own.
    fmt
        The format of all of them; detected for each where None.

    Raises
    ------
    SourceError
        A source is broken, or two tasks have names that some system could not tell apart.
    UnsupportedError
        A source is of a kind that a collection cannot hold.
    """
    tasks: list[SourceTask] = []
    joint = get_importer(fmt) if fmt is not None else None
    if isinstance(joint, Joint):
        return joint.open_together(sources, options=options)
    for name, path in sources:
        importer = get_importer(fmt if fmt is not None else detect(path))
        tasks.extend(importer.open(path, name=name, options=options))
    if not tasks:
        raise RmmError("no sources were given")
    check_task_names([(task.name, task.path) for task in tasks])
    return tasks
