"""One thread of linear algebra at a time.

A target is hundreds of products and decompositions of matrices with a few dozen columns.  For
those a threaded BLAS is slower than one thread, on a busy machine by a factor of ten (measured:
1.2 s against 3.5 to 35 s for one conversion on two cores), and its sums may depend on how many
threads there are.  Parallel work is done over targets instead.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

__all__ = ["one_thread", "with_one_thread"]

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _controller() -> ThreadpoolController:
    import numpy as np

    np.linalg.eigvalsh(np.eye(1))  # finding libraries needs them to be loaded
    return ThreadpoolController()


class _Users:
    """Counts who wants one thread: the first sets the limit, the last one takes it away."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.limit: Any = None


_USERS = _Users()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS to one thread within the block, in any number of threads at once.

    Blocks of helper threads should lie within one of the thread that waits for them: OpenBLAS
    (0.3.31, seen on Linux) does not take a larger number from another thread than the one that set
    the smaller.
    """
    with _USERS.lock:
        if _USERS.count == 0:
            _USERS.limit = _controller().limit(limits=1, user_api="blas")
            _USERS.limit.__enter__()
        _USERS.count += 1
    try:
        yield
    finally:
        with _USERS.lock:
            _USERS.count -= 1
            if _USERS.count == 0:
                _USERS.limit.__exit__(None, None, None)
                _USERS.limit = None


def with_one_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function with BLAS limited to one thread; goes over to other processes by name."""
    with one_thread():
        return function(*args, **kwargs)
