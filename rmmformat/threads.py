"""Work of numpy and of native code on several threads: both let the interpreter go meanwhile."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["each", "n_threads"]

T = TypeVar("T")
R = TypeVar("R")

_MOST = 16  # memory is the limit before that
_SMALL = 1 << 16  # bytes of an item for which handing it over costs more than it brings


def n_threads() -> int:
    """Threads that work at once: one for each processor that this process may use."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        usable = os.cpu_count() or 1
    return min(usable, _MOST)


def each(
    function: Callable[[T], R], items: Sequence[T], item_bytes: int | None = None
) -> Iterator[R]:
    """Apply a function to every item as ``map`` does, a few items at a time; results in order.

    No more results than twice the threads are waiting for whoever takes them.  Items of few bytes
    are done one after the other, here.
    """
    count = min(n_threads(), len(items))
    if count < 2 or (item_bytes is not None and item_bytes < _SMALL):
        yield from map(function, items)
        return
    waiting: collections.deque[Future[R]] = collections.deque()
    pool = ThreadPoolExecutor(count)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
