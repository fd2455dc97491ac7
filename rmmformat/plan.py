"""What a collection would take and lose at different settings, before anything is written."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from rmmformat.base_model import common_base
from rmmformat.coding import Exact, MaxError, Method, Published, Size
from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.format import layout
from rmmformat.format.catalog import TargetKey
from rmmformat.merge.planner import Allocation, Spectra, allocate, predict, steps_for_error
from rmmformat.merge.rmm import max_components
from rmmformat.model import SourceTask
from rmmformat.pipeline import (
    CollectionTargets,
    Progress,
    Source,
    convert,
    group_targets,
    open_tasks,
)
from rmmformat.planned import (
    GAIN_ROUNDS,
    ErrorPlan,
    Gains,
    SizePlan,
    Survey,
    divide,
    foresee,
    halfway,
    shares,
    spectra_of,
    survey,
)

__all__ = ["PlanPoint", "PlanReport", "plan"]

ERRORS = (0.2, 0.1, 0.05, 0.02, 0.01)
SIZES = (0.1, 0.03, 0.01)


@dataclasses.dataclass(frozen=True)
class PlanPoint:
    """One setting and what it gives.

    Attributes
    ----------
    option
        As the command line has it.
    factor_bytes, file_bytes
        Of the factors; of the whole file with everything that the tasks carry.
    fraction
        Factor bytes over the originals'.
    mean_error, median_error, max_error
        Relative errors over all deltas; None where only coding tells.
    saves
        The file is smaller than the sources' files.
    measured
        Coded and measured, not predicted.
    """

    option: str
    factor_bytes: int
    fraction: float
    file_bytes: int
    mean_error: float | None
    median_error: float | None
    max_error: float | None
    saves: bool
    measured: bool


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """The curve of size against error of a collection.

    Attributes
    ----------
    original_bytes
        Bytes of all factors as stored by the sources.
    source_bytes
        Bytes of the sources' files.
    n_distinct
        Different deltas among the `n_deltas`.
    """

    tasks: tuple[str, ...]
    n_targets: int
    n_deltas: int
    n_distinct: int
    original_bytes: int
    source_bytes: int
    points: tuple[PlanPoint, ...]


def plan(
    sources: Source | Iterable[Source] | Mapping[str, Source] | Sequence[SourceTask],
    *,
    max_errors: Sequence[float] = ERRORS,
    sizes: Sequence[float] = SIZES,
    measure: bool = False,
    kind: str | None = None,
    options: Options = DEFAULTS,
    allow_base_mismatch: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> PlanReport:
    """Foresee sizes and errors.

    Parameters
    ----------
    sources, kind, options, allow_base_mismatch
        As :func:`rmmformat.pipeline.convert` takes them.
    max_errors, sizes
        Settings of the two dials.
    measure
        Code the collection at every setting, in a temporary folder, and report what came out.
        Otherwise the planner's model tells, from the singular values of the deltas, and where tasks
        share, from what that saves on some of them: bytes and mean errors of real adapters come
        out within 1 % of it where tasks share nothing, within a few per cent where they do.
    executor, progress
        As :func:`rmmformat.pipeline.convert` takes them.

    Returns
    -------
    PlanReport
        Both dials, exact storage, and RMM as published for comparison.

    Raises
    ------
    SourceError, UnsupportedError
        A source cannot be read.
    RmmError
        Tasks name different base models.
    """
    tasks = open_tasks(sources, kind, options, progress)
    common_base(tasks, options, allow_mismatch=allow_base_mismatch)
    by_target = group_targets(tasks)
    methods: list[tuple[str, Method]] = [
        *((f"--max-error {100 * e:g}%", MaxError(e)) for e in max_errors),
        *((f"--size {100 * s:g}%", Size(s)) for s in sizes),
        ("--exact", Exact()),
    ]
    targets = CollectionTargets(by_target, executor, progress)
    for p in range(1, _most_components(by_target) + 1):
        methods.append((f"--components {p}", Published(p)))
        total = sum(_published_bytes(Published(p), *item) for item in by_target.items())
        if total >= targets.original_bytes:
            break  # one such point says that it is of no use; more say nothing new
    found = dict(targets.map(survey))
    surveys = [(key, found[key]) for key in targets.keys]
    spectra = spectra_of(row for _, rows in surveys for row in rows)
    gains: dict[Method, dict[Hashable, Gains]] = {}
    if not measure and any(len(rows) > 1 for _, rows in surveys):
        dials = [method for _, method in methods if isinstance(method, MaxError | Size)]
        gains = _gains(dials, gains, surveys, spectra, targets)
        # What sharing saves goes into finer steps, at which it saves another part.
        sized = [dial for dial in dials if isinstance(dial, Size) and shares(gains[dial])]
        for _ in range(GAIN_ROUNDS if sized else 0):
            after = _gains(sized, gains, surveys, spectra, targets)
            gains |= {dial: halfway(gains[dial], found) for dial, found in after.items()}
    source_bytes = sum(file.n_bytes for task in tasks for file in task.files)
    points = []
    for done, (option, method) in enumerate(methods, 1):
        if measure:
            point = _measured(option, method, tasks, source_bytes, executor)
        else:
            allocation = _allocated(method, surveys, spectra, gains.get(method), targets)
            point = _predicted(
                option, method, allocation, by_target, spectra, targets, tasks, source_bytes
            )
        points.append(point)
        if measure and progress is not None:
            progress("settings", done, len(methods))
    return PlanReport(
        tuple(sorted(task.name for task in tasks)),
        len(by_target),
        sum(map(len, by_target.values())),
        len(spectra.n_in),
        targets.original_bytes,
        source_bytes,
        tuple(points),
    )


def _measured(
    option: str,
    method: Method,
    tasks: Sequence[SourceTask],
    source_bytes: int,
    executor: Executor | None,
) -> PlanPoint:
    with tempfile.TemporaryDirectory() as folder:
        path = os.fspath(Path(folder) / "plan.rmm")
        report = convert(tasks, path, method, allow_base_mismatch=True, executor=executor)
    return PlanPoint(
        option,
        report.factor_bytes,
        report.fraction,
        report.file_bytes,
        report.mean_error,
        report.median_error,
        report.max_error,
        report.file_bytes < source_bytes,
        True,
    )


def _gains(
    dials: Sequence[MaxError | Size],
    known: Mapping[Method, Mapping[Hashable, Gains]],
    surveys: Sequence[tuple[Hashable, list[Survey]]],
    spectra: Spectra,
    targets: CollectionTargets,
) -> dict[Method, dict[Hashable, Gains]]:
    """What sharing does at every target under each setting; steps are those of what is known."""
    if not dials:
        return {}
    plans: dict[Hashable, list[ErrorPlan | SizePlan]] = {key: [] for key, _ in surveys}
    for dial in dials:
        if isinstance(dial, MaxError):
            for key, _ in surveys:
                plans[key].append(ErrorPlan(dial.max_error))
        else:
            found = _allocated(dial, surveys, spectra, known.get(dial), targets)
            assert found is not None  # a dial is always allocated  # noqa: S101
            for key, of_target in divide(surveys, found).items():
                plans[key].append(of_target)
    foreseen = dict(targets.map_each(lambda key: functools.partial(foresee, plans[key])))
    return {
        dial: {key: foreseen[key][number] for key, _ in surveys}
        for number, dial in enumerate(dials)
    }


def _allocated(
    method: Method,
    surveys: Sequence[tuple[Hashable, list[Survey]]],
    spectra: Spectra,
    gains: Mapping[Hashable, Gains] | None,
    targets: CollectionTargets,
) -> Allocation | None:
    """Steps, bytes and errors that a method should give; None for one that plans none."""
    if not isinstance(method, MaxError | Size):
        return None
    shared, factors = spectra, np.ones(len(spectra.n_in))
    if gains is not None:
        rates = [rate for key, _ in surveys for rate in gains[key].rates]
        shared = dataclasses.replace(spectra, rate=np.array(rates))
        factors = np.array([error for key, _ in surveys for error in gains[key].errors])
    if isinstance(method, MaxError):
        found = predict(shared, steps_for_error(spectra, method.max_error))
    else:
        found = allocate(shared, method.size * targets.original_bytes)
    return dataclasses.replace(found, errors=found.errors * factors)


def _predicted(
    option: str,
    method: Method,
    allocation: Allocation | None,
    by_target: Mapping[TargetKey, Sequence[SourceTask]],
    spectra: Spectra,
    targets: CollectionTargets,
    tasks: Sequence[SourceTask],
    source_bytes: int,
) -> PlanPoint:
    errors: tuple[float | None, float | None, float | None] = (None, None, None)
    n_frames = 0
    if isinstance(method, Published):
        n_bytes = float(sum(_published_bytes(method, *item) for item in by_target.items()))
        n_frames = len(by_target)
    elif allocation is None:
        n_bytes, errors = float(spectra.exact_bytes.sum()), (0.0, 0.0, 0.0)
    else:
        n_bytes = float(allocation.n_bytes.sum())
        every = np.repeat(allocation.errors, spectra.weight.astype(np.int64))
        errors = (float(every.mean()), float(np.median(every)), float(every.max()))
    file_bytes = int(n_bytes) + _beside_factors(by_target, tasks, n_frames)
    return PlanPoint(
        option,
        int(n_bytes),
        n_bytes / targets.original_bytes if targets.original_bytes else 0.0,
        file_bytes,
        *errors,
        file_bytes < source_bytes,
        False,
    )


def _most_components(by_target: Mapping[TargetKey, Sequence[SourceTask]]) -> int:
    return max((len(tasks) - 1 for tasks in by_target.values()), default=0)


def _published_bytes(method: Published, key: TargetKey, tasks: Sequence[SourceTask]) -> int:
    """Mean, basis and coefficients of both factors, in the originals' dtype where it is one."""
    infos = [task.targets[key.name] for task in tasks]
    widths = {dtype for info in infos for dtype in (info.dtype_a, info.dtype_b)}
    width = widths.pop().itemsize if len(widths) == 1 else 4
    rank, n = max(info.rank for info in infos), len(tasks)
    p = min(method.components, max_components(n, rank))
    return width * (key.shape.n_in + key.shape.n_out) * (rank + p * rank + n * p)


def _beside_factors(
    by_target: Mapping[TargetKey, Sequence[SourceTask]], tasks: Sequence[SourceTask], n_frames: int
) -> int:
    """Header, index, metadata and private tensors: an estimate, exact to some hundred bytes."""
    records = layout.RECORDS
    total = layout.HEADER_LENGTH + len(records) * layout.SECTION.itemsize + 1000
    for key, members in by_target.items():
        entry = records["ENTR"].itemsize + records["erro"].itemsize
        total += records["TARG"].itemsize + records["TLST"].itemsize + len(key.name) + 1
        total += len(members) * entry
    total += n_frames * records["FRAM"].itemsize
    names = set()
    for task in tasks:
        total += records["TASK"].itemsize + len(task.name) + 1 + 150
        for name, info in task.privates.items():
            names.add(name)
            total += records["PRIV"].itemsize + records["BLOB"].itemsize + 8 * len(info.shape)
            total += int(np.prod(info.shape, dtype=np.int64)) * info.dtype.itemsize
    return total + sum(len(name) + 1 for name in names)
