"""A file that grows in place, and one that is written anew without its gaps (specification, 5.3).

At every instant the file on the device is a valid one, with the old or with the new collection,
whatever is killed and whenever the power fails:

1. The inactive slot announces that there will be bytes behind the collection; it is synced before
   there are any.
2. What is new is written behind the collection, index last, and synced.  Nothing refers to it yet.
3. The other slot puts the new index in force.

Only the two slots are ever overwritten.  Each is in a sector of its own, and while one is being
written the other holds, so a torn one does no harm.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any

from rmmformat._native import crc32c
from rmmformat.errors import (
    FormatError,
    InternalError,
    LossyConversionError,
    NotFoundError,
    RmmError,
    UnsupportedError,
)
from rmmformat.format import layout
from rmmformat.format.assembly import Assembly, extents_of
from rmmformat.format.catalog import Catalog, Extent, decode_catalog
from rmmformat.format.disk import DISK, Appender, Disk
from rmmformat.format.lock import DEFAULT_WAIT, LockedFile
from rmmformat.format.pieces import Plan
from rmmformat.format.reader import Index, nearest, read_index
from rmmformat.format.temporary import remove_stale
from rmmformat.format.validate import parse_metadata
from rmmformat.format.writer import put_in_place, slot_bytes

__all__ = ["Growth", "compact_file"]

_CHUNK = 1 << 22
_MAX_SEQUENCE = (1 << 64) - 3
Notice = Callable[[str], None]


class _Held:
    """A locked file and what its index says."""

    def __init__(
        self, path: str | os.PathLike[str], disk: Disk, wait: float, notice: Notice | None
    ) -> None:
        if "://" in os.fspath(path):  # a mistake to be named; the folder "https:" is nobody's
            raise UnsupportedError(
                "only a file on this machine can change in place",
                hint="Download it, change it here, and upload it again.",
            )
        self.file = LockedFile(path, disk, wait=wait, notice=notice)
        try:
            self.index = read_index(_mapped(self.file), os.fspath(path))
            self.catalog = _whole_catalog(self.index, os.fspath(path))
        except BaseException:
            self.file.close()
            raise


class Growth(Assembly):
    """Add, replace and drop tasks of a file; the file changes at :meth:`finish`, at once.

    Use as a context manager: it holds the file against other writers until it is left.  Readers are
    not in its way, nor it in theirs.

    Parameters
    ----------
    path
        An existing file.
    wait
        Seconds to wait for another writer.
    notice
        Called with a sentence if it has to wait.

    Raises
    ------
    RmmError
        Another writer holds the file.
    FormatError, UnsupportedError
        The file is broken, or needs a newer version to be changed.
    LossyConversionError
        The file holds what this version would drop.
    OSError
        The file cannot be opened for writing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        wait: float = DEFAULT_WAIT,
        notice: Notice | None = None,
        disk: Disk = DISK,
    ) -> None:
        self.path = os.fspath(path)
        self._disk = disk
        held = _Held(path, disk, wait, notice)
        self._file, self.index, self.catalog = held.file, held.index, held.catalog
        try:
            super().__init__(self._file.path.parent, self.catalog, self._file)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Let the file go, without a change if :meth:`finish` has not been called."""
        try:
            super().close()
        finally:
            self._file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks as the file will have them."""
        return tuple(sorted(self._tasks.keys() | self._new.keys(), key=str.encode))

    def drop(self, name: str) -> None:
        """Leave a task out.

        Raises
        ------
        NotFoundError
            No such task.
        """
        if name not in self._tasks:
            raise NotFoundError(
                f"no task is called {name!r}",
                path=self.path,
                hint=nearest(name, tuple(self._tasks)),
            )
        del self._tasks[name]

    def preview(self, metadata: Mapping[str, Any] | None) -> Plan:
        """What :meth:`finish` would write; nothing is written."""
        return self.plan(self.index.file_length, metadata, self._freed)

    def finish(self, metadata: Mapping[str, Any] | None) -> int:
        """Put the change in force; gives the new length of the file in bytes.

        If it fails before the last step the file holds the collection that it held before.

        Raises
        ------
        UnsupportedError
            A task would ask for more than the format allows.
        RmmError
            The file was replaced meanwhile by one that takes no notice of locks.
        OSError
            The disk is full, or fails.
        """
        plan = self.preview(metadata)
        size, start = self._file.size, self.index.file_length
        sequence = int(self.index.active["sequence"])
        if sequence > _MAX_SEQUENCE:
            raise UnsupportedError(
                "the file has no sequence numbers left", path=self.path, hint="Compact it first."
            )
        self._check_current()
        remove_stale(self._file.path, self._disk)
        active = layout.SLOT_OFFSETS[1 - sequence % 2]
        inactive = layout.SLOT_OFFSETS[sequence % 2]
        handle, disk = self._file.handle, self._disk

        disk.write(handle, self._announcement(max(size, plan.end)), inactive)
        disk.sync(handle)
        try:
            if size > start:  # what a growth that was cut short has left
                disk.truncate(handle, start)
            table_crc = plan.write(Appender(disk, handle, start))
            disk.sync(handle)
            slot = slot_bytes(plan, table_crc, sequence=sequence + 2)
            self._check(slot, active)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.truncate(handle, start)
            raise
        # From here on the new collection may be in force, so nothing is taken back.
        disk.write(handle, slot, active)
        disk.sync(handle)
        self._check_current()
        return plan.end

    def _announcement(self, limit: int) -> bytes:
        slot = self.index.active.copy()
        slot["sequence"] += 1
        slot["growth_limit"] = limit
        slot["unused"] = bytes(slot["unused"].dtype.itemsize)
        slot["crc"] = crc32c(slot.tobytes()[:-4])
        raw: bytes = slot.tobytes()
        return raw

    def _check_current(self) -> None:
        if not self._file.is_current():
            raise RmmError(
                "was replaced while it was open, so the change is lost",
                path=self.path,
                hint="Do it again.",
            )

    def _check(self, slot: bytes, place: int) -> None:
        """Read what was written as a reader will, before it is in force."""
        header = bytearray(self._file.read(0, layout.HEADER_LENGTH))
        header[place : place + len(slot)] = slot
        try:
            read_index(_mapped(self._file), self.path, bytes(header))
        except (FormatError, UnsupportedError) as error:
            raise InternalError(
                f"the change would have made the file invalid, and was not made: {error.message}",
                rule=error.rule,
                offset=error.offset,
                path=self.path,
                hint="Please report it.",
            ) from error

    def _freed(self, new: Catalog) -> list[Extent]:
        """Extents that the new collection does not use, adjacent ones as one (section 5.3)."""
        start, length = (int(self.index.active[f]) for f in ("index_offset", "index_length"))
        old = [*extents_of(self.catalog), *self.catalog.free, Extent(start, length, 0)]
        stay = {extent.offset for extent in extents_of(new)}
        known = {extent.offset: extent for extent in self.catalog.free}
        freed: list[Extent] = []
        joins = False
        for extent in sorted(old, key=lambda extent: extent.offset):
            if extent.length == 0:
                continue
            if extent.offset in stay:
                joins = False
                continue
            if joins:
                first = freed.pop()
                crc = self._checksum(first.end, extent.end, first.crc)
                freed.append(Extent(first.offset, extent.end - first.offset, crc))
            elif extent.offset in known:
                freed.append(extent)
            else:
                # Computed, not copied: what is damaged and no longer used is damaged no longer.
                crc = self._checksum(extent.offset, extent.end, 0)
                freed.append(Extent(extent.offset, extent.length, crc))
            joins = True
        return freed

    def _checksum(self, start: int, end: int, crc: int) -> int:
        for offset in range(start, end, _CHUNK):
            crc = crc32c(self._file.read(offset, min(_CHUNK, end - offset)), crc)
        return crc


class _Compaction(Assembly):
    """All of a file, to be written anew."""

    def __init__(self, held: _Held) -> None:
        super().__init__(held.file.path.parent)
        self.adopt(held.catalog, held.file)


def compact_file(
    path: str | os.PathLike[str],
    *,
    wait: float = DEFAULT_WAIT,
    notice: Notice | None = None,
    dry_run: bool = False,
    disk: Disk = DISK,
) -> tuple[int, int]:
    """Write a file anew without what nothing uses, and put it in the old one's place.

    The result is a function of the collection: how it came about leaves no trace.

    Parameters
    ----------
    path
        An existing file; of a symbolic link, what it leads to.
    wait, notice
        As for :class:`Growth`.
    dry_run
        Only find out how long it would be.

    Returns
    -------
    Length before and after, in bytes.

    Raises
    ------
    ChecksumError
        The file is damaged; it stays as it is.
    RmmError, FormatError, UnsupportedError, LossyConversionError, OSError
        As for :class:`Growth`.
    """
    held = _Held(path, disk, wait, notice)
    try:
        before = held.file.size
        with _Compaction(held) as assembly:
            plan = assembly.plan(layout.HEADER_LENGTH, held.catalog.metadata)
            if not dry_run:
                mode = stat.S_IMODE(os.fstat(held.file.handle).st_mode)
                put_in_place(plan, held.file.path, disk, mode=mode)
        return before, plan.end
    finally:
        held.file.close()


def _mapped(file: LockedFile) -> bytes | mmap.mmap:
    # Of a descriptor of its own: a mapping keeps one, and with the file's the lock would be kept.
    with file.path.open("rb") as again:
        if os.fstat(again.fileno()).st_size == 0:
            return b""
        return mmap.mmap(again.fileno(), 0, access=mmap.ACCESS_READ)


def _whole_catalog(index: Index, path: str) -> Catalog:
    """All that a file says; refused if this version does not know all of it."""
    if index.minor > layout.MINOR:
        raise UnsupportedError(
            f"version is 1.{index.minor}, this version can read but not change it",
            path=path,
            hint="Use a newer rmmformat.",
        )
    unknown = [name for name in index.sections if name not in layout.RECORDS]
    if unknown:
        raise LossyConversionError(
            f"section {unknown[0]} is not known here, and would be lost",
            path=path,
            hint="Change the file with the program that wrote it.",
        )
    raw = index.section_bytes("meta")
    return decode_catalog(index, None if raw is None else parse_metadata(raw))
