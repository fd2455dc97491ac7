"""A file in memory that has a path: for runtimes that take nothing else."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["MemoryFile"]


class MemoryFile:
    """A file of fixed size, mapped writable.

    On Linux it is anonymous memory that ``/proc`` gives a path to; elsewhere, or where there is no
    ``/proc``, a temporary file.  Either is gone when the object is, or when the process ends.

    Parameters
    ----------
    n_bytes
        Its size.

    Attributes
    ----------
    path
        For this process.
    shared_path
        For other processes of the same user, while this one lives.
    bytes
        (n_bytes,) uint8, starts at a page.
    """

    def __init__(self, n_bytes: int) -> None:
        descriptor = _anonymous()
        if descriptor is None:
            descriptor, self.path = tempfile.mkstemp(prefix="rmm-", suffix=".gguf")
            self.shared_path = self.path
            self._close = weakref.finalize(self, _close, descriptor, self.path)
        else:
            self.path = f"/proc/self/fd/{descriptor}"
            self.shared_path = f"/proc/{os.getpid()}/fd/{descriptor}"
            self._close = weakref.finalize(self, _close, descriptor, None)
        os.ftruncate(descriptor, n_bytes)
        mapping = mmap.mmap(descriptor, n_bytes)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)

    def close(self) -> None:
        """Give the path up; views of the bytes stay valid."""
        self._close()


def _anonymous() -> int | None:
    """Open anonymous memory, if this system has it and a path to it."""
    create = getattr(os, "memfd_create", None)
    if create is None:
        return None
    try:
        descriptor: int = create("rmm", os.MFD_CLOEXEC)
    except OSError:
        return None
    if not Path(f"/proc/self/fd/{descriptor}").exists():
        os.close(descriptor)
        return None
    return descriptor


def _close(descriptor: int, path: str | None) -> None:
    os.close(descriptor)
    if path is not None:
        with contextlib.suppress(OSError):
            Path(path).unlink()
