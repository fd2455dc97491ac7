"""Held-out accuracy of a task with the deltas that a method gives back, for ``rmm compare --eval``.

    cd benchmarks/tasks
    rmm compare ../../build/tasks/lora --eval evaluate:score --json > ../../build/tasks/lora.json
    python evaluate.py ../../build/tasks/lora.json

The last command prints the table of the paper: a row a method, a column a task.

Environment: RMM_TASKS_ROWS (500) held-out rows a task, at most; RMM_TASKS (all) the tasks that are
scored, the others count for bytes and errors only; RMM_TASKS_DATA, the folder of the downloaded
packages; RMM_TASKS_SCORES, a folder where scores are kept, so that what has been scored once, to
the last bit of its deltas, is not scored again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import data
import numpy as np

__all__ = ["accuracy", "rows", "score", "table"]

_PREFIX = "base_model.model."


@cache
def rows(task: str) -> data.Rows:
    """Held-out rows that scores are of."""
    return data.load(task).held[: int(os.environ.get("RMM_TASKS_ROWS", "500"))]


@cache
def _inputs(task: str) -> tuple[list[list[int]], list[int]]:
    import model as encoder

    return encoder.tokens(rows(task)), [label for _, label in rows(task)]


def accuracy(model: Any, task: str) -> float:
    """Per cent of a task's held-out rows that a model gets right."""
    import model as encoder

    return 100.0 * float(encoder.right(model, *_inputs(task)).mean())


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


def score(task: str, deltas: Mapping[str, Any], privates: Mapping[str, Any]) -> np.ndarray | None:
    """For each held-out row 100.0 if a task's deltas and its own head get it right, else 0.0.

    None for a task that there is no text for.
    """
    if task not in os.environ.get("RMM_TASKS", ",".join(data.TASKS)).split(","):
        return None
    start = time.monotonic()
    head = {name.split(".")[-1]: value for name, value in privates.items() if "classifier" in name}
    found = _kept(task, deltas, head)
    print(
        f"{task} {found.mean():.2f} {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
    )
    return found


def _kept(task: str, deltas: Mapping[str, Any], head: Mapping[str, Any]) -> np.ndarray:
    folder = os.environ.get("RMM_TASKS_SCORES")
    if not folder:
        return _run(task, deltas, head)
    import model as encoder

    asked = (task, rows(task), encoder.LENGTH, sorted(deltas), sorted(head))
    digest = hashlib.sha256(repr(asked).encode())
    for part in sorted(head):
        digest.update(np.ascontiguousarray(head[part], np.float32).tobytes())
    for target in sorted(deltas):
        delta = deltas[target]
        digest.update(repr((delta.scale, delta.A.shape)).encode())
        for factor in (delta.A, delta.B):
            digest.update(np.ascontiguousarray(factor, np.float32).tobytes())
    path = Path(folder) / f"{task}-{digest.hexdigest()}.npy"
    if path.exists():
        return np.load(path)
    found = _run(task, deltas, head)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, found)
    part.rename(path)
    return found


def _run(task: str, deltas: Mapping[str, Any], head: Mapping[str, Any]) -> np.ndarray:
    import model as encoder
    import torch

    model, weights = _model(len(head["bias"]))
    with torch.no_grad():
        for part, value in head.items():
            getattr(model.classifier, part).copy_(torch.from_numpy(np.array(value, np.float32)))
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
        for target in deltas:
            delta = deltas[target]
            weight = model.get_submodule(target.removeprefix(_PREFIX)).weight
            A, B = (np.array(factor, np.float32) for factor in (delta.A, delta.B))
            weight += torch.from_numpy(np.float32(delta.scale) * (B @ A))
    return 100.0 * encoder.right(model, *_inputs(task))


def table(found: Mapping[str, Any]) -> str:
    """Render a comparison (the JSON of ``rmm compare``) as Markdown.

    The size is that of the whole file without heads where the method has a file, else of its
    factors, in per cent of the originals' in float32.
    """
    tasks = [t for t in found["tasks"] if any(t in (r["scores"] or {}) for r in found["rows"])]
    head = ["method", "size %", "error %", *tasks, "mean", "change"]
    lines = [head, ["---"] * len(head)]
    for row in found["rows"]:
        if row["scores"] is None:
            continue
        method, change, doubt = row["method"], row["change"], row["change_error"]
        if row["family"] == "planned":
            method = f"`--size {100 * row['parameters']['size']:.3g}%`"
        if row["family"] == "exact":
            method, change = "originals (individual)", None
        n_bytes = row["n_bytes"] if row["file_bytes"] is None else row["file_bytes"]
        size = 100 * n_bytes / found["f32_bytes"]
        lines.append(
            [
                method,
                f"{size:.2f}" if size < 10 else f"{size:.1f}",
                f"{100 * row['mean_error']:.1f}",
                *(f"{row['scores'][task]:.1f}" for task in tasks),
                f"{row['score']:.2f}",
                ""
                if change is None or doubt is None
                else f"{change:+.2f} ± {doubt:.2f}".replace("-", "−"),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
