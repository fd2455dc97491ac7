"""Held-out accuracy of a task with the deltas that a method gives back, for ``rmm compare --eval``.

    cd benchmarks/tasks
    rmm compare ../../build/tasks/lora --eval evaluate:score --json > ../../build/tasks/lora.json
    python evaluate.py ../../build/tasks/lora.json

The last command prints the table of the paper: a row a method, a column a task.

Environment: RMM_TASKS_ROWS (400) rows a task; RMM_TASKS (all) the tasks that are scored, the others
count for bytes and errors only; RMM_TASKS_DATA, the folder of the downloaded packages.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["score"]

_PREFIX = "base_model.model."


@cache
def _rows(task: str) -> list[tuple[str, int]]:
    import data

    return data.load(task, 0, int(os.environ.get("RMM_TASKS_ROWS", "400"))).test


@cache
def _model(classes: int) -> tuple[Any, dict[str, Any]]:
    """The encoder, and its linear weights as they were."""
    import model as encoder
    import torch

    model = encoder.fresh(classes)
    weights = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".encoder.layer." in name
    }
    return model, weights


def score(task: str, deltas: Mapping[str, Any], privates: Mapping[str, Any]) -> float | None:
    """Per cent of a task's held-out rows that its deltas and its own head get right.

    None for a task that there is no text for.
    """
    import data
    import model as encoder
    import numpy as np
    import torch

    if task not in os.environ.get("RMM_TASKS", ",".join(data.TASKS)).split(","):
        return None
    head = {name.split(".")[-1]: value for name, value in privates.items() if "classifier" in name}
    model, weights = _model(len(head["bias"]))
    with torch.no_grad():
        for part, value in head.items():
            getattr(model.classifier, part).copy_(torch.from_numpy(np.array(value, np.float32)))
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
        for target, delta in deltas.items():
            weight = model.get_submodule(target.removeprefix(_PREFIX)).weight
            A, B = (np.array(factor, np.float32) for factor in (delta.A, delta.B))
            weight += torch.from_numpy(np.float32(delta.scale) * (B @ A))
    return encoder.accuracy(model, task, _rows(task))


def table(found: Mapping[str, Any]) -> str:
    """Render a comparison (the JSON of ``rmm compare``) as Markdown."""
    tasks = [t for t in found["tasks"] if any(t in (r["scores"] or {}) for r in found["rows"])]
    head = ["method", "size, %", "file, %", "error, %", *tasks, "mean"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in found["rows"]:
        if row["scores"] is None:
            continue
        whole = row["file_bytes"]
        lines.append(
            [
                row["method"],
                f"{100 * row['fraction']:.1f}",
                "" if whole is None else f"{100 * whole / found['f32_bytes']:.1f}",
                f"{100 * row['mean_error']:.1f}",
                *(f"{row['scores'][task]:.1f}" for task in tasks),
                f"{row['score']:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
