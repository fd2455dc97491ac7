"""Scores of tasks: what an evaluation is, asking it, and telling a change from chance.

An evaluation that gives one number for each held-out example lets methods be compared example by
example: most are right, or wrong, with both, and only the others make the difference uncertain.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rmmformat.contenders import Delta, Dense
from rmmformat.errors import OptionError, RmmError
from rmmformat.model import Factors, SourceTask

__all__ = ["Evaluate", "Scores", "Spool", "change", "load_evaluation", "means", "score_task"]

Array = npt.NDArray[np.generic]
F64 = npt.NDArray[np.float64]

#: Called with a task's name, its deltas by target and its private tensors.  Higher is better: one
#: number, or one for each held-out example, always in the same order, whose mean is the task's
#: score.  None leaves the task out.
Evaluate = Callable[
    [str, Mapping[str, Factors], Mapping[str, Array]], "float | Sequence[float] | F64 | None"
]

#: By task: (n,) one number an example, or () the one number that the evaluation gave.
Scores = Mapping[str, F64]


def load_evaluation(text: str) -> Evaluate:
    """Import ``MODULE:FUNCTION``, from the current folder too.

    Raises
    ------
    OptionError
        It is not of that form, or cannot be imported, or is no function.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise OptionError(f"an evaluation is MODULE:FUNCTION, got {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise OptionError(f"cannot import {module}: {error}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise OptionError(f"{module} has no function {name}")
    evaluate: Evaluate = found
    return evaluate


def score_task(
    evaluate: Evaluate,
    task: SourceTask,
    deltas: Mapping[str, Factors],
    privates: Mapping[str, Array],
) -> Scores:
    """Ask an evaluation about one task; empty if it leaves the task out.

    Raises
    ------
    RmmError
        It fails, or gives neither a number nor a sequence of numbers.
    """
    try:
        found = evaluate(task.name, deltas, privates)
        if found is None:
            return {}
        values = np.array(found, np.float64)
    except RmmError:
        raise
    except Exception as error:
        raise RmmError(
            f"the evaluation failed on task {task.name!r}: {type(error).__name__}: {error}"
        ) from error
    if values.ndim > 1 or values.size == 0:
        raise RmmError(
            f"the evaluation gave an array of shape {values.shape} for task {task.name!r}, "
            "expected a number, or one for each example"
        )
    return {task.name: values}


def means(scores: Scores) -> dict[str, float]:
    """Each task's score."""
    return {task: float(values.mean()) for task, values in scores.items()}


def change(scores: Scores, reference: Scores) -> tuple[float, float | None] | None:
    """How far the mean over tasks is from that of a reference, and the standard error of that.

    Tasks count alike.  The standard error is of differences example by example, the examples being
    a sample of each task, the tasks themselves not: the square root of the sum of var(d_t) / n_t,
    over the number of tasks.  It is None where a task has one number only.

    Returns
    -------
    tuple or None
        None where no task has both.

    Raises
    ------
    RmmError
        A task has not as many examples as in the reference.
    """
    both = [task for task in scores if task in reference]
    if not both:
        return None
    differences = []
    for task in both:
        if scores[task].shape != reference[task].shape:
            raise RmmError(
                f"the evaluation gave {scores[task].size} numbers for task {task!r}, and "
                f"{reference[task].size} for its original"
            )
        differences.append(scores[task] - reference[task])
    mean = float(np.mean([difference.mean() for difference in differences]))
    if any(difference.size < 2 for difference in differences):
        return mean, None
    square = sum(float(d.var(ddof=1)) / d.size for d in differences)
    return mean, math.sqrt(square) / len(both)


class Spool:
    """Deltas on disk, read when a task asks for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._where: dict[str, dict[str, tuple[int, float | None]]] = {}

    def add(self, target: str, tasks: Sequence[str], deltas: Sequence[Delta]) -> None:
        """Keep one target's deltas; one that several tasks share is written once."""
        known: dict[int, tuple[int, float | None]] = {}
        for task, delta in zip(tasks, deltas, strict=True):
            if id(delta) not in known:
                self._count += 1
                if isinstance(delta, Dense):
                    np.save(self._path("D"), delta.values.astype(np.float32))
                    known[id(delta)] = (self._count, None)
                else:
                    np.save(self._path("A"), np.asarray(delta.A, np.float32))
                    np.save(self._path("B"), np.asarray(delta.B, np.float32))
                    known[id(delta)] = (self._count, delta.scale)
            self._where.setdefault(task, {})[target] = known[id(delta)]

    def task(self, name: str) -> Mapping[str, Factors]:
        """One task's deltas."""
        return _Spooled(self, self._where.get(name, {}))

    def load(self, number: int, scale: float | None) -> Factors:
        """Read one delta; a dense one becomes a product with the identity."""
        if scale is not None:
            return Factors(
                np.load(self._path("A", number)), np.load(self._path("B", number)), scale
            )
        values = np.load(self._path("D", number))
        n_out, n_in = values.shape
        if n_out <= n_in:
            return Factors(values, np.eye(n_out, dtype=np.float32), 1.0)
        return Factors(np.eye(n_in, dtype=np.float32), values, 1.0)

    def _path(self, kind: str, number: int | None = None) -> str:
        return os.fspath(self._folder / f"{self._count if number is None else number}{kind}.npy")


class _Spooled(Mapping[str, Factors]):
    def __init__(self, spool: Spool, where: Mapping[str, tuple[int, float | None]]) -> None:
        self._spool, self._where = spool, where

    def __getitem__(self, target: str) -> Factors:
        return self._spool.load(*self._where[target])

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
