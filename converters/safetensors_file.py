"""One task as one plain safetensors file, for tools that want arrays and no ecosystem.

Layout
------
``TARGET.lora_A`` (rank, n_in) and ``TARGET.lora_B`` (n_out, rank) in the task's dtypes, private
tensors under their own names.  The delta of a target is ``scale * B @ A``; scales, kinds and all
else that is not an array are one JSON object under the metadata key ``rmmformat``::

    {"version": 1, "task": NAME, "base_model": ID, "config": TEXT,
     "targets": {TARGET: {"scale": 2.0, "kind": "linear", "transposed": false, "kernel": []}},
     "privates": {NAME: ROLE}}
"""

from __future__ import annotations

import json
from pathlib import Path

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.casting import cast_task
from rmmformat.converters.files import atomic_file
from rmmformat.converters.safetensors_writer import FactorReader, Planned, write_safetensors
from rmmformat.errors import RmmError
from rmmformat.model import Action, LedgerLine, SourceTask

__all__ = ["METADATA_KEY", "SafetensorsExporter"]

METADATA_KEY = "rmmformat"


class SafetensorsExporter:
    """Writes a task as a single safetensors file (layout: the module's docstring)."""

    name = "safetensors"

    def export(
        self, task: SourceTask, out: Path, *, force: bool = False, options: Options = DEFAULTS
    ) -> tuple[LedgerLine, ...]:
        """Write the file ``out``, one tensor at a time.

        Raises
        ------
        OptionError, LossyConversionError
            There is no dtype of that name, or a value is too large for it.
        RmmError
            ``out`` exists and ``force`` is not set, or cannot be written.
        """
        task = cast_task(task, options.dtype)
        reader = FactorReader(task)
        tensors: dict[str, Planned] = {}
        ledger: list[LedgerLine] = []

        def put(name: str, tensor: Planned, action: Action, detail: str) -> None:
            if name in tensors:
                raise RmmError(f"two tensors of task {task.name!r} would be called {name!r}")
            tensors[name] = tensor
            ledger.append(LedgerLine(f"tensor {name}", action, detail))

        for target, info in task.targets.items():
            a, b = reader.planned(
                target, (info.rank, info.shape.n_in), (info.shape.n_out, info.rank)
            )
            put(f"{target}.lora_A", a, Action.USED, f"factor A of {target}")
            put(f"{target}.lora_B", b, Action.USED, f"factor B of {target}")
        kept = {} if options.drop_private else task.privates
        for name, private in task.privates.items():
            if name in kept:
                put(name, reader.private(name), Action.STORED, private.role.name.lower())
            else:
                line = LedgerLine(f"tensor {name}", Action.IGNORED, "notice: dropped on request")
                ledger.append(line)
        about = {
            "version": 1,
            "task": task.name,
            "base_model": task.base_model,
            "config": task.config_text,
            "targets": {
                target: {
                    "scale": info.scale,
                    "kind": info.shape.kind.name.lower(),
                    "transposed": info.shape.transposed,
                    "kernel": list(info.shape.kernel),
                }
                for target, info in task.targets.items()
            },
            "privates": {name: info.role.name.lower() for name, info in kept.items()},
        }
        text = json.dumps(about, ensure_ascii=False, sort_keys=True, allow_nan=False)

        with atomic_file(out, force=force) as temporary:
            write_safetensors(temporary, tensors, {METADATA_KEY: text})
        return tuple(ledger)
