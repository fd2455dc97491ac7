"""An ``.rmm`` file behind a URL, of which only what is asked for is fetched.

The file has a place in memory as long as itself, of which only what was written takes any; header
and index are put there, then the native reader opens it like any other, and before a task is
loaded the extents that it needs are brought in (specification, section 4: a task is its frames, its
run and nothing else).  What comes over a network is checked against the index's checksums.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from rmmformat._native import File, crc32c
from rmmformat.collection import Collection
from rmmformat.errors import ChecksumError, RemoteError
from rmmformat.format import layout
from rmmformat.format.reader import Extent, locate_index, while_growing
from rmmformat.format.validate import Report, validate_bytes
from rmmformat.remote import shown
from rmmformat.remote.download import downloaded
from rmmformat.remote.ranges import Ranges, open_ranges

__all__ = ["RemoteFile", "open_remote"]
#: Bytes of an index, and of what one task needs, that are fetched on a server's word.
_MOST_INDEX, _MOST_PAYLOAD = 1 << 30, 1 << 34


def open_remote(url: str, storage_options: Mapping[str, Any] | None = None) -> Collection:
    """Open an ``.rmm`` file behind a URL: two requests, and one for the size but over HTTP.

    Parameters
    ----------
    url
        Anything that fsspec knows.
    storage_options
        What fsspec wants to know to reach it.

    Raises
    ------
    RemoteError
        It cannot be read, or the server does not serve ranges.
    FormatError, UnsupportedError
        As :func:`rmmformat.open`.
    """
    ranges, name = open_ranges(url, storage_options), shown(url)
    return while_growing(
        name,
        lambda: RemoteFile(ranges, storage_options).collection(),
        look=lambda: ranges.head(layout.HEADER_LENGTH),
    )


class RemoteFile:
    """The memory that a remote file is read into, and what is there already.

    Thread-safe: threads that want the same bytes wait for one request, others go on beside it.
    """

    def __init__(self, ranges: Ranges, storage_options: Mapping[str, Any] | None = None) -> None:
        self._ranges, self._options = ranges, storage_options
        self.path = shown(ranges.url)
        size, self._header = ranges.head(layout.HEADER_LENGTH)
        self._memory = _sparse(size, self.path)
        self._view = memoryview(self._memory)
        self._view[: len(self._header)] = self._header
        #: By offset: done once the extent is there (extents do not overlap, RMM-071).
        self._there: dict[int, Future[None]] = {}
        self._lock = threading.Lock()

    def collection(self) -> Collection:
        """Fetch the index and open the file.

        Raises
        ------
        FormatError, UnsupportedError, RemoteError
            As :func:`open_remote`.
        """
        start, length = locate_index(self._view, self.path, self._header)
        _check_amount(length, _MOST_INDEX, self.path)
        self._ranges.read_into(self._view, [(start, start + length)] if length else [])
        return Collection(File.from_buffer(self._memory), self.path, self._header, self)

    def bring(self, extents: Sequence[Extent]) -> None:
        """Fetch those extents that are not there yet, in few requests, and check them.

        Raises
        ------
        RemoteError
            They cannot be fetched; a later call tries again.
        ChecksumError
            Other bytes came than the index says.
        """
        promise: Future[None] = Future()
        missing: dict[int, Extent] = {}
        awaited: set[Future[None]] = set()
        with self._lock:
            for extent in extents:
                found = self._there.setdefault(extent.offset, promise)
                if found is promise:
                    missing[extent.offset] = extent
                else:
                    awaited.add(found)
        if missing:
            self._fetch(list(missing.values()), promise)
        for other in awaited:
            other.result()

    def _fetch(self, extents: Sequence[Extent], promise: Future[None]) -> None:
        try:
            _check_amount(sum(extent.length for extent in extents), _MOST_PAYLOAD, self.path)
            spans = [(extent.offset, extent.end) for extent in extents]
            self._ranges.read_into(self._view, spans)
            for extent in extents:
                if crc32c(self._view[extent.offset : extent.end]) != extent.crc:
                    self._refuse(extent)
        except BaseException as error:
            with self._lock:
                for extent in extents:
                    del self._there[extent.offset]
            promise.set_exception(error)
            raise
        promise.set_result(None)

    def _refuse(self, extent: Extent) -> None:
        changed = self._ranges.changed()
        raise ChecksumError(
            f"{extent.length} bytes that were fetched are not those of the index",
            offset=extent.offset,
            path=self.path,
            hint="The file has been replaced since it was opened; open it again."
            if changed
            else "Damaged on the way or where it lies: `rmm validate` tells.",
        )

    def validate(self) -> Report:
        """Download the file and check all of it."""
        with downloaded(self._ranges.url, self._options) as path, path.open("rb") as file:
            return validate_bytes(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _check_amount(n_bytes: int, most: int, path: str) -> None:
    if n_bytes > most:
        raise RemoteError(
            f"{n_bytes} bytes would have to be fetched at once, at most {most} are",
            path=path,
            hint="Download the file and open it where it is.",
        )


def _sparse(size: int, path: str) -> mmap.mmap:
    """Memory of which only what is written to takes any, page by page.

    A file in memory where the system has such: unlike anonymous memory it is neither charged for as
    a whole nor filled in pages of megabytes.
    """
    try:
        if hasattr(os, "memfd_create"):
            handle = os.memfd_create("rmm", os.MFD_CLOEXEC)
        else:
            handle, name = tempfile.mkstemp(suffix=".rmm")
            os.unlink(name)  # noqa: PTH108
        try:
            os.ftruncate(handle, max(size, 1))
            return mmap.mmap(handle, max(size, 1))
        finally:
            os.close(handle)
    except (OSError, OverflowError, ValueError) as error:
        raise RemoteError(
            f"there is no room for a file of {size} bytes, which the server says it has", path=path
        ) from error
