"""New files: deterministic bytes, first under a temporary name, synced, then renamed.

A merge goes target by target and a file is task by task, so what is added is spooled to an
unnamed temporary file and gathered at the end: memory stays bounded by one target, whatever the
size of the collection, and whatever the order in which targets arrive the bytes are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from rmmformat._native import crc32c
from rmmformat.errors import LossyConversionError, RmmError, ShapeError, UnsupportedError
from rmmformat.format import layout
from rmmformat.format.catalog import (
    Blob,
    Catalog,
    Entry,
    Extent,
    Form,
    Frame,
    Layout,
    Part,
    Private,
    TargetKey,
    Task,
    encode_index,
    encode_sections,
    index_length,
)
from rmmformat.format.encodings import ENCODINGS
from rmmformat.model import Array, PrivateInfo

__all__ = ["EncodedArray", "EntryData", "FramePart", "Writer", "check_name", "write_header"]


@dataclasses.dataclass(frozen=True)
class EncodedArray:
    """Rows as bytes: pairs of encoding and number of rows, and the bytes of each such run."""

    layout: Layout
    runs: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not self.layout or len(self.layout) != len(self.runs):
            raise ShapeError(f"{len(self.runs)} runs of bytes for {len(self.layout)} in the layout")


@dataclasses.dataclass(frozen=True)
class FramePart:
    """One factor's side of a shared part (specification, FRAM)."""

    group: int
    n_components: int
    rank: int
    mean: EncodedArray | None
    basis: EncodedArray | None
    row_mixing: bool = False


@dataclasses.dataclass(frozen=True)
class EntryData:
    """What one task stores at one target."""

    scale: float
    rank: int
    cluster: int
    coefficients_a: EncodedArray | None
    residual_a: EncodedArray | None
    coefficients_b: EncodedArray | None
    residual_b: EncodedArray | None
    dtype_a: int
    dtype_b: int
    error: float = float("nan")


def check_name(name: str, what: str) -> None:
    """Refuse a name that the format cannot hold (RMM-030).

    Raises
    ------
    UnsupportedError
        Empty, too long, not encodable, or with control characters.
    """
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raw = b""
    if not 1 <= len(raw) <= layout.MAX_NAME or any(byte < 32 or byte == 127 for byte in raw):
        raise UnsupportedError(
            f"{what} name {name[:80]!r} cannot be stored: names are 1 to {layout.MAX_NAME} bytes "
            "of UTF-8 without control characters",
            rule="RMM-030",
            hint="Rename it.",
        )


def pack(arrays: tuple[EncodedArray | None, ...]) -> bytes:
    """Bytes of an entry or a frame: its arrays in order, large runs aligned (section 7.2)."""
    out = bytearray()
    for array in arrays:
        if array is None:
            continue
        for (code, _), run in zip(array.layout, array.runs, strict=True):
            fixed = ENCODINGS[code].row_bytes is not None
            if fixed:
                out += bytes(-len(out) % layout.alignment(len(run), 1))
            out += run
    return bytes(out)


def write_header(
    file: IO[bytes], *, index: tuple[int, int], sections: tuple[int, int], file_length: int
) -> None:
    """Write preamble and slots of a first write: sequence 1 in slot 0 (section 5).

    Parameters
    ----------
    index
        Offset and length of the index.
    sections
        Number of sections, and CRC32C of their table.
    """
    preamble = np.zeros((), layout.PREAMBLE)
    preamble["signature"] = layout.SIGNATURE
    preamble["major"], preamble["minor"] = layout.MAJOR, layout.MINOR
    preamble["crc"] = crc32c(preamble.tobytes()[:-4])
    slot = np.zeros((), layout.SLOT)
    slot["sequence"] = 1
    slot["file_length"] = slot["growth_limit"] = file_length
    slot["index_offset"], slot["index_length"] = index
    slot["n_sections"], slot["section_table_crc"] = sections
    slot["section_record_size"] = layout.SECTION.itemsize
    slot["crc"] = crc32c(slot.tobytes()[:-4])
    header = bytearray(layout.HEADER_LENGTH)
    header[: layout.PREAMBLE.itemsize] = preamble.tobytes()
    first = layout.SLOT_OFFSETS[0]
    header[first : first + layout.SLOT.itemsize] = slot.tobytes()
    file.seek(0)
    file.write(header)


@dataclasses.dataclass(frozen=True)
class _Spooled:
    offset: int
    length: int
    crc: int


class Writer:
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
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise RmmError("is a folder, not a file", path=str(path), hint="Name a file.")
        if not self.path.parent.is_dir():
            raise RmmError(
                f"folder {self.path.parent} does not exist", path=str(path), hint="Create it first."
            )
        if self.path.exists() and not overwrite:
            raise LossyConversionError(
                "exists already", path=str(path), hint="Use --force to replace it."
            )
        self._spool: IO[bytes] = tempfile.TemporaryFile(dir=self.path.parent)
        self._end = 0
        self._frames: dict[TargetKey, list[tuple[_Spooled, Part | None, Part | None]]] = {}
        self._entries: dict[str, dict[TargetKey, tuple[_Spooled, Form, float]]] = {}
        self._privates: dict[str, dict[str, tuple[str, PrivateInfo]]] = {}
        self._contents: dict[str, _Spooled] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spool.close()

    def add_task(self, name: str) -> None:
        """Make a task known; a task may be without targets."""
        check_name(name, "task")
        self._entries.setdefault(name, {})
        self._privates.setdefault(name, {})

    def add_frame(self, target: TargetKey, a: FramePart | None, b: FramePart | None) -> int:
        """Add a shared part of a target; gives its cluster number for :class:`EntryData`."""
        arrays = tuple(
            array for part in (a, b) for array in ((part.mean, part.basis) if part else ())
        )
        frames = self._frames.setdefault(target, [])
        frames.append((self._put(pack(arrays)), _catalog_part(a), _catalog_part(b)))
        return len(frames)

    def add_entry(self, task: str, target: TargetKey, data: EntryData) -> None:
        """Add what a task stores at a target."""
        check_name(target.name, "target")
        arrays = (data.coefficients_a, data.residual_a, data.coefficients_b, data.residual_b)
        layouts = [None if array is None else array.layout for array in arrays]
        form = Form(
            float(data.scale), data.rank, data.cluster, *layouts, data.dtype_a, data.dtype_b
        )
        self._entries[task][target] = (self._put(pack(arrays)), form, float(data.error))

    def add_private(self, task: str, name: str, info: PrivateInfo, values: Array) -> None:
        """Add a private tensor; equal bytes are stored once.

        Raises
        ------
        UnsupportedError
            The format has no code for its dtype.
        """
        check_name(name, "private tensor")
        if layout.dtype_code(info.dtype) is None:
            raise UnsupportedError(f"private tensor {name}: dtype {info.dtype} has no code")
        raw = np.ascontiguousarray(values).tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        if digest not in self._contents:
            self._contents[digest] = self._put(raw)
        self._privates[task][name] = (digest, info)

    @property
    def factor_bytes(self) -> int:
        """Bytes of all frames and entries added so far, without padding."""
        frames = (spooled.length for group in self._frames.values() for spooled, _, _ in group)
        entries = (
            spooled.length for task in self._entries.values() for spooled, _, _ in task.values()
        )
        return sum(frames) + sum(entries)

    @property
    def private_bytes(self) -> int:
        """Bytes of all private tensors added so far, equal ones once."""
        return sum(spooled.length for spooled in self._contents.values())

    def finish(self, metadata: Mapping[str, Any]) -> int:
        """Gather, write, sync and rename; gives the length of the file in bytes."""
        temporary = self.path.parent / f".{secrets.token_hex(8)}.rmm.tmp"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                length = self._write(file, metadata)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(self.path.parent)
        return length

    def _put(self, raw: bytes) -> _Spooled:
        spooled = _Spooled(self._end, len(raw), crc32c(raw))
        self._spool.seek(self._end)
        self._spool.write(raw)
        self._end += len(raw)
        return spooled

    def _write(self, file: IO[bytes], metadata: Mapping[str, Any]) -> int:
        file.write(bytes(layout.HEADER_LENGTH))
        frames: dict[TargetKey, list[Frame]] = {}
        for key in sorted(self._frames, key=TargetKey.sort_key):
            for spooled, a, b in self._frames[key]:
                frames.setdefault(key, []).append(Frame(self._place(file, spooled), a, b))
        tasks: dict[str, Task] = {}
        blobs: list[Blob] = []
        blob_ids: dict[str, int] = {}
        for name in sorted(self._entries, key=str.encode):
            tasks[name] = self._write_run(file, name)
            for private_name in sorted(self._privates[name], key=str.encode):
                digest, info = self._privates[name][private_name]
                if digest not in blob_ids:
                    blob_ids[digest] = len(blobs)
                    extent = self._place(file, self._contents[digest])
                    blobs.append(Blob(extent.offset, extent.length, extent.crc))
                code = layout.dtype_code(info.dtype)
                assert code is not None  # checked by add_private  # noqa: S101
                tasks[name].privates[private_name] = Private(
                    info.role, code, info.shape, blob_ids[digest]
                )
        catalog = Catalog(tasks, frames, blobs, [], metadata)
        sections = encode_sections(catalog)
        offset = layout.ceil_to(file.tell(), layout.alignment(index_length(sections)))
        file.write(bytes(offset - file.tell()))
        raw, crc = encode_index(sections, offset)
        file.write(raw)
        end = offset + len(raw)
        self._check_expansion(catalog, end)
        write_header(file, index=(offset, len(raw)), sections=(len(sections), crc), file_length=end)
        return end

    def _write_run(self, file: IO[bytes], name: str) -> Task:
        entries = self._entries[name]
        order = sorted(entries, key=TargetKey.sort_key)
        places, length = [], 0
        for key in order:
            size = entries[key][0].length
            length = layout.ceil_to(length, layout.alignment(size, 1))
            places.append(length)
            length += size
        start = 0
        if length:
            start = layout.ceil_to(file.tell(), layout.alignment(length))
        result = Task(start, length, {}, {})
        for key, place in zip(order, places, strict=True):
            spooled, form, error = entries[key]
            if spooled.length:
                file.write(bytes(start + place - file.tell()))
                self._copy(file, spooled)
            result.entries[key] = Entry(form, spooled.length, spooled.crc, error)
        return result

    def _place(self, file: IO[bytes], spooled: _Spooled) -> Extent:
        if spooled.length == 0:
            return Extent(0, 0, spooled.crc)
        offset = layout.ceil_to(file.tell(), layout.alignment(spooled.length))
        file.write(bytes(offset - file.tell()))
        self._copy(file, spooled)
        return Extent(offset, spooled.length, spooled.crc)

    def _copy(self, file: IO[bytes], spooled: _Spooled) -> None:
        self._spool.seek(spooled.offset)
        left = spooled.length
        while left:
            chunk = self._spool.read(min(left, 1 << 22))
            file.write(chunk)
            left -= len(chunk)

    @staticmethod
    def _check_expansion(catalog: Catalog, file_length: int) -> None:
        for name, task in catalog.tasks.items():
            values = sum(
                entry.form.rank * (key.shape.n_in + key.shape.n_out)
                for key, entry in task.entries.items()
            )
            if values > layout.VALUES_PER_BYTE * file_length:
                raise UnsupportedError(
                    f"task {name} would have {values} values in a file of {file_length} bytes, "
                    f"the format allows {layout.VALUES_PER_BYTE} a byte",
                    rule="RMM-062",
                    hint="A delta that is all zero is better left out of the collection.",
                )


def _catalog_part(part: FramePart | None) -> Part | None:
    if part is None:
        return None
    return Part(
        part.group,
        part.n_components,
        part.rank,
        None if part.mean is None else part.mean.layout,
        None if part.basis is None else part.basis.layout,
        part.row_mixing,
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system that cannot sync folders is left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
