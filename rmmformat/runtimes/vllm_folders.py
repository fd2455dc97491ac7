"""A folder for what another program reads by path: in memory, of this process, gone with it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path

__all__ = ["Scratch", "memory_folder"]

_PREFIX = "rmm-vllm-"
_LOCK = ".lock"


def memory_folder() -> Path:
    """Where files lie in memory, if the system has such a place; otherwise where scratch goes."""
    shm = Path("/dev/shm")  # noqa: S108  # only a folder made in it, readable by its owner, is used
    if shm.is_dir() and os.access(shm, os.W_OK):
        return shm
    return Path(tempfile.gettempdir())


class Scratch:
    """A new folder, readable by its owner alone, that is removed with the process that made it.

    A process that is killed leaves its folder; the next one to make a scratch folder in the same
    place removes it.  A lock on a file inside tells which are in use: it goes with the last process
    that has it, children of a fork included.

    Parameters
    ----------
    place
        The folder to make it in; by default :func:`memory_folder`.

    Raises
    ------
    OSError
        It cannot be made.
    """

    def __init__(self, place: Path | None = None) -> None:
        place = memory_folder() if place is None else place
        _sweep(place)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        self._count = 0
        handle = _locked(self.path)
        self._finish = weakref.finalize(self, _remove, self.path, os.getpid(), handle)

    def new_path(self) -> Path:
        """A path inside that is not there yet: numbered, so that no foreign name is part of it."""
        self._count += 1
        return self.path / f"{self._count:06d}"

    def close(self) -> None:
        """Remove the folder; closing twice is fine."""
        self._finish()


def _locked(folder: Path) -> int | None:
    """Lock the folder's file; it appears under its name only once it is locked."""
    try:
        import fcntl
    except ImportError:  # not on this system: folders of killed processes stay
        return None
    new = folder / f"{_LOCK}.new"
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(folder / _LOCK)
    return handle


def _remove(folder: Path, owner: int, handle: int | None) -> None:
    if os.getpid() == owner:  # a forked child leaves its parent's folder alone
        shutil.rmtree(folder, ignore_errors=True)
    if handle is not None:
        with contextlib.suppress(OSError):
            os.close(handle)


def _sweep(place: Path) -> None:
    """Remove folders of this user's that no process has locked."""
    try:
        import fcntl
    except ImportError:
        return
    for folder in place.iterdir():
        if not re.fullmatch(re.escape(_PREFIX) + r"\w+", folder.name) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
