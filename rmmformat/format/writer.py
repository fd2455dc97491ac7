"""New files: deterministic bytes, first under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmmformat._native import crc32c
from rmmformat.errors import LossyConversionError, RmmError
from rmmformat.format import layout
from rmmformat.format.assembly import Assembly
from rmmformat.format.disk import DISK, Appender, Disk, refuse_device
from rmmformat.format.lock import LockedFile
from rmmformat.format.parts import EncodedArray, EntryData, FramePart, check_name
from rmmformat.format.pieces import Plan
from rmmformat.format.temporary import create_beside, remove_stale

__all__ = [
    "EncodedArray",
    "EntryData",
    "FramePart",
    "Writer",
    "check_name",
    "header_bytes",
    "put_in_place",
    "slot_bytes",
]


def slot_bytes(
    plan: Plan, table_crc: int, *, sequence: int, growth_limit: int | None = None
) -> bytes:
    """Bytes of a slot that puts a plan's index in force (section 5.2)."""
    slot = np.zeros((), layout.SLOT)
    slot["sequence"] = sequence
    slot["file_length"] = plan.end
    slot["growth_limit"] = plan.end if growth_limit is None else growth_limit
    slot["index_offset"], slot["index_length"] = plan.index_offset, plan.index_length
    slot["n_sections"], slot["section_table_crc"] = len(plan.sections), table_crc
    slot["section_record_size"] = layout.SECTION.itemsize
    slot["crc"] = crc32c(slot.tobytes()[:-4])
    return slot.tobytes()


def header_bytes(plan: Plan, table_crc: int) -> bytes:
    """Preamble and slots of a first write: sequence 1 in slot 0 (section 5)."""
    preamble = np.zeros((), layout.PREAMBLE)
    preamble["signature"] = layout.SIGNATURE
    preamble["major"], preamble["minor"] = layout.MAJOR, layout.MINOR
    preamble["crc"] = crc32c(preamble.tobytes()[:-4])
    header = bytearray(layout.HEADER_LENGTH)
    header[: layout.PREAMBLE.itemsize] = preamble.tobytes()
    first = layout.SLOT_OFFSETS[0]
    header[first : first + layout.SLOT.itemsize] = slot_bytes(plan, table_crc, sequence=1)
    return bytes(header)


def put_in_place(plan: Plan, path: Path, disk: Disk, *, mode: int | None = None) -> None:
    """Write a plan as a whole file beside `path`, sync it, and give it that name.

    Until the name is durable the new file is locked: a writer that comes to it by its name waits,
    so that nothing can be added to a file that a power failure could still take away.

    Parameters
    ----------
    mode
        Permissions; by default what new files get.
    """
    remove_stale(path, disk)
    temporary, handle = create_beside(path, disk)
    try:
        if mode is not None:
            with contextlib.suppress(OSError):  # some file systems have no permissions
                temporary.chmod(mode)
        out = Appender(disk, handle, layout.HEADER_LENGTH)
        table_crc = plan.write(out)
        disk.write(handle, header_bytes(plan, table_crc), 0)
        disk.sync(handle)
        if os.name == "nt":  # pragma: no cover  # an open file cannot be renamed there
            os.close(handle)
            handle = -1
        disk.replace(temporary, path)
        disk.sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove(temporary)
        raise
    finally:
        if handle >= 0:
            os.close(handle)


class Writer(Assembly):
    """Write one new ``.rmm`` file.

    Use as a context manager: leaving it by an exception (Ctrl-C included) removes what was
    written; :meth:`finish` puts the file in place.

    Parameters
    ----------
    path
        The file to make.
    overwrite
        Replace an existing file; otherwise one is refused before any work.

    Raises
    ------
    LossyConversionError
        The file exists and `overwrite` is false.
    RmmError
        A folder, a device, a pipe or a socket is there, or the folder does not exist.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, disk: Disk = DISK
    ) -> None:
        self.path = Path(path)
        self._disk = disk
        if self.path.is_dir():
            raise RmmError("is a folder, not a file", path=str(path), hint="Name a file.")
        refuse_device(self.path)
        if not self.path.parent.is_dir():
            raise RmmError(
                f"folder {self.path.parent} does not exist", path=str(path), hint="Create it first."
            )
        if self.path.exists() and not overwrite:
            raise LossyConversionError(
                "exists already", path=str(path), hint="Use --force to replace it."
            )
        super().__init__(self.path.parent)

    def finish(self, metadata: Mapping[str, Any]) -> int:
        """Gather, write, sync and rename; gives the length of the file in bytes.

        A file that is replaced is locked meanwhile, so that nobody adds to it in vain.

        Raises
        ------
        RmmError
            Another writer holds the file that is to be replaced.
        """
        plan = self.plan(layout.HEADER_LENGTH, metadata)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # absent, or not ours to lock
                stack.callback(LockedFile(self.path, self._disk).close)
            put_in_place(plan, self.path, self._disk)
        return plan.end
