"""The Python reader: bytes of a file to the tables of its index, every rule of opening checked.

Tables come as numpy record arrays over the file's own bytes.  :func:`read_index` raises at the
first broken rule; :mod:`rmmformat.format.validate` collects them all from the same checks.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rmmformat._native import crc32c
from rmmformat.errors import (
    ChecksumError,
    FormatError,
    LayoutError,
    MetadataError,
    NotFoundError,
    TruncatedError,
    UnsupportedError,
)
from rmmformat.format import layout

__all__ = ["Extent", "Index", "Section", "Slot", "Violation", "locate_index", "nearest",
           "raise_violation", "read_index", "while_growing"]  # fmt: skip

Table = npt.NDArray[np.void]
T = TypeVar("T")

_UNSUPPORTED = {2, 3, 23, 88}
_CHECKSUMS = {4, 10, 12, 20, 25, 80, 81, 82, 83}
_HINTS = {
    1: "This is not an .rmm file, or it was transferred as text.",
    2: "A newer rmmformat may read it.",
    3: "A newer rmmformat may read it.",
    13: "The file is cut short; fetch it again.",
    14: "Bytes were appended to the file; fetch it again.",
    23: "A newer rmmformat may read it.",
}


@dataclasses.dataclass(frozen=True)
class Violation:
    """A rule that a file breaks, and where."""

    rule: int
    offset: int
    message: str
    unsupported: bool = False

    @property
    def id(self) -> str:
        """Id of the rule, as the specification writes it."""
        return f"RMM-{self.rule:03d}"


def raise_violation(violation: Violation, path: str | None = None) -> None:
    """Raise the exception that fits a violation."""
    kind: type[FormatError | UnsupportedError] = LayoutError
    if violation.unsupported or violation.rule in _UNSUPPORTED:
        kind = UnsupportedError
    elif violation.rule == 13:
        kind = TruncatedError
    elif violation.rule in _CHECKSUMS:
        kind = ChecksumError
    elif violation.rule in (90, 91):
        kind = MetadataError
    raise kind(
        violation.message,
        rule=violation.id,
        offset=violation.offset,
        path=path,
        hint=_HINTS.get(violation.rule),
    )


@dataclasses.dataclass(frozen=True)
class Slot:
    """One of the two header slots."""

    offset: int
    record: Any
    state: str  # "empty", "valid" or "damaged"


@dataclasses.dataclass(frozen=True)
class Extent:
    """A range of the file and its checksum."""

    offset: int
    length: int
    crc: int

    @property
    def end(self) -> int:
        """Offset behind the last byte."""
        return self.offset + self.length


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of the index."""

    type: str
    offset: int
    length: int
    count: int
    coding: int
    record_size: int


class Index:
    """The index of a file.

    Attributes
    ----------
    data
        The bytes of the whole file.
    header
        The first 640 of them, or those given: a copy, so that an index stays that of one
        collection while a file that is mapped grows.
    minor
        Minor version.
    slots, active
        Both slots, and the record of the active one.
    sections
        By type, in the order of the file.
    strings
        Names by string id.
    runs, fixed_size
        By layout id: its runs as pairs of encoding code and number of rows, and whether all of
        their encodings are known and fixed-size.
    """

    def __init__(self, data: memoryview, header: bytes | None = None) -> None:
        self.data = data
        self.header = bytes(data[: layout.HEADER_LENGTH]) if header is None else header
        self.minor = 0
        self.slots: list[Slot] = []
        self.active: Any = None
        self.sections: dict[str, Section] = {}
        self.strings: list[str] = []
        self.runs: list[list[tuple[int, int]]] = []
        self.fixed_size: list[bool] = []
        self.first_frame: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self._tables: dict[str, Table] = {}

    def table(self, name: str) -> Table:
        """Records of a section; none where it is absent.

        Raises
        ------
        FormatError
            It is deflated and does not inflate (RMM-026).
        """
        found = self._tables.get(name)
        if found is None:
            found = self._tables[name] = self._read_table(name)
        return found

    def _read_table(self, name: str) -> Table:
        record, section = layout.RECORDS[name], self.sections.get(name)
        if section is None:
            return np.zeros(0, record)
        fields: Any = record.fields
        steps: Any = {
            "names": list(fields),
            "formats": [field[0] for field in fields.values()],
            "offsets": [field[1] for field in fields.values()],
            "itemsize": section.record_size,
        }
        raw: Any = self.data[section.offset : section.offset + section.length]
        if section.coding:
            raw = inflate(raw, section.count * section.record_size, section.offset)
        table: Table = np.frombuffer(raw, np.dtype(steps))
        return table

    def table_offset(self, name: str, record: int) -> int:
        """Offset of a record of a section, for messages."""
        section = self.sections.get(name)
        if section is None:
            return int(self.active["index_offset"]) if self.active is not None else 0
        return section.offset + (0 if section.coding else record * section.record_size)

    @property
    def file_length(self) -> int:
        """Length of the file as the active slot has it."""
        return int(self.active["file_length"])

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the file."""
        return tuple(self.strings[i] for i in self.table("TASK")["name"])

    @cached_property
    def target_names(self) -> tuple[str, ...]:
        """Name of every target record."""
        return tuple(self.strings[i] for i in self.table("TARG")["name"])

    def find_task(self, name: str) -> int:
        """Ordinal of a task.

        Raises
        ------
        NotFoundError
            No task has that name; the hint names the nearest.
        """
        try:
            return self.task_names.index(name)
        except ValueError:
            raise NotFoundError(
                f"no task is called {name!r}", hint=nearest(name, self.task_names)
            ) from None

    def task_targets(self, task: int) -> npt.NDArray[np.uint32]:
        """Target ids of a task, one for each of its entries."""
        record = self.table("TASK")[task]
        first = int(record["first_target"])
        ids: npt.NDArray[np.uint32] = self.table("TLST")["target"][
            first : first + int(record["n_entries"])
        ]
        return ids

    def layout_runs(self, layout_id: int) -> list[tuple[int, int]]:
        """Runs of a layout: encoding code, number of rows."""
        return [] if layout_id == layout.NONE else self.runs[layout_id]

    def frame_of(self, form: Any, target_id: int) -> Any:
        """Frame record that a form's cluster names at a target, or None."""
        if not form["cluster"]:
            return None
        return self.table("FRAM")[self.first_frame[target_id] + int(form["cluster"]) - 1]

    def frame_arrays(self, frame: Any) -> list[tuple[int, int]]:
        """Layout id and row length of the four arrays of a frame (section 7.2)."""
        target = self.table("TARG")[frame["target"]]
        return [
            (int(frame[f][array]), int(target[side]))
            for f, side in (("a", "n_in"), ("b", "n_out"))
            for array in ("mean", "basis")
        ]

    def entry_arrays(self, form_id: int, target_id: int) -> list[tuple[int, int]]:
        """Layout id and row length of the four arrays of an entry (section 7.2)."""
        form, target = self.table("FORM")[form_id], self.table("TARG")[target_id]
        frame = self.frame_of(form, target_id)
        arrays = []
        for f, side in (("a", "n_in"), ("b", "n_out")):
            length = width = int(target[side])
            if frame is not None and frame[f]["rank"]:
                groups = -(-length // int(frame[f]["group"]))
                width = groups * (int(form["rank"]) if frame[f]["flags"] & 1 else 1)
            arrays.append((int(form[f"coefficients_{f}"]), width))
            arrays.append((int(form[f"residual_{f}"]), length))
        return arrays

    def entry_offsets(self, task: int) -> list[int]:
        """Offset of every entry of a task (section 7.1)."""
        record = self.table("TASK")[task]
        first, position = int(record["first_entry"]), 0
        offsets = []
        for length in self.table("ENTR")["length"][first : first + int(record["n_entries"])]:
            size = int(length)
            position = layout.ceil_to(position, layout.alignment(size, 1))
            offsets.append(int(record["offset"]) + position)
            position += size
        return offsets

    def payload_of(self, task: int) -> list[Extent]:
        """What reconstructing a task reads: its frames, then its entries, none of them empty."""
        record = self.table("TASK")[task]
        first, count = int(record["first_entry"]), int(record["n_entries"])
        entries = self.table("ENTR")[first : first + count]
        forms = self.table("FORM")[entries["form"]]
        frames = [
            self.frame_of(form, int(target))
            for form, target in zip(forms, self.task_targets(task), strict=True)
        ]
        found = [_extent(frame["offset"], frame) for frame in frames if frame is not None]
        found += map(_extent, self.entry_offsets(task), entries)
        return [extent for extent in found if extent.length]

    def privates_of(self, task: int) -> list[Extent]:
        """Contents of a task's private tensors, none of them empty."""
        record = self.table("TASK")[task]
        first, count = int(record["first_private"]), int(record["n_privates"])
        blobs = self.table("BLOB")[self.table("PRIV")["blob"][first : first + count]]
        return [_extent(blob["offset"], blob) for blob in blobs if blob["length"]]

    def section_bytes(self, name: str) -> bytes | None:
        """Decoded bytes of a section, or None where it is absent or has no records.

        Raises
        ------
        FormatError
            It is deflated and does not inflate (RMM-026).
        """
        return self.table(name).tobytes() or None


def _extent(offset: Any, record: Any) -> Extent:
    return Extent(int(offset), int(record["length"]), int(record["crc"]))


def inflate(raw: bytes | memoryview, size: int, offset: int) -> bytes:
    """Inflate a zlib stream of exactly `size` bytes (RMM-026), in memory bounded by `size`.

    `offset` is where it begins, for the message.

    Raises
    ------
    LayoutError
        Not such a stream.
    """
    try:
        stream = zlib.decompressobj()
        out = stream.decompress(raw, size + 1)
        whole = stream.eof and not stream.unused_data
    except zlib.error:
        out, whole = b"", False
    if not whole or len(out) != size:
        raise LayoutError(
            f"section does not inflate to {size} bytes", rule="RMM-026", offset=offset
        )
    return out


def nearest(name: str, names: tuple[str, ...]) -> str:
    """Sentence that names what was probably meant."""
    import difflib

    close = difflib.get_close_matches(name, names, 3) or list(names[:5])
    if not close:
        return "The file has none."
    return f"There is {', '.join(close)}" + (f" ({len(names)} in all)." if len(names) > 5 else ".")


def read_index(data: Any, path: str | None = None, header: bytes | None = None) -> Index:
    """Read and check header and index (the rules marked "open").

    Parameters
    ----------
    data
        The whole file: bytes, memoryview, mmap.
    path
        For messages.
    header
        Preamble and slots, where they are not to be taken from `data`.

    Raises
    ------
    FormatError, UnsupportedError
        For the first rule that is broken.
    """
    from rmmformat.format.rules import OPEN_STAGES

    return _checked(Index(memoryview(data).cast("B"), header), OPEN_STAGES, path)


def locate_index(data: Any, path: str | None, header: bytes) -> tuple[int, int]:
    """Offset and length of the index, as the header has them: nothing else of `data` is looked at.

    Raises
    ------
    FormatError, UnsupportedError
        For the first rule of the header that is broken.
    """
    from rmmformat.format import framing

    stages = (framing.header, framing.slots)
    index = _checked(Index(memoryview(data).cast("B"), header), stages, path)
    return int(index.active["index_offset"]), int(index.active["index_length"])


def _checked(
    index: Index, stages: Iterable[Callable[[Index], Violations]], path: str | None
) -> Index:
    for stage in stages:
        for violation in stage(index):
            if violation.rule not in VALIDATE_ONLY:
                raise_violation(violation, path)
    return index


#: Rules that a reader can see broken for a moment while a writer is at work: it measured the file
#: before, and read the slots after, a change; or each slot while that one was being written.
_PASSING = frozenset({"RMM-010", "RMM-012", "RMM-013", "RMM-014"})


def _look(path: str | os.PathLike[str]) -> tuple[int, bytes]:
    with Path(path).open("rb") as file:
        return os.fstat(file.fileno()).st_size, file.read(layout.HEADER_LENGTH)


def while_growing(
    path: str | os.PathLike[str],
    attempt: Callable[[], T],
    look: Callable[[], tuple[int, bytes]] | None = None,
) -> T:
    """Do what reads a file again for as long as a writer's change came in between.

    Parameters
    ----------
    path
        The file.
    attempt
        Reads it from the start.
    look
        Gives its size and header, where `path` is not to be opened.

    Raises
    ------
    FormatError
        The file is broken, and nobody is changing it.
    """
    seen = None
    while True:
        try:
            return attempt()
        except FormatError as error:  # noqa: PERF203
            if error.rule not in _PASSING:
                raise
            now = _look(path) if look is None else look()
            if now == seen:
                raise
            seen = now


#: Rules that the stages of opening find on their way but that do not stop a reader.
VALIDATE_ONLY = frozenset({12, 15})


def check_sum(data: memoryview, offset: int, length: int, stored: int) -> int | None:
    """Computed CRC32C if it differs from the stored one."""
    computed = crc32c(data[offset : offset + length])
    return None if computed == stored else computed


Violations = Iterator[Violation]
