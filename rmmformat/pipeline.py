"""Many adapters to one file: sources in, a file and a report out.

Streams one target at a time, twice where a method wants to see all of them before it codes any.
Factors of sources that are mapped files stay where they are; what is held is what a target's coding
needs beside them.  With workers, memory is bounded by the largest target of all tasks for each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

from rmmformat.base_model import common_base
from rmmformat.blas import one_thread, with_one_thread
from rmmformat.coding import (
    CodedTarget,
    Method,
    code_target,
    code_target_whole,
    hardly_works,
)
from rmmformat.converters.base import DEFAULTS, Options, Prepared
from rmmformat.converters.names import check_task_names
from rmmformat.converters.registry import collect
from rmmformat.format.assembly import Assembly
from rmmformat.format.catalog import TargetKey
from rmmformat.format.writer import Writer
from rmmformat.mapped import release
from rmmformat.merge.error import summarize
from rmmformat.model import Factors, LedgerLine, SourceTask
from rmmformat.provenance import described_anew
from rmmformat.remote import is_url, shown
from rmmformat.workers import finished, worker_errors

__all__ = [
    "CollectionTargets",
    "ConvertReport",
    "Progress",
    "TaskReport",
    "convert",
    "group_targets",
    "open_sources",
    "open_tasks",
    "parse_source",
]

#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
Source = str | os.PathLike[str]

#: Bytes of factors that are sent to workers before these have room for them.
_WAITING = 1 << 27

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """One task's part in a conversion; errors are relative Frobenius errors of its deltas.

    ``extraction_error`` is what cutting the change of whole weights to factors had left out before,
    against that change; None for a task whose source had factors.
    """

    name: str
    n_targets: int
    n_privates: int
    original_bytes: int
    mean_error: float
    median_error: float
    max_error: float
    worst_target: str
    ledger: tuple[LedgerLine, ...]
    extraction_error: float | None = None


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What a conversion made.

    Attributes
    ----------
    original_bytes
        Bytes of all factors as stored by the sources.
    factor_bytes
        Bytes that the file has for them: shared parts and the tasks' own.
    private_bytes
        Bytes of private tensors, identical ones counted once.
    file_bytes
        Length of the file.
    mean_error, median_error, max_error
        Over all deltas of all tasks.
    """

    path: str
    tasks: tuple[TaskReport, ...]
    n_targets: int
    original_bytes: int
    factor_bytes: int
    private_bytes: int
    file_bytes: int
    mean_error: float
    median_error: float
    max_error: float

    @property
    def fraction(self) -> float:
        """Factor bytes over the originals' factor bytes."""
        return self.factor_bytes / self.original_bytes if self.original_bytes else 0.0


def parse_source(text: Source) -> tuple[str | None, Path]:
    """Split ``NAME=SOURCE``; a path that exists as it stands is taken whole."""
    path = Path(text)
    if isinstance(text, str) and "=" in text and not path.exists():
        name, _, rest = text.partition("=")
        if name and "/" not in name:
            return name, Path(rest)
    return None, path


def open_sources(
    sources: Source | Iterable[Source] | Mapping[str, Source],
    *,
    kind: str | None = None,
    options: Options = DEFAULTS,
) -> list[SourceTask]:
    """Open sources as the tasks of one collection.

    Parameters
    ----------
    sources
        A path, several, ``NAME=PATH`` strings, or a mapping of names to paths; or URLs in their
        place, which are fetched (:mod:`rmmformat.remote.transfer`).
    kind
        The format of all; detected where None.
    options
        What is allowed of a source.

    Raises
    ------
    SourceError, UnsupportedError
        A source cannot be read, or a collection cannot hold it.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    if isinstance(sources, Mapping):
        given: list[tuple[str | None, Source]] = list(sources.items())
    else:
        given = [_named(source) for source in sources]
    if not any(is_url(place) for _, place in given):
        return collect([(n, Path(place)) for n, place in given], fmt=kind, options=options)
    from rmmformat.remote.transfer import open_fetched

    tasks: list[SourceTask] = []
    for name, place in given:
        if isinstance(place, str) and is_url(place):
            tasks += open_fetched(place, name=name, kind=kind, options=options)
        else:
            tasks += collect([(name, Path(place))], fmt=kind, options=options)
    check_task_names([(task.name, task.path) for task in tasks])
    return tasks


def _named(source: Source) -> tuple[str | None, Source]:
    """Split ``NAME=URL``; otherwise as :func:`parse_source`."""
    if isinstance(source, str):
        name, equals, rest = source.partition("=")
        if is_url(source):
            return None, source
        if equals and name and "/" not in name and is_url(rest):
            return name, rest
    return parse_source(source)


def convert(
    sources: Source | Iterable[Source] | Mapping[str, Source] | Sequence[SourceTask],
    path: Source,
    method: Method,
    *,
    kind: str | None = None,
    options: Options = DEFAULTS,
    overwrite: bool = False,
    allow_base_mismatch: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write many adapters as one file.

    Parameters
    ----------
    sources
        As :func:`open_sources` takes them, or tasks that are open already.
    path
        The file to write, or a URL of a store; it appears whole or not at all.
    method
        How factors are kept.
    kind, options
        For opening the sources.
    overwrite
        Replace an existing file.
    allow_base_mismatch
        Take tasks of different base models, and such as do not fit ``options.base``.
    executor
        Where targets are coded; here and one after the other by default.  The file is the same.
    progress
        Called as the work goes on.

    Raises
    ------
    SourceError, UnsupportedError, LossyConversionError, RmmError
        As the sources, the container and the method have it; nothing is left behind.
    """
    if isinstance(path, str) and is_url(path):
        from rmmformat.remote.transfer import result_file

        with result_file(path, overwrite=overwrite) as local:
            report = convert(
                sources, local, method, kind=kind, options=options,
                allow_base_mismatch=allow_base_mismatch, executor=executor, progress=progress,
            )  # fmt: skip
        return dataclasses.replace(report, path=shown(path))
    tasks = open_tasks(sources, kind, options, progress)
    base = common_base(tasks, options, allow_mismatch=allow_base_mismatch)
    by_target = group_targets(tasks)
    errors: dict[str, dict[str, float]] = {task.name: {} for task in tasks}
    with Writer(path, overwrite=overwrite) as writer:
        for task in tasks:
            writer.add_task(task.name)
        coded = code_targets(method, by_target, executor, progress)
        put_targets(writer, by_target, coded, errors, progress)
        put_privates(writer, tasks, progress)
        metadata = described_anew(tasks, base, method.describe(), errors)
        file_bytes = writer.finish(metadata)
        factor_bytes, private_bytes = writer.factor_bytes, writer.private_bytes
    every = [error for of_task in errors.values() for error in of_task.values()]
    summary = summarize(every or [0.0])
    reports = tuple(report_task(task, errors[task.name]) for task in tasks)
    return ConvertReport(
        os.fspath(path),
        tuple(sorted(reports, key=lambda report: report.name.encode())),
        len(by_target),
        sum(report.original_bytes for report in reports),
        factor_bytes,
        private_bytes,
        file_bytes,
        summary.mean,
        summary.median,
        summary.max,
    )


def put_targets(
    assembly: Assembly,
    by_target: Mapping[TargetKey, list[SourceTask]],
    coded_targets: Iterable[tuple[TargetKey, CodedTarget]],
    errors: Mapping[str, dict[str, float]],
    progress: Progress | None = None,
) -> None:
    """Add coded targets to what is to be written, and note their errors by task and target."""
    numbers = itertools.count(1)
    for key, coded in coded_targets:
        clusters = [assembly.add_frame(key, a, b) for a, b in coded.frames]
        for task, entry in zip(by_target[key], coded.entries, strict=True):
            if entry.cluster > coded.known_frames:
                number = clusters[entry.cluster - coded.known_frames - 1]
                entry = dataclasses.replace(entry, cluster=number)
            assembly.add_entry(task.name, key, entry)
            errors[task.name][key.name] = entry.error
        del coded, entry  # before the next target is coded
        if progress is not None:
            progress("targets", next(numbers), len(by_target))


def put_privates(
    assembly: Assembly, tasks: Sequence[SourceTask], progress: Progress | None = None
) -> None:
    """Add the private tensors of tasks to what is to be written."""
    for done, task in enumerate(tasks, 1):
        for name, info in task.privates.items():
            values = task.private_tensor(name)
            assembly.add_private(task.name, name, info, values)
            release([values])
        if progress is not None:
            progress("private tensors", done, len(tasks))


def open_tasks(
    sources: Any, kind: str | None, options: Options, progress: Progress | None = None
) -> list[SourceTask]:
    """Open sources as :func:`open_sources` does, or take tasks that are open already as they are.

    Those whose targets must be computed are computed here.
    """
    if isinstance(sources, Sequence) and sources and hasattr(sources[0], "factors"):
        tasks = list(sources)
    else:
        tasks = open_sources(sources, kind=kind, options=options)
    for task in tasks:
        if isinstance(task, Prepared):
            task.prepare(progress)
    return tasks


def group_targets(tasks: Sequence[SourceTask]) -> dict[TargetKey, list[SourceTask]]:
    """Tasks by target; targets of one name and different shapes stay apart."""
    grouped: dict[TargetKey, list[SourceTask]] = {}
    for task in sorted(tasks, key=lambda task: task.name.encode()):
        for name, info in task.targets.items():
            grouped.setdefault(TargetKey(name, info.shape), []).append(task)
    return dict(sorted(grouped.items(), key=lambda item: item[0].sort_key()))


def code_targets(
    method: Method,
    by_target: Mapping[TargetKey, list[SourceTask]],
    executor: Executor | None,
    progress: Progress | None = None,
) -> Iterator[tuple[TargetKey, CodedTarget]]:
    """Code every target as the method has it, in any order."""
    job = method.prepare(CollectionTargets(by_target, executor, progress))
    if hardly_works(method):
        executor = None
    code = code_target if executor is None else code_target_whole
    return map_targets(lambda key: functools.partial(code, job(key)), by_target, executor)


@dataclasses.dataclass(frozen=True)
class CollectionTargets:
    """All targets, for a method that looks at them before it codes any."""

    by_target: Mapping[TargetKey, list[SourceTask]]
    executor: Executor | None
    progress: Progress | None

    @property
    def keys(self) -> Sequence[TargetKey]:
        """The targets, in the order of the file."""
        return list(self.by_target)

    @property
    def original_bytes(self) -> int:
        """Bytes of all factors as stored by the sources."""
        return sum(
            task.targets[key.name].n_bytes
            for key, tasks in self.by_target.items()
            for task in tasks
        )

    def map(self, function: Callable[[Sequence[Factors]], Any]) -> Iterator[tuple[Hashable, Any]]:
        """Apply a pure function to every target's factors; results come in any order."""
        return self.map_each(lambda _key: function)

    def map_each(
        self, function_of: Callable[[TargetKey], Callable[[Sequence[Factors]], Any]]
    ) -> Iterator[tuple[Hashable, Any]]:
        """Apply to every target's factors the function that is given for its key."""
        results = map_targets(function_of, self.by_target, self.executor)
        for done, (key, result) in enumerate(results, 1):
            yield key, result
            if self.progress is not None:
                self.progress("survey", done, len(self.by_target))


def map_targets(
    function_of: Callable[[TargetKey], Callable[[Sequence[Factors]], T]],
    by_target: Mapping[TargetKey, list[SourceTask]],
    executor: Executor | None,
) -> Iterator[tuple[TargetKey, T]]:
    """Apply each target's function to its factors; with an executor a few are under way at once."""
    with one_thread():
        yield from _map_targets(function_of, by_target, executor)


def _map_targets(
    function_of: Callable[[TargetKey], Callable[[Sequence[Factors]], T]],
    by_target: Mapping[TargetKey, list[SourceTask]],
    executor: Executor | None,
) -> Iterator[tuple[TargetKey, T]]:
    if executor is None:
        for key, members in by_target.items():
            yield key, function_of(key)([task.factors(key.name) for task in members])
        return
    workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    running: dict[Future[T], TargetKey] = {}

    def n_bytes() -> int:
        return sum(t.targets[k.name].n_bytes for k in running.values() for t in by_target[k])

    def more() -> bool:
        # One for each worker, and what it goes on with, as long as that is not much.
        return len(running) < workers or (len(running) < 2 * workers and n_bytes() < _WAITING)

    waiting = iter(by_target)
    exhausted = False
    try:
        while running or not exhausted:
            while not exhausted and more():
                following = next(waiting, None)
                if following is None:
                    exhausted = True
                    break
                factors = [task.factors(following.name) for task in by_target[following]]
                with worker_errors():
                    future = executor.submit(with_one_thread, function_of(following), factors)
                running[future] = following
            for future in finished(executor, running):
                with worker_errors():
                    result = future.result()
                yield running.pop(future), result
    finally:
        for future in running:
            future.cancel()


def report_task(task: SourceTask, errors: Mapping[str, float]) -> TaskReport:
    """Give figures of one task from the error of each of its targets."""
    summary = summarize(errors.values()) if errors else None
    worst = max(errors, key=lambda name: errors[name]) if errors else ""
    return TaskReport(
        task.name,
        len(errors),
        len(task.privates),
        sum(info.n_bytes for info in task.targets.values()),
        summary.mean if summary else 0.0,
        summary.median if summary else 0.0,
        summary.max if summary else 0.0,
        worst,
        task.ledger,
        float(task.extraction()["error"]) if isinstance(task, Prepared) else None,
    )
