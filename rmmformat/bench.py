"""How fast a file loads here, against what this machine can do at all.

The limit is the machine's streaming copy, measured in the same run: reconstructing a task has to
read what the file keeps of it and to write its factors, and those bytes over its time are compared
with the bytes that a copy reads and writes in its time.  Blocks that stream are larger than caches;
a copy of blocks of the task's own size, which may stay in them, is measured beside.  The file is
read once before, so that it comes from the page cache.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from rmmformat.arena import ArenaPool
from rmmformat.collection import Collection, open_collection
from rmmformat.errors import NotFoundError
from rmmformat.format.reader import nearest

__all__ = ["BenchReport", "CopySpeed", "TaskSpeed", "bench", "copy_speed"]

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]

#: Repetitions of one measurement: at least, at most, and the seconds after which it is enough.
_LEAST, _MOST, _ENOUGH = 5, 200, 0.25
#: Bytes of a block that no cache holds.
_STREAM = 1 << 27
#: Tasks that are measured where nobody chooses.
_SOME = 8


@dataclasses.dataclass(frozen=True)
class CopySpeed:
    """Streaming copy between two blocks of memory.

    Attributes
    ----------
    n_bytes
        Size of a block.
    threads
        Those that were fastest together.
    seconds
        Median time of one copy.
    """

    n_bytes: int
    threads: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes read and written a second."""
        return 2 * self.n_bytes / self.seconds


@dataclasses.dataclass(frozen=True)
class TaskSpeed:
    """One task; times are medians in seconds.

    Attributes
    ----------
    read_bytes
        What the file keeps of it: its entries, and the frames that they refer to.
    written_bytes
        Its factors in memory.
    first
        Into memory that was never used: every page of it is a fault.
    switch
        Into memory that held another task.
    copy
        What as many bytes (read and written) take at the rate of the streaming copy.
    """

    name: str
    n_targets: int
    read_bytes: int
    written_bytes: int
    first: float
    switch: float
    copy: float

    @property
    def rate(self) -> float:
        """Bytes a second that a switch moves."""
        return (self.read_bytes + self.written_bytes) / self.switch

    @property
    def ratio(self) -> float:
        """Rate of a switch over that of the copy."""
        return self.copy / self.switch


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """A file on this machine.

    Attributes
    ----------
    open
        Median seconds from the path to an open collection.
    copy
        The streaming copy.
    same_size
        A copy of blocks of the size of the largest task.
    ratio
        Median of the tasks' ratios.
    """

    path: str
    file_bytes: int
    n_tasks: int
    dtype: str
    threads: int
    cpus: int
    open: float
    copy: CopySpeed
    same_size: CopySpeed
    tasks: tuple[TaskSpeed, ...]
    ratio: float


def bench(
    path: str | os.PathLike[str],
    *,
    tasks: Sequence[str] = (),
    dtype: str = "f32",
    threads: int = 0,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure opening a file and loading tasks of it.

    Parameters
    ----------
    path
        The file.
    tasks
        Globs of the tasks to load; by default some, evenly spread.
    dtype
        ``"f32"``, ``"f16"`` or ``"bf16"``: what factors come as.
    threads
        As :meth:`rmmformat.Collection.load` takes them.
    progress
        Called as the work goes on.

    Raises
    ------
    NotFoundError
        No task matches.
    FormatError, UnsupportedError, OSError
        The file cannot be read.
    """
    with open_collection(path) as collection:
        names = _chosen(collection, tasks)
        index = collection.index
        largest = max((collection.arena_bytes(name, dtype=dtype) for name in names), default=0)
        opening = _median(lambda: open_collection(path).close())
        copy, same_size = copy_speed(max(largest, _STREAM)), copy_speed(max(largest, 1 << 12))
        speeds = []
        for done, name in enumerate(names):
            if progress is not None:
                progress("tasks", done, len(names))
            payload = index.payload_of(index.find_task(name))
            n_read = sum({extent.offset: extent.length for extent in payload}.values())
            other = names[done - 1]
            speeds.append(_task(collection, name, other, n_read, copy, dtype, threads))
        return BenchReport(
            collection.path,
            index.file_length,
            len(index.task_names),
            dtype,
            threads,
            _cpus(),
            opening,
            copy,
            same_size,
            tuple(speeds),
            statistics.median(speed.ratio for speed in speeds) if speeds else 0.0,
        )


def _chosen(collection: Collection, globs: Sequence[str]) -> list[str]:
    names = collection.tasks
    if not globs:
        places = np.linspace(0, len(names) - 1, min(len(names), _SOME)).round().astype(int)
        return [names[place] for place in places]
    found: dict[str, None] = {}
    for pattern in globs:
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise NotFoundError(
                f"no task matches {pattern!r}", path=collection.path, hint=nearest(pattern, names)
            )
        found.update(dict.fromkeys(matching))
    return list(found)


def _task(
    collection: Collection,
    name: str,
    other: str,
    n_read: int,
    copy: CopySpeed,
    dtype: str,
    threads: int,
) -> TaskSpeed:
    n_written = collection.arena_bytes(name, dtype=dtype)
    size = max(n_written, collection.arena_bytes(other, dtype=dtype))
    memory = ArenaPool().lend(size)

    def load(task: str, out: Bytes) -> None:
        collection.load(task, dtype=dtype, out=out, threads=threads)

    n_targets = len(collection.load(name, dtype=dtype, out=memory, threads=threads))
    first = _median(
        lambda out: load(name, out), prepare=lambda: ArenaPool(keep=0).lend(max(n_written, 1))
    )

    def occupied() -> Bytes:
        load(other, memory)
        return memory

    switch = _median(lambda out: load(name, out), prepare=occupied)
    seconds = (n_read + n_written) / copy.rate
    return TaskSpeed(name, n_targets, n_read, n_written, first, switch, seconds)


def copy_speed(n_bytes: int) -> CopySpeed:
    """Measure copying blocks of memory, by one thread and by as many as there are processors.

    Parameters
    ----------
    n_bytes
        Size of a block; both blocks have been touched before.
    """
    source, target = np.ones(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)
    best = CopySpeed(n_bytes, 1, _median(lambda: np.copyto(target, source)))
    if (cpus := _cpus()) > 1:
        with ThreadPoolExecutor(cpus) as pool:
            pairs = list(
                zip(np.array_split(target, cpus), np.array_split(source, cpus), strict=True)
            )

            def together() -> None:
                for part in [pool.submit(np.copyto, *pair) for pair in pairs]:
                    part.result()

            shared = CopySpeed(n_bytes, cpus, _median(together))
        best = max(best, shared, key=lambda speed: speed.rate)
    return best


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _median(action: Callable[..., object], prepare: Callable[[], object] | None = None) -> float:
    """Median seconds of an action, called with what `prepare` gives, which is not measured."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _MOST:
        given = () if prepare is None else (prepare(),)
        start = time.perf_counter()
        action(*given)
        end = time.perf_counter()
        times.append(end - start)
        if len(times) >= _LEAST and end - begin > _ENOUGH:
            break
    return statistics.median(times)
