"""Tasks as GGUF LoRA adapters, for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from rmmformat.converters.base import Options
from rmmformat.converters.files import atomic_file
from rmmformat.converters.gguf_layout import base_for, plan
from rmmformat.converters.gguf_payload import header, payload
from rmmformat.errors import RmmError
from rmmformat.model import LedgerLine, SourceTask

__all__ = ["export_adapter"]


def export_adapter(
    task: SourceTask, out: Path, *, force: bool, options: Options
) -> tuple[LedgerLine, ...]:
    """Write the file (see :meth:`rmmformat.converters.gguf.GgufExporter.export`)."""
    planned = plan(task, base_for(task, options.base), options=options)
    layout = planned.layout
    try:
        head = header(layout, name=task.name, base_model=task.base_model)
    except OSError as error:  # the gguf package writes to files alone
        raise RmmError(f"cannot write: {error.strerror or error}", path=str(out)) from error
    with atomic_file(out, force=force) as temporary, temporary.open("wb") as stream:
        stream.write(head)
        factors = None
        for slot in layout.slots:
            # A target's two slots are neighbours: its factors are read once.
            if slot.factor == "A":
                factors = task.factors(slot.target)
            assert factors is not None  # noqa: S101  # for the type checker: A comes first
            array = payload(slot, factors, planned.folds[slot.target], task.path)
            stream.seek(len(head) + slot.offset)
            stream.write(array.tobytes())
        stream.truncate(len(head) + layout.n_bytes)
    return planned.ledger
