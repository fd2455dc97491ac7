"""Adapters of the PEFT library, both ways.

What is read and how is in :mod:`~rmmformat.converters.peft_config` (the config),
:mod:`~rmmformat.converters.peft_layout` (the tensors) and
:mod:`~rmmformat.converters.peft_import` (the folder); what is written is in
:mod:`~rmmformat.converters.peft_export`.
"""

from __future__ import annotations

from pathlib import Path

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.casting import cast_task
from rmmformat.converters.names import check_task_names
from rmmformat.converters.peft_export import export_adapter
from rmmformat.converters.peft_import import find_adapters, open_adapter
from rmmformat.converters.places import open_each
from rmmformat.model import LedgerLine, SourceTask

__all__ = ["PeftExporter", "PeftImporter"]


class PeftImporter:
    """Reads a PEFT adapter folder, or every adapter of a folder of such folders."""

    name = "peft"

    def detect(self, path: Path) -> bool:
        """Say whether there is an adapter config or adapter weights at or below ``path``."""
        try:
            return bool(find_adapters(path))
        except OSError:
            return False

    def open(
        self, path: Path, *, name: str | None = None, options: Options = DEFAULTS
    ) -> list[SourceTask]:
        """Open every adapter at ``path``.

        Parameters
        ----------
        path
            An adapter folder, its config or weight file, or a folder of adapter folders.
        name
            Name of the task; by default the folder's.

        Raises
        ------
        SourceError
            Broken or empty; ``name`` given for several adapters; names that collide.
        UnsupportedError
            Not plain LoRA, or a library is missing.
        """
        tasks: list[SourceTask] = open_each(
            path,
            name,
            find_adapters,
            lambda folder, own: open_adapter(folder, own, options),
            what="PEFT adapter here or one folder below",
            many="adapters",
        )
        check_task_names([(task.name, task.path) for task in tasks])
        return tasks


class PeftExporter:
    """Writes a task as a PEFT adapter folder that PEFT loads completely."""

    name = "peft"

    def export(
        self, task: SourceTask, out: Path, *, force: bool = False, options: Options = DEFAULTS
    ) -> tuple[LedgerLine, ...]:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` to the folder ``out``.

        Raises
        ------
        UnsupportedError
            The task holds something that no PEFT config expresses.
        OptionError, LossyConversionError
            There is no dtype of that name, or a value is too large for it.
        RmmError
            ``out`` exists and ``force`` is not set, or cannot be written.
        """
        return export_adapter(cast_task(task, options.dtype), out, force=force, options=options)
