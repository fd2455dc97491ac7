"""Methods side by side on one collection: bytes, error, time and, if there is one, a score.

Methods that the container holds are converted to a real file in a temporary folder and measured on
what the native loader gives back from it.  The others run target by target; memory is bounded by
one target of all tasks, and with an evaluation their deltas wait on disk until they are asked for.
"""

from __future__ import annotations

import dataclasses
import math
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
from rmmformat.contenders import Computed, Contender, Delta, Stored, survey_target
from rmmformat.errors import OptionError, RmmError, UnsupportedError
from rmmformat.format.catalog import TargetKey
from rmmformat.inspect import compare_with_sources
from rmmformat.merge.error import relative_error, summarize
from rmmformat.model import Factors, SourceTask
from rmmformat.pipeline import convert
from rmmformat.scores import Evaluate, Scores, Spool, change, means, score_task

__all__ = ["Comparison", "Row", "compare"]

Array = npt.NDArray[np.generic]

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
    change, change_error
        `score` less that of the row ``exact``, and the standard error of that difference, paired
        by example; None without that row, or where the evaluation gives one number a task.
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
    change: float | None = None
    change_error: float | None = None
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
    scores: list[Scores] = []
    for number, contender in enumerate(rows):

        def step(done: int, total: int, at: int = number) -> None:
            if progress is not None:
                progress("methods", at * 1000 + 1000 * done // max(total, 1), len(rows) * 1000)

        step(0, 1)
        with tempfile.TemporaryDirectory(prefix="rmm-compare-") as folder:
            options = _Options(evaluate, allow_base_mismatch, dense_limit, Path(folder), executor)
            if isinstance(contender, Stored):
                row, scored = _stored(contender, targets, options, step)
            else:
                row, scored = with_one_thread(_computed, contender, targets, options, step)
        found.append(row)
        scores.append(scored)
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
        _mark_best(_changes(found, scores)),
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
) -> tuple[Row, Scores]:
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
        return _not_run(contender, str(error)), {}
    seconds = time.perf_counter() - start
    with open_collection(path) as collection:
        found = compare_with_sources(
            collection, targets.tasks, lambda done, total: step(total + done, 3 * total)
        )
        scores: dict[str, npt.NDArray[np.float64]] = {}
        if options.evaluate is not None:
            for task in targets.tasks:
                deltas, privates = collection.load(task.name), targets.privates(task)
                scores |= score_task(options.evaluate, task, deltas, privates)
    errors = [error for task in found for error in task.errors.values()]
    problems = [f"{task.task}: {problem}" for task in found for problem in task.problems]
    row = _row(contender, targets, report.factor_bytes, errors, seconds, scores)
    row = dataclasses.replace(
        row,
        file_bytes=report.file_bytes - report.private_bytes,
        note="; ".join(problems[:3]),
    )
    return row, scores


def _computed(
    contender: Computed, targets: _Targets, options: _Options, step: Callable[[int, int], None]
) -> tuple[Row, Scores]:
    if contender.dense:
        values, largest = max(
            (len(members) * key.shape.n_in * key.shape.n_out, key.name)
            for key, members in targets.members.items()
        )
        if values > options.dense_limit:
            reason = (
                f"it needs the dense deltas of all tasks, {values:,} values at {largest}; the "
                f"limit is {options.dense_limit:,} (--dense-limit)"
            )
            return _not_run(contender, reason), {}
    start = time.perf_counter()
    plans = None if contender.plan is None else contender.plan(targets)
    errors: list[float] = []
    spool = None if options.evaluate is None else Spool(options.folder)
    n_bytes = 0
    for number, (key, members, factors) in enumerate(targets):
        rebuilt = contender.rebuild(factors, None if plans is None else plans[number])
        n_bytes += rebuilt.n_bytes
        errors += map(_error, factors, rebuilt.deltas)
        if spool is not None:
            spool.add(key.name, [task.name for task in members], rebuilt.deltas)
        step(number + 1, 2 * targets.n_targets)
    seconds = time.perf_counter() - start
    scores: dict[str, npt.NDArray[np.float64]] = {}
    if spool is not None and options.evaluate is not None:
        for task in targets.tasks:
            deltas, privates = spool.task(task.name), targets.privates(task)
            scores |= score_task(options.evaluate, task, deltas, privates)
    return _row(contender, targets, n_bytes, errors, seconds, scores), scores


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
    scores: Scores,
) -> Row:
    found = means(scores)
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
        found or None,
        float(np.mean(list(found.values()))) if found else None,
    )


def _changes(rows: Sequence[Row], scores: Sequence[Scores]) -> list[Row]:
    """Each row with its score's distance from that of the originals."""
    exact = [found for row, found in zip(rows, scores, strict=True) if row.family == "exact"]
    if not exact:
        return list(rows)
    found = [change(scored, exact[0]) or (None, None) for scored in scores]
    return [
        dataclasses.replace(row, change=mean, change_error=error)
        for row, (mean, error) in zip(rows, found, strict=True)
    ]


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
