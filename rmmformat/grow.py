"""Tasks that join a collection, tasks that leave it, and a file without gaps.

The file changes at once and whole (:mod:`rmmformat.format.growth`); tasks that stay keep every
byte.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from rmmformat.base_model import common_base
from rmmformat.coding import Exact, MaxError, Method, Plain, Published, Size
from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.errors import LossyConversionError, OptionError, UnsupportedError
from rmmformat.extend import Extension, KnownFrame, extend_target
from rmmformat.format.catalog import Frame, TargetKey, target_key
from rmmformat.format.growth import Growth, compact_file
from rmmformat.format.layout import VALUES_PER_BYTE
from rmmformat.format.lock import DEFAULT_WAIT
from rmmformat.format.restore import frame_arrays
from rmmformat.merge.rmm import Shared
from rmmformat.model import SourceTask
from rmmformat.pipeline import (
    Progress,
    Source,
    TaskReport,
    code_targets,
    group_targets,
    map_targets,
    open_tasks,
    put_privates,
    put_targets,
    report_task,
)
from rmmformat.provenance import described_further

__all__ = [
    "AddReport",
    "CompactReport",
    "RemoveReport",
    "add",
    "compact",
    "recorded_method",
    "remove",
]

Notice = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class AddReport:
    """What joined a collection.

    Attributes
    ----------
    tasks
        Those that joined, with their measured errors.
    replaced
        Names of those that they took the place of.
    method
        How they are kept.
    projected
        True if they have coefficients only, on a basis that was made without them.
    n_tasks
        Tasks in the file now.
    bytes_before, bytes_after
        Length of the file.
    """

    path: str
    tasks: tuple[TaskReport, ...]
    replaced: tuple[str, ...]
    method: dict[str, object]
    projected: bool
    n_tasks: int
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class RemoveReport:
    """What left a collection; `free_bytes` is what compacting would gain beyond the index."""

    path: str
    tasks: tuple[str, ...]
    n_tasks: int
    free_bytes: int
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class CompactReport:
    """Length of a file before and after it was written anew."""

    path: str
    bytes_before: int
    bytes_after: int


def add(
    path: Source,
    sources: Source | Iterable[Source] | Mapping[str, Source] | Sequence[SourceTask],
    method: Method | None = None,
    *,
    replace: bool = False,
    kind: str | None = None,
    options: Options = DEFAULTS,
    allow_base_mismatch: bool = False,
    wait: float = DEFAULT_WAIT,
    notice: Notice | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> AddReport:
    """Add tasks to a file.

    Parameters
    ----------
    path
        The file; it has all of them or none.
    sources, kind, options, allow_base_mismatch, executor, progress
        As for :func:`~rmmformat.pipeline.convert`.
    method
        How they are kept; by default as the file says of itself.  Of a merged collection (RMM as
        published) that is coefficients on the basis that is there.
    replace
        Put tasks in the place of those of their name; otherwise such are refused.
    wait
        Seconds to wait for another writer.
    notice
        Called with a sentence if it has to wait.

    Raises
    ------
    LossyConversionError
        A task of that name is there already.
    RmmError
        Another base model, or another writer.
    OptionError
        The file does not say how its tasks are kept.
    SourceError, FormatError, UnsupportedError, OSError
        The file stays as it is.
    """
    tasks = open_tasks(sources, kind, options, progress)
    with Growth(path, wait=wait, notice=notice) as growth:
        metadata = growth.catalog.metadata or {}
        base = common_base(
            tasks,
            options,
            allow_mismatch=allow_base_mismatch,
            of_file=metadata.get("base_model", {}),
        )
        there = [task.name for task in tasks if task.name in growth.catalog.tasks]
        if there and not replace:
            raise LossyConversionError(
                f"has a task {there[0]!r} already",
                path=os.fspath(path),
                hint="Use --replace, or give the new one another name (NAME=SOURCE).",
            )
        own = recorded_method(metadata) if method is None else None
        chosen = own or method
        assert chosen is not None  # one of them is  # noqa: S101
        for name in there:
            growth.drop(name)
        by_target = group_targets(tasks)
        errors: dict[str, dict[str, float]] = {task.name: {} for task in tasks}
        for task in tasks:
            growth.add_task(task.name)
        if isinstance(own, Published):
            extension = _Extensions(growth, own)
            coded = map_targets(
                lambda key: functools.partial(extend_target, extension(key)), by_target, executor
            )
        else:
            extension = None
            coded = code_targets(chosen, by_target, executor, progress)
        put_targets(growth, by_target, coded, errors, progress)
        put_privates(growth, tasks, progress)
        described = chosen.describe()
        other = described if described != metadata.get("method") else None
        after = growth.finish(
            described_further(metadata, tasks, base, errors, dropped=there, method=other)
        )
        reports = (report_task(task, errors[task.name]) for task in tasks)
        return AddReport(
            os.fspath(path),
            tuple(sorted(reports, key=lambda report: report.name.encode())),
            tuple(there),
            described,
            extension is not None and extension.used,
            len(growth.names),
            growth.index.file_length,
            after,
        )


def remove(
    path: Source,
    names: Iterable[str],
    *,
    dry_run: bool = False,
    wait: float = DEFAULT_WAIT,
    notice: Notice | None = None,
) -> RemoveReport:
    """Leave tasks out of a file; their bytes stay, unused, until it is compacted.

    Parameters
    ----------
    path
        The file; all of them leave, or none.
    names
        Tasks.
    dry_run
        Only report what would happen.
    wait, notice
        As for :func:`add`.

    Raises
    ------
    NotFoundError
        No such task; the hint names the nearest.
    RmmError, FormatError, UnsupportedError, OSError
        As for :func:`add`.
    """
    unique = tuple(dict.fromkeys(names))
    with Growth(path, wait=wait, notice=notice) as growth:
        for name in unique:
            growth.drop(name)
        metadata = growth.catalog.metadata
        if metadata is not None:
            metadata = described_further(metadata, [], None, {}, dropped=unique)
        plan = growth.preview(metadata)
        if not dry_run:
            growth.finish(metadata)
        return RemoveReport(
            os.fspath(path),
            unique,
            len(growth.names),
            sum(extent.length for extent in plan.catalog.free),
            growth.index.file_length,
            plan.end,
        )


def compact(
    path: Source,
    *,
    dry_run: bool = False,
    wait: float = DEFAULT_WAIT,
    notice: Notice | None = None,
) -> CompactReport:
    """Write a file anew without what nothing uses, and put it in the old one's place.

    Whoever has the file open keeps the old one.
    """
    before, after = compact_file(path, wait=wait, notice=notice, dry_run=dry_run)
    return CompactReport(os.fspath(path), before, after)


def recorded_method(metadata: Mapping[str, Any]) -> Method:
    """Find the method that a file was made with, as its metadata has it.

    Raises
    ------
    OptionError
        It does not say, or names one that is not known.
    """
    described = dict(metadata.get("method", {}))
    name = described.pop("name", None)
    made: dict[object, Callable[..., Method]] = {
        "rmm": Published,
        "plain": Plain,
        "exact": Exact,
        "planned": lambda **given: MaxError(**given) if "max_error" in given else Size(**given),
    }
    try:
        return made[name](**described)
    except (KeyError, TypeError):
        raise OptionError(
            f"the file does not say how its tasks are kept (method {name!r})",
            hint="Choose: --max-error E, --size FRACTION, --exact, or --encoding NAME.",
        ) from None


class _Extensions:
    """What extending each target needs, read from the file when its turn comes."""

    def __init__(self, growth: Growth, method: Published) -> None:
        self._growth, self._method = growth, method
        targets = growth.index.table("TARG")
        self._targets = {target_key(growth.index, record): i for i, record in enumerate(targets)}
        self.used = False

    def __call__(self, key: TargetKey) -> Extension:
        frames = self._growth.catalog.frames.get(key, [])
        known = tuple(
            found
            for number, frame in enumerate(frames, 1)
            if (found := self._decoded(number, frame, key)) is not None
        )
        self.used = self.used or bool(known)
        return Extension(self._method, known, len(frames))

    def _decoded(self, number: int, frame: Frame, key: TargetKey) -> KnownFrame | None:
        a, b = frame.a, frame.b
        if a is None or b is None or not a.n_components or not b.n_components:
            return None  # a mean alone is what equal tasks share, not what others can be built on
        record = self._growth.index.frame_of({"cluster": number}, self._targets[key])
        self._check_size(key, record)
        arrays = frame_arrays(self._growth.index, record)
        shared = []
        for part, mean, basis, length in (
            (a, arrays[0], arrays[1], key.shape.n_in),
            (b, arrays[2], arrays[3], key.shape.n_out),
        ):
            assert basis is not None  # there are components  # noqa: S101
            rows = 1 if part.row_mixing else part.rank
            grouped = basis.all().reshape(part.n_components, rows, length)
            whole = None if mean is None else mean.all()
            shared.append(Shared(whole, grouped, part.group, part.row_mixing))
        return KnownFrame(number, min(a.rank, b.rank), shared[0], shared[1])

    def _check_size(self, key: TargetKey, record: Any) -> None:
        """Refuse a frame that would unfold to more than a task may (RMM-062).

        Rows that no task uses may be as many as a table can count, in next to no bytes.
        """
        index = self._growth.index
        n_values = sum(
            length * sum(count for _, count in index.layout_runs(layout_id))
            for layout_id, length in index.frame_arrays(record)
        )
        if n_values > VALUES_PER_BYTE * index.file_length:
            raise UnsupportedError(
                f"the frame of {key.name!r} has {n_values} values, more than {VALUES_PER_BYTE} for "
                f"each of the file's {index.file_length} bytes",
                path=self._growth.path,
                hint="Say how the new tasks are kept: --max-error E, --size FRACTION, --exact, "
                "or --encoding NAME.",
            )
