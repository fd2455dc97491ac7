"""Files and folders that are made beside the one whose name they will take, and what a kill leaves.

Such a file is locked for as long as its writer lives, so one whose lock is free has lost its
writer: the next writer of the same target removes it.  It also is once it has its new name, so
whoever opens it by that name to change it waits until it is there for good.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from rmmformat.errors import RmmError
from rmmformat.format.disk import Disk
from rmmformat.format.lock import try_lock

__all__ = ["create_beside", "create_folder_beside", "remove_stale"]

_SUFFIX = ".rmm.tmp"
_TRIES = 100


def _prefix(path: Path) -> str:
    # Not the whole name: it may already be as long as a file system allows.
    return f".{path.name[:40]}."


def create_beside(path: Path, disk: Disk) -> tuple[Path, int]:
    """Make an empty, locked file in the folder of `path`; gives its path and handle.

    Raises
    ------
    OSError
        The folder cannot be written to.
    """
    return _create(path, disk.create)


def create_folder_beside(path: Path) -> tuple[Path, int | None]:
    """Make an empty, locked folder beside `path`; gives its path, and the handle to close.

    Raises
    ------
    OSError
        The folder of `path` cannot be written to.
    """

    def create(temporary: Path) -> int:
        temporary.mkdir()
        return os.open(temporary, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    if os.name == "nt":  # pragma: no cover  # folders have no locks there, and nobody cleans up
        temporary = _sibling(path)
        temporary.mkdir()
        return temporary, None
    return _create(path, create)


def _sibling(path: Path) -> Path:
    return path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}{_SUFFIX}")


def _create(path: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    for _ in range(_TRIES):
        temporary = _sibling(path)
        try:
            handle = create(temporary)
        except FileNotFoundError:
            if path.parent.is_dir():  # a folder that was taken for a stale one before it was opened
                continue
            raise
        try:
            # Between making and locking it, another writer can have taken it for a stale one.
            if try_lock(handle) and os.path.samestat(os.fstat(handle), temporary.stat()):
                return temporary, handle
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks: nobody cleans up there either
            return temporary, handle
        os.close(handle)
    raise RmmError("other writers are in the way", path=str(path), hint="Try again.")


def remove_stale(path: Path, disk: Disk) -> None:
    """Remove what killed writers of `path` have left beside it; what cannot be removed stays."""
    ours = re.compile(re.escape(_prefix(path)) + "[0-9a-f]{16}" + re.escape(_SUFFIX))
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        found = [
            (Path(entry.path), entry.is_dir(follow_symlinks=False))
            for entry in entries
            if ours.fullmatch(entry.name) and not entry.is_symlink()
        ]
        for stale, is_folder in found:
            with contextlib.suppress(OSError):
                _remove_unlocked(stale, disk, is_folder=is_folder)


def _remove_unlocked(stale: Path, disk: Disk, *, is_folder: bool) -> None:
    if os.name == "nt":  # pragma: no cover  # what is open cannot be removed there
        if not is_folder:
            disk.remove(stale)
        return
    handle = os.open(stale, os.O_RDONLY) if is_folder else disk.open(stale)
    try:
        if not try_lock(handle):
            return
        if is_folder:
            shutil.rmtree(stale, ignore_errors=True)
        else:
            disk.remove(stale)
    finally:
        os.close(handle)
