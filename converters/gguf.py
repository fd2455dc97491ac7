"""LoRA adapters of llama.cpp (GGUF), both ways.

A pair in such a file is for a weight as llama.cpp has it: under another name, with the rows of
query and key in rotary order for some architectures
(:mod:`~rmmformat.converters.gguf_arch`), token embeddings transposed.  What is read is in
:mod:`~rmmformat.converters.gguf_scan` (the header) and
:mod:`~rmmformat.converters.gguf_import`, how tensors and modules are called in
:mod:`~rmmformat.converters.gguf_names`; what is written in
:mod:`~rmmformat.converters.gguf_layout` and :mod:`~rmmformat.converters.gguf_payload`.
"""

from __future__ import annotations

from pathlib import Path

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.gguf_export import export_adapter
from rmmformat.converters.gguf_import import open_adapter
from rmmformat.converters.gguf_scan import has_magic
from rmmformat.converters.names import check_task_names
from rmmformat.converters.places import open_each
from rmmformat.model import LedgerLine, SourceTask

__all__ = ["GgufExporter", "GgufImporter"]


class GgufImporter:
    """Reads a GGUF LoRA adapter, or every ``.gguf`` file of a folder.

    Read are F32, F16, BF16 and Q8_0 tensors; the latter as the gguf package dequantises them, as
    float32.  ``Options.base`` gives the base model, whose head counts are needed for architectures
    with rotary order unless the adapter has them; ``Options.names`` gives names that cannot be
    told.
    """

    name = "gguf"

    def detect(self, path: Path) -> bool:
        """Say whether ``path`` is a GGUF file or a folder with one."""
        return bool(_find(path))

    def open(
        self, path: Path, *, name: str | None = None, options: Options = DEFAULTS
    ) -> list[SourceTask]:
        """Open every adapter at ``path``.

        Parameters
        ----------
        path
            A file, or a folder of ``.gguf`` files.
        name
            Name of the task; by default the file's without ``.gguf``.

        Raises
        ------
        SourceError
            Broken, empty, or no adapter; ``name`` given for several; names that collide.
        UnsupportedError
            An architecture, tensor or type that has no counterpart, or a head count is missing.
        """
        tasks: list[SourceTask] = open_each(
            path,
            name,
            lambda place: [(None, file) for file in _find(place)],
            lambda file, own: open_adapter(file, own, options),
            what="GGUF file here",
            many="adapters",
        )
        check_task_names([(task.name, task.path) for task in tasks])
        return tasks


class GgufExporter:
    """Writes a task as one GGUF file that llama.cpp loads and applies completely.

    ``Options.base`` gives the base model; without it, the task's configuration must say what was
    once read from a GGUF file.  ``Options.dtype`` is ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"``
    (tensors whose rows make no blocks of 32 values become f16); by default the task's own, and f32
    for a B that takes up a scale with rounding.
    """

    name = "gguf"

    def export(
        self, task: SourceTask, out: Path, *, force: bool = False, options: Options = DEFAULTS
    ) -> tuple[LedgerLine, ...]:
        """Write the file ``out``; memory holds one target at a time.

        Raises
        ------
        LossyConversionError
            A private tensor, or a value that is too large for the type.
        UnsupportedError
            The base is not known, or a target is one that llama.cpp has not, ignores or would take
            for another; nothing is written.
        OptionError
            No such dtype.
        RmmError
            ``out`` exists and ``force`` is not set, or cannot be written.
        """
        return export_adapter(task, out, force=force, options=options)


def _find(path: Path) -> list[Path]:
    if has_magic(path):
        return [path]
    try:
        return sorted(
            entry for entry in path.iterdir() if entry.suffix == ".gguf" and has_magic(entry)
        )
    except (OSError, ValueError):  # of a path with a NUL
        return []
