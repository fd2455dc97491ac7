"""Files that are written beside the one whose name they will take, and what a kill leaves of them.

Such a file is locked for as long as its writer lives, so one whose lock is free has lost its
writer: the next writer of the same target removes it.  It also is once it has its new name, so
whoever opens it by that name to change it waits until it is there for good.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from rmmformat.errors import RmmError
from rmmformat.format.disk import Disk
from rmmformat.format.lock import try_lock

__all__ = ["create_beside", "remove_stale"]

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
    for _ in range(_TRIES):
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}{_SUFFIX}")
        handle = disk.create(temporary)
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
            Path(entry.path)
            for entry in entries
            if ours.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        ]
        for stale in found:
            with contextlib.suppress(OSError):
                _remove_unlocked(stale, disk)


def _remove_unlocked(stale: Path, disk: Disk) -> None:
    if os.name == "nt":  # pragma: no cover  # what is open cannot be removed there
        disk.remove(stale)
        return
    handle = disk.open(stale)
    try:
        if try_lock(handle):
            disk.remove(stale)
    finally:
        os.close(handle)
