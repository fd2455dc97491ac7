"""Tasks of one collection that stay in memory: for servers, where a few are wanted often."""

from __future__ import annotations

import collections
import dataclasses
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np

from rmmformat.ahead import Ahead
from rmmformat.arena import Arena
from rmmformat.collection import Collection, LoadedTask
from rmmformat.errors import OptionError

__all__ = ["CacheStats", "TaskCache"]

DEFAULT_BUDGET = 256 << 20


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """What a cache has done since it was made.

    Attributes
    ----------
    loads
        Tasks reconstructed.
    hits
        Answers that needed no reconstruction of their own: the task was in memory, or another
        thread was loading it already.
    evictions
        Tasks that made room for others.
    n_tasks, n_bytes
        Tasks that are kept now, and the memory that they take.
    """

    loads: int
    hits: int
    evictions: int
    n_tasks: int
    n_bytes: int


class TaskCache:
    """Keep the tasks used last, as many as fit a budget.

    Thread-safe: one open collection serves any number of threads.  Threads that want the same task
    at once wait for one reconstruction; different tasks are reconstructed side by side.  The
    factors handed out are read-only, as several threads may hold them; they stay valid when their
    task is evicted, and the memory is used again once nobody holds a view of it.

    Parameters
    ----------
    collection
        An open collection; closing it is the caller's.
    budget_bytes
        Memory for the tasks that are kept.  A task larger than this is served and not kept, and
        costs no other its place.  What callers still hold of evicted tasks comes on top.
    dtype
        ``"f32"``, ``"f16"`` or ``"bf16"``: what the factors come as.
    threads
        How many to use for one reconstruction.  One by default: those of several threads run side
        by side anyway.  0 chooses by the size of the task.

    Raises
    ------
    OptionError
        The budget is negative.

    Examples
    --------
    >>> cache = TaskCache(rmmformat.open("skills.rmm"), 64 << 20)  # doctest: +SKIP
    >>> cache.get("sst2")["encoder.layer.0.attention.self.query"].A.shape  # doctest: +SKIP
    (16, 384)
    """

    def __init__(
        self,
        collection: Collection,
        budget_bytes: int = DEFAULT_BUDGET,
        dtype: str | np.dtype[Any] | type[np.generic] = "f32",
        *,
        threads: int = 1,
    ) -> None:
        if budget_bytes < 0:
            raise OptionError(f"a budget is at least 0 bytes, got {budget_bytes}")
        self.collection = collection
        self.budget_bytes = budget_bytes
        self.dtype = dtype
        self._threads = threads
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, LoadedTask] = collections.OrderedDict()
        self._loading: dict[str, Future[LoadedTask | None]] = {}
        self._n_bytes = self._loads = self._hits = self._evictions = 0
        self._ahead = Ahead()

    def __repr__(self) -> str:
        now = self.stats
        return f"<TaskCache: {now.n_tasks} tasks, {now.n_bytes} of {self.budget_bytes} bytes>"

    @property
    def stats(self) -> CacheStats:
        """What happened so far, as of one moment."""
        with self._lock:
            return CacheStats(
                self._loads, self._hits, self._evictions, len(self._kept), self._n_bytes
            )

    def get(self, task: str) -> LoadedTask:
        """Give a task, reconstructed now or before.

        Returns
        -------
        LoadedTask
            As :meth:`Collection.load` gives it, with read-only factors.

        Raises
        ------
        NotFoundError, FormatError, UnsupportedError, ShapeError, RmmError
            As :meth:`Collection.load`.  Every thread that waits for the task gets the error; it is
            not kept, so that the next call tries again.
        """
        self._ahead.call_off(task)
        return self._get(task)

    def prefetch(self, task: str) -> None:
        """Reconstruct a task on a thread, so that :meth:`get` finds it, or waits for less.

        For a task that is expected next, while the current one is evaluated.  It counts as used
        then, and is kept like any other: what the budget has no room for is not worth it.  If it
        cannot be reconstructed, :meth:`get` says so.
        """
        with self._lock:
            if task in self._kept or task in self._loading:
                return
        self._ahead.begin(task, lambda: self._get(task))

    def _get(self, task: str) -> LoadedTask:
        while True:
            with self._lock:
                kept = self._kept.get(task)
                if kept is not None:
                    self._kept.move_to_end(task)
                    self._hits += 1
                    return kept
                flight = self._loading.get(task)
                if flight is None:
                    mine = self._loading[task] = Future()
            if flight is None:
                return self._load(task, mine)
            loaded = flight.result()
            if loaded is not None:
                with self._lock:
                    self._hits += 1
                return loaded
            # The loading thread was interrupted, which is its own affair: load here.

    def drop(self, task: str) -> bool:
        """Keep a task no longer; say whether it was kept.

        One that is being loaded at this moment is served to those who wait, and not kept.
        """
        with self._lock:
            self._loading.pop(task, None)
            kept = self._kept.pop(task, None)
            if kept is not None:
                self._n_bytes -= _n_bytes(kept)
        return kept is not None

    def clear(self) -> None:
        """Keep none of the tasks; the counts of :attr:`stats` go on."""
        with self._lock:
            self._loading.clear()
            kept, self._kept = self._kept, collections.OrderedDict()
            self._n_bytes = 0
        kept.clear()

    def _load(self, task: str, flight: Future[LoadedTask | None]) -> LoadedTask:
        try:
            loaded = _read_only(self.collection.load(task, dtype=self.dtype, threads=self._threads))
        except BaseException as error:
            with self._lock:
                self._land(task, flight)
            if isinstance(error, Exception):
                flight.set_exception(error)
            else:
                flight.set_result(None)
            raise
        evicted = []  # given up outside the lock: that is where memory goes back
        with self._lock:
            self._loads += 1
            size = _n_bytes(loaded)
            if self._land(task, flight) and size <= self.budget_bytes:
                self._kept[task] = loaded
                self._n_bytes += size
            while self._n_bytes > self.budget_bytes:
                _, oldest = self._kept.popitem(last=False)
                evicted.append(oldest)
                self._n_bytes -= _n_bytes(oldest)
                self._evictions += 1
        flight.set_result(loaded)
        return loaded

    def _land(self, task: str, flight: Future[LoadedTask | None]) -> bool:
        """End a load; say whether its task is still wanted here (not dropped meanwhile)."""
        wanted = self._loading.get(task) is flight
        if wanted:
            del self._loading[task]
        return wanted


def _n_bytes(task: LoadedTask) -> int:
    # A pool may lend a block larger than was asked for, and the block is what is taken.
    arena = task.arena
    return arena.block_bytes if isinstance(arena, Arena) else arena.nbytes


def _read_only(task: LoadedTask) -> LoadedTask:
    for factors in task.values():
        factors.A.flags.writeable = False
        factors.B.flags.writeable = False
    return task
