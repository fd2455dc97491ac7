"""Memory that reconstructed tasks live in: aligned, and used again once nobody looks at it."""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref

import numpy as np

__all__ = ["Arena", "ArenaPool"]

#: From this size on, blocks ask for large pages where a system has them on request.
_LARGE = 4 << 20


class Arena(np.ndarray[tuple[int, ...], np.dtype[np.uint8]]):
    """A one-dimensional uint8 array that starts at a page; views of it keep it alive.

    Attributes
    ----------
    block_bytes
        Bytes of the block behind it, which may be larger; 0 for views and slices of an arena.
    """

    block_bytes: int = 0


class ArenaPool:
    """Lends arenas and takes them back when the last view is gone.

    A fresh buffer costs a page fault every 4 KiB, which for a large task is as long as the
    reconstruction itself; so blocks are kept and lent again.  At most `keep` free blocks are held.

    Thread-safe.
    """

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self._free: list[mmap.mmap] = []
        # Reentrant: the garbage collector may give a block back at any allocation, also in here.
        self._lock = threading.RLock()

    def lend(self, n_bytes: int) -> Arena:
        """Give an arena of `n_bytes` bytes, 64-byte aligned (it starts at a page)."""
        block = self._take(n_bytes)
        whole = np.frombuffer(block, np.uint8, n_bytes).view(Arena)
        whole.block_bytes = len(block)
        weakref.finalize(whole, self._give_back, block)
        return whole

    def _take(self, n_bytes: int) -> mmap.mmap:
        with self._lock:
            fitting = [block for block in self._free if n_bytes <= len(block) <= 4 * n_bytes + 4096]
            if fitting:
                block = min(fitting, key=len)
                self._free.remove(block)
                return block
        if not hasattr(mmap, "MAP_PRIVATE"):
            return mmap.mmap(-1, max(n_bytes, 1))
        # Private: what is shared with children never has large pages.
        block = mmap.mmap(-1, max(n_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if n_bytes >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
            # Fewer faults, and fewer addresses to look up: a quarter less time for a large task.
            with contextlib.suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        with self._lock:
            if len(self._free) < self._keep:
                self._free.append(block)
