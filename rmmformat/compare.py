"""Methods side by side on one collection: bytes, error, time and, if there is one, a score.

Methods that the container holds are converted to a real file in a temporary folder and measured on
what the native loader gives back from it.  The others run target by target; memory is bounded by
one target of all tasks, and with an evaluation their deltas wait on disk until they are asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rmmformat._version import __version__
from rmmformat.blas import with_one_thread
from rmmformat.collection import open_collection
from rmmformat.contenders import Computed, Contender, Delta, Dense, Stored, survey_target
from rmmformat.errors import OptionError, RmmError, UnsupportedError
from rmmformat.format.catalog import TargetKey
from rmmformat.inspect import compare_with_sources
from rmmformat.merge.error import relative_error, summarize
from rmmformat.model import Factors, SourceTask
from rmmformat.pipeline import convert

__all__ = ["Comparison", "Evaluate", "Row", "compare", "load_evaluation"]

Array = npt.NDArray[np.generic]

#: Called with a task's name, its deltas by target and its private tensors; higher is better, None
#: leaves the task out.
Evaluate = Callable[[str, Mapping[str, Factors], Mapping[str, Array]], float | None]
Progress = Callable[[str, int, int], None]

#: Errors below this are the rounding of the measurement (of float64, on deltas), and count as none.
_ROUNDING = 1e-13

#: Values of the dense deltas of all tasks at one target that are still formed: 512 MB in float64.
DENSE_LIMIT = 1 << 26


@dataclasses.dataclass(frozen=True)
class Row:
    """One method.

    Attributes
    ----------
    family, method, parameters
        Word of :data:`rmmformat.contenders.FAMILIES`, what to call the row, its settings.
    keeps_tasks
        False where all tasks get one delta.
    n_bytes
        Bytes for all factors; None where the method did not run (`note` says why).
    file_bytes
        Of methods that the container holds: the whole file without the private tensors.
    fraction, fraction_stored
        `n_bytes` over the factors' bytes in float32, and over those that the sources store.
    mean_error, median_error, max_error
        Relative Frobenius error of the deltas over tasks and targets; a target whose delta is zero
        counts only if it comes back as something else.
    seconds
        Reading the sources and coding them.
    scores, score
        Of each task that has one, and their mean; None without an evaluation.
    best
        No other row has fewer or as many bytes and a smaller mean error.
    """

    family: str
    method: str
    parameters: Mapping[str, Any]
    keeps_tasks: bool
    n_bytes: int | None = None
    file_bytes: int | None = None
    fraction: float | None = None
    fraction_stored: float | None = None
    mean_error: float | None = None
    median_error: float | None = None
    max_error: float | None = None
    seconds: float | None = None
    scores: Mapping[str, float] | None = None
    score: float | None = None
    best: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All rows, and what they were measured on.

    Attributes
    ----------
    f32_bytes, original_bytes
        Bytes of all factors in float32, and as the sources store them.
    evaluation
        Name of the evaluation, or the empty string.
    """

    producer: str
    base_model: str
    tasks: tuple[str, ...]
    n_targets: int
    ranks: tuple[int, ...]
    f32_bytes: int
    original_bytes: int
    evaluation: str
    rows: tuple[Row, ...]


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


def compare(
    tasks: Sequence[SourceTask],
    rows: Sequence[Contender],
    *,
    evaluate: Evaluate | None = None,
    evaluation: str = "",
    allow_base_mismatch: bool = False,
    dense_limit: int = DENSE_LIMIT,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run methods on a collection.

    Parameters
    ----------
    tasks
        As :func:`rmmformat.pipeline.open_sources` gives them.
    rows
        What to run: :func:`rmmformat.contenders.contenders`.
    evaluate, evaluation
        Scores a task with the deltas that a method gives back, and what to call it.
    allow_base_mismatch
        Take tasks that name different base models.
    dense_limit
        Most values of the dense deltas of all tasks at one target; methods that need more are
        listed with a note and not run.
    executor
        Where targets are coded of methods that the container holds; their seconds are less for it.
    progress
        Called as the work goes on.

    Raises
    ------
    RmmError
        A source cannot be read or is not finite, or the evaluation fails.
    """
    targets = _Targets(tasks)
    if not targets.keys:
        raise RmmError("the sources have no targets to compare")
    found: list[Row] = []
    for number, contender in enumerate(rows):

        def step(done: int, total: int, at: int = number) -> None:
            if progress is not None:
                progress("methods", at * 1000 + 1000 * done // max(total, 1), len(rows) * 1000)

        step(0, 1)
        with tempfile.TemporaryDirectory(prefix="rmm-compare-") as folder:
            options = _Options(evaluate, allow_base_mismatch, dense_limit, Path(folder), executor)
            if isinstance(contender, Stored):
                found.append(_stored(contender, targets, options, step))
            else:
                found.append(with_one_thread(_computed, contender, targets, options, step))
        step(1, 1)
    return Comparison(
        f"rmmformat {__version__}",
        next((task.base_model for task in tasks if task.base_model), ""),
        tuple(task.name for task in targets.tasks),
        len(targets.keys),
        tuple(sorted({info.rank for task in tasks for info in task.targets.values()})),
        targets.f32_bytes,
        targets.original_bytes,
        evaluation if evaluate is not None else "",
        _mark_best(found),
    )


@dataclasses.dataclass(frozen=True)
class _Options:
    evaluate: Evaluate | None
    allow_base_mismatch: bool
    dense_limit: int
    folder: Path
    executor: Executor | None


class _Targets:
    """The collection by target; what :class:`rmmformat.contenders.Survey` asks for, when asked."""

    def __init__(self, tasks: Sequence[SourceTask]) -> None:
        self.tasks = sorted(tasks, key=lambda task: task.name.encode())
        grouped: dict[TargetKey, list[SourceTask]] = {}
        for task in self.tasks:
            for name, info in task.targets.items():
                grouped.setdefault(TargetKey(name, info.shape), []).append(task)
        self.members = dict(sorted(grouped.items(), key=lambda item: item[0].sort_key()))
        self.keys = list(self.members)
        infos = [info for task in self.tasks for info in task.targets.values()]
        self.original_bytes = sum(info.n_bytes for info in infos)
        self.f32_bytes = sum(4 * i.rank * (i.shape.n_in + i.shape.n_out) for i in infos)

    def __iter__(self) -> Iterator[tuple[TargetKey, list[SourceTask], list[Factors]]]:
        for key, members in self.members.items():
            yield key, members, [task.factors(key.name) for task in members]

    @property
    def n_targets(self) -> int:
        return len(self.keys)

    @cached_property
    def _survey(self) -> list[tuple[npt.NDArray[np.float64], list[float]]]:
        return [survey_target(factors) for _, _, factors in self]

    @property
    def similarities(self) -> list[npt.NDArray[np.float64]]:
        return [matrix for matrix, _ in self._survey]

    @property
    def costs(self) -> list[list[float]]:
        return [costs for _, costs in self._survey]

    def privates(self, task: SourceTask) -> dict[str, Array]:
        return {name: task.private_tensor(name) for name in task.privates}


def _stored(
    contender: Stored, targets: _Targets, options: _Options, step: Callable[[int, int], None]
) -> Row:
    path = options.folder / "collection.rmm"
    start = time.perf_counter()
    try:
        report = convert(
            targets.tasks,
            path,
            contender.method,
            allow_base_mismatch=options.allow_base_mismatch,
            executor=options.executor,
            progress=lambda what, done, total: step(done, 3 * total) if what == "targets" else None,
        )
    except (OptionError, UnsupportedError) as error:  # this method's limits, not the sources'
        return _not_run(contender, str(error))
    seconds = time.perf_counter() - start
    with open_collection(path) as collection:
        found = compare_with_sources(
            collection, targets.tasks, lambda done, total: step(total + done, 3 * total)
        )
        scores: dict[str, float] = {}
        if options.evaluate is not None:
            for task in targets.tasks:
                deltas, privates = collection.load(task.name), targets.privates(task)
                scores |= _score(options.evaluate, task, deltas, privates)
    errors = [error for task in found for error in task.errors.values()]
    problems = [f"{task.task}: {problem}" for task in found for problem in task.problems]
    row = _row(contender, targets, report.factor_bytes, errors, seconds, scores)
    return dataclasses.replace(
        row,
        file_bytes=report.file_bytes - report.private_bytes,
        note="; ".join(problems[:3]),
    )


def _computed(
    contender: Computed, targets: _Targets, options: _Options, step: Callable[[int, int], None]
) -> Row:
    if contender.dense:
        values, largest = max(
            (len(members) * key.shape.n_in * key.shape.n_out, key.name)
            for key, members in targets.members.items()
        )
        if values > options.dense_limit:
            return _not_run(
                contender,
                f"it needs the dense deltas of all tasks, {values:,} values at {largest}; the "
                f"limit is {options.dense_limit:,} (--dense-limit)",
            )
    start = time.perf_counter()
    plans = None if contender.plan is None else contender.plan(targets)
    errors: list[float] = []
    spool = None if options.evaluate is None else _Spool(options.folder)
    n_bytes = 0
    for number, (key, members, factors) in enumerate(targets):
        rebuilt = contender.rebuild(factors, None if plans is None else plans[number])
        n_bytes += rebuilt.n_bytes
        errors += map(_error, factors, rebuilt.deltas)
        if spool is not None:
            spool.add(key.name, [task.name for task in members], rebuilt.deltas)
        step(number + 1, 2 * targets.n_targets)
    seconds = time.perf_counter() - start
    scores: dict[str, float] = {}
    if spool is not None and options.evaluate is not None:
        for task in targets.tasks:
            deltas, privates = spool.task(task.name), targets.privates(task)
            scores |= _score(options.evaluate, task, deltas, privates)
    return _row(contender, targets, n_bytes, errors, seconds, scores)


def _error(original: Factors, delta: Delta) -> float:
    """Relative error of a delta."""
    A, B, scale = original.A, original.B, original.scale
    if isinstance(delta, Factors):
        return relative_error(A, B, scale, delta.A, delta.B, delta.scale)
    up, down = B.astype(np.float64) * scale, A.astype(np.float64)
    energy = float(np.sum((up.T @ up) * (down @ down.T)))
    inner = float(np.sum((up.T @ delta.values) * down))
    square = float(np.einsum("ij,ij->", delta.values, delta.values))
    if energy == 0.0:
        return 0.0 if square == 0.0 else math.inf
    return math.sqrt(max(square - 2.0 * inner + energy, 0.0) / energy)


def _score(
    evaluate: Evaluate,
    task: SourceTask,
    deltas: Mapping[str, Factors],
    privates: Mapping[str, Array],
) -> dict[str, float]:
    try:
        score = evaluate(task.name, deltas, privates)
        return {} if score is None else {task.name: float(score)}
    except RmmError:
        raise
    except Exception as error:
        raise RmmError(
            f"the evaluation failed on task {task.name!r}: {type(error).__name__}: {error}"
        ) from error


def _not_run(contender: Contender, reason: str) -> Row:
    return Row(
        contender.family,
        contender.label,
        contender.parameters,
        contender.keeps_tasks,
        note=f"not run: {reason}",
    )


def _row(
    contender: Contender,
    targets: _Targets,
    n_bytes: int,
    errors: Sequence[float],
    seconds: float,
    scores: Mapping[str, float],
) -> Row:
    summary = summarize(0.0 if error < _ROUNDING else error for error in errors)
    return Row(
        contender.family,
        contender.label,
        contender.parameters,
        contender.keeps_tasks,
        n_bytes,
        None,
        n_bytes / targets.f32_bytes if targets.f32_bytes else 0.0,
        n_bytes / targets.original_bytes if targets.original_bytes else 0.0,
        summary.mean,
        summary.median,
        summary.max,
        seconds,
        dict(scores) or None,
        float(np.mean(list(scores.values()))) if scores else None,
    )


def _mark_best(rows: Sequence[Row]) -> tuple[Row, ...]:
    ran = [(row.n_bytes, row.mean_error) for row in rows]

    def best(at: int) -> bool:
        n_bytes, error = ran[at]
        if n_bytes is None or error is None:
            return False
        return not any(
            b is not None
            and e is not None
            and b <= n_bytes
            and (e < error or (e == error and (b < n_bytes or k < at)))
            for k, (b, e) in enumerate(ran)
            if k != at
        )

    return tuple(dataclasses.replace(row, best=best(at)) for at, row in enumerate(rows))


class _Spool:
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
    def __init__(self, spool: _Spool, where: Mapping[str, tuple[int, float | None]]) -> None:
        self._spool, self._where = spool, where

    def __getitem__(self, target: str) -> Factors:
        return self._spool.load(*self._where[target])

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
