"""Work on a thread, before somebody asks for what it makes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable

__all__ = ["Ahead"]


class Ahead:
    """One thread that does what is expected to be wanted next.

    An error of the work goes no further: whoever then asks for the result finds that it is not
    there, does the work again, and is told.

    Thread-safe.  The thread starts with the first work, and ends with the object.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._work: dict[str, concurrent.futures.Future[None]] = {}

    def begin(self, key: str, work: Callable[[], object]) -> None:
        """Have some work done, unless work of that key is waiting or under way."""
        with self._lock:
            if key in self._work:
                return
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(1, "rmm-ahead")
            self._work[key] = self._pool.submit(self._do, key, work)

    def _do(self, key: str, work: Callable[[], object]) -> None:
        try:
            with contextlib.suppress(Exception):
                work()
        finally:
            with self._lock:
                self._work.pop(key, None)

    def call_off(self, key: str) -> None:
        """Forget work that has not begun, so that its result need not be waited for."""
        if key not in self._work:
            return
        with self._lock:
            future = self._work.get(key)
            if future is not None and future.cancel():
                del self._work[key]

    def settle(self, key: str) -> None:
        """Call work off, or if it has begun wait for its end."""
        self.call_off(key)
        future = self._work.get(key)
        if future is not None:
            concurrent.futures.wait([future])

    def close(self) -> None:
        """Call all off; what has begun goes on to its end."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._work.clear()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
