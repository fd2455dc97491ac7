"""One writer at a time: an exclusive lock on the file itself.  Readers take none.

On POSIX systems this is ``flock``, which belongs to the open file: the record locks of ``lockf``
would be lost as soon as the process closed *any* descriptor of the file, as opening it for reading
does.  On Windows it is a byte far behind the end, so that readers are not in its way.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from rmmformat.errors import RmmError
from rmmformat.format.disk import Disk

__all__ = ["DEFAULT_WAIT", "LockedFile", "try_lock"]

#: Seconds that a second writer waits for the first one.
DEFAULT_WAIT = 30.0
_PAUSE = 0.05
_BYTE = 1 << 62  # what is locked on Windows

_open: weakref.WeakSet[LockedFile] = weakref.WeakSet()


class LockedFile:
    """A file that is open for writing and locked against other writers.

    Parameters
    ----------
    path
        An existing file; a symbolic link is followed.
    wait
        Seconds to wait for another writer.
    notice
        Called once with a sentence if it has to wait.

    Raises
    ------
    RmmError
        Another writer still holds the file after `wait`.
    OSError
        The file cannot be opened for writing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        disk: Disk,
        *,
        wait: float = DEFAULT_WAIT,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.handle = -1
        deadline = time.monotonic() + wait
        told = False
        while not self._try(disk):
            if time.monotonic() >= deadline:
                raise RmmError(
                    f"another writer holds the file, waited {wait:g} s",
                    path=os.fspath(path),
                    hint="Wait for it to finish, or allow more time (--wait SECONDS).",
                )
            if not told and notice is not None:
                notice(f"{os.fspath(path)}: another writer is at work; waiting up to {wait:g} s")
            told = True
            time.sleep(_PAUSE)
        _open.add(self)

    def _try(self, disk: Disk) -> bool:
        self.handle = disk.open(self.path)
        locked = False
        try:
            # Between opening and locking the file can have been replaced by a compacted one: then
            # the lock is on a file that is gone, and worth nothing.
            locked = try_lock(self.handle) and self.is_current()
        finally:
            if not locked:
                self._drop()
        return locked

    def is_current(self) -> bool:
        """True while the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(self.handle), self.path.stat())
        except FileNotFoundError:
            return False

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes; fewer only at the end of the file."""
        os.lseek(self.handle, offset, os.SEEK_SET)
        parts = []
        while length:
            part = os.read(self.handle, min(length, 1 << 22))
            if not part:
                break
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    @property
    def size(self) -> int:
        """Bytes of the file now."""
        return os.fstat(self.handle).st_size

    def close(self) -> None:
        """Unlock and close; closing twice is fine."""
        if self.handle >= 0:
            unlock(self.handle)
            self._drop()

    def _drop(self) -> None:
        handle, self.handle = self.handle, -1
        os.close(handle)


def _in_child() -> None:
    # A child process would share the lock, and keep it if its parent were killed.
    for file in list(_open):
        with contextlib.suppress(OSError):
            if file.handle >= 0:
                os.close(file.handle)
        file.handle = -1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def try_lock(handle: int) -> bool:
        """Lock if no one else has; False otherwise."""
        os.lseek(handle, _BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def unlock(handle: int) -> None:
        """Give a lock back."""
        os.lseek(handle, _BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def try_lock(handle: int) -> bool:
        """Lock if no one else has; False otherwise."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(handle: int) -> None:
        """Give a lock back."""
        fcntl.flock(handle, fcntl.LOCK_UN)
