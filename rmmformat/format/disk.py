"""What a writer asks of the operating system, in one place, so that tests can make any of it fail.

Everything that changes a file goes through :class:`Disk`: what is written where, what is synced
when.  A test puts a recorder or a saboteur in its stead.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path

from rmmformat.errors import RmmError

__all__ = ["DISK", "Appender", "Disk", "refuse_device"]

_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class Disk:
    """Calls of the operating system that change files; handles are file descriptors."""

    def open(self, path: Path) -> int:
        """Open an existing file for reading and writing."""
        # O_NONBLOCK: opening a pipe that nobody reads must not hang.
        handle = os.open(path, os.O_RDWR | _BINARY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(22, "Not a regular file", str(path))
        return handle

    def create(self, path: Path) -> int:
        """Make a file that must not exist."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)

    def write(self, handle: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at an offset."""
        view = memoryview(data)
        os.lseek(handle, offset, os.SEEK_SET)
        while view:
            view = view[os.write(handle, view) :]

    def sync(self, handle: int) -> None:
        """Return when what was written is on the device, not only on its way there."""
        if sys.platform == "darwin":  # pragma: no cover  # fsync stops at the drive's cache there
            import fcntl

            with contextlib.suppress(OSError):  # not every file system has it
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
                return
        os.fsync(handle)

    def truncate(self, handle: int, length: int) -> None:
        """Cut a file off."""
        os.ftruncate(handle, length)

    def replace(self, source: Path, target: Path) -> None:
        """Rename over what is there."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def sync_folder(self, folder: Path) -> None:
        """Make a rename durable; a file system that cannot sync folders is left alone."""
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


DISK = Disk()


def refuse_device(path: Path) -> None:
    """Refuse to put a file in the place of a device, a pipe or a socket, which would be lost.

    Raises
    ------
    RmmError
        Such a thing is there.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
            raise RmmError("is not a regular file", path=str(path), hint="Name a file.")


class Appender:
    """Write forward from an offset, in large pieces; gaps become zeros."""

    _CHUNK = 1 << 20

    def __init__(self, disk: Disk, handle: int, start: int) -> None:
        self._disk, self._handle = disk, handle
        self._flushed = start
        self._buffer = bytearray()

    @property
    def position(self) -> int:
        """Offset of the next byte."""
        return self._flushed + len(self._buffer)

    def write(self, data: bytes | memoryview) -> None:
        """Write at the current position."""
        self._buffer += data
        if len(self._buffer) >= self._CHUNK:
            self.flush()

    def pad_to(self, offset: int) -> None:
        """Write zeros up to an offset."""
        self.write(bytes(offset - self.position))

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if self._buffer:
            self._disk.write(self._handle, self._buffer, self._flushed)
            self._flushed += len(self._buffer)
            self._buffer = bytearray()
