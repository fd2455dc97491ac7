"""Check every rule of the specification over every byte of a file, and list what is broken."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rmmformat.errors import FormatError, MetadataError, RmmError
from rmmformat.format import layout
from rmmformat.format.encodings import ENCODINGS
from rmmformat.format.metadata import fault
from rmmformat.format.reader import Index, Violation, check_sum
from rmmformat.format.rules import OPEN_STAGES, extent_table

__all__ = ["Report", "check_metadata", "parse_metadata", "read_metadata", "validate_bytes"]

MAX_DEPTH = 16


@dataclasses.dataclass(frozen=True)
class Report:
    """Outcome of a validation.

    Attributes
    ----------
    violations
        What the file breaks, in the order found.
    notices
        What is worth knowing and breaks nothing.
    n_checked
        Number of checksums of payload that were computed.
    """

    violations: tuple[Violation, ...]
    notices: tuple[str, ...] = ()
    n_checked: int = 0

    @property
    def ok(self) -> bool:
        """True if no rule is broken."""
        return not self.violations

    @property
    def unsupported(self) -> bool:
        """True if all that is wrong is that this version is too old for the file."""
        return bool(self.violations) and all(
            v.unsupported or v.rule in (2, 3, 23, 88) for v in self.violations
        )


def validate_bytes(
    data: Any,
    progress: Callable[[int, int], None] | None = None,
    *,
    header: bytes | None = None,
    size: Callable[[], int] | None = None,
) -> Report:
    """Validate a whole file.

    Parameters
    ----------
    data
        The file: bytes, memoryview or mmap.
    progress
        Called with bytes checked and bytes in all.
    header
        Preamble and slots, where they are not to be taken from `data`.
    size
        Bytes that the file has at this moment, where it can be cut short meanwhile: asked before
        each array is touched.

    Notes
    -----
    Rules build on one another: when the index is broken, what it points to is not checked.
    """
    index = Index(memoryview(data).cast("B"), header)
    found: list[Violation] = []
    for stage in OPEN_STAGES:
        now = list(stage(index))
        found += now
        if any(violation.rule not in (5, 12, 15) for violation in now):
            return Report(tuple(found))
    n_checked = 0
    total = index.file_length
    payload = _payload(index)
    while True:
        if size is not None and (now_size := size()) < total:
            message = f"the file was cut short to {now_size} bytes while it was read"
            return Report((*found, Violation(13, now_size, message)), (), n_checked)
        step = next(payload, None)
        if step is None:
            break
        violation, position = step
        n_checked += 1
        if violation is not None:
            found.append(violation)
        if progress is not None:
            progress(min(position, total), total)
    found += _padding(index)
    found += check_metadata(index)
    found += _errors(index)
    notices = []
    if len(index.data) > index.file_length:
        notices.append(
            f"{len(index.data) - index.file_length} bytes of scratch follow the collection: growth "
            "is under way, or was cut short; compacting removes them"
        )
    if progress is not None:
        progress(total, total)
    return Report(tuple(found), tuple(notices), n_checked)


def _payload(index: Index) -> Iterator[tuple[Violation | None, int]]:
    """Checksum and content of every frame, entry, blob and free extent."""
    frames = index.table("FRAM")
    for i, frame in enumerate(frames):
        start, length = int(frame["offset"]), int(frame["length"])
        yield _sum(index, 81, start, length, int(frame["crc"]), f"frame {i}"), start + length
        arrays = index.frame_arrays(frame)
        for violation in _arrays(index, start, start + length, arrays, f"frame {i}", 52):
            yield violation, start + length
    entries, names = index.table("ENTR"), index.task_names
    for number, task in enumerate(index.table("TASK")):
        offsets = index.entry_offsets(number)
        ids = index.task_targets(number)
        for j, start in enumerate(offsets):
            entry = entries[int(task["first_entry"]) + j]
            length = int(entry["length"])
            what = f"task {names[number]}, target {index.target_names[int(ids[j])]}"
            yield _sum(index, 80, start, length, int(entry["crc"]), what), start + length
            arrays = index.entry_arrays(int(entry["form"]), int(ids[j]))
            for violation in _arrays(index, start, start + length, arrays, what):
                yield violation, start + length
    for kind, name, rule in (("BLOB", "private content", 82), ("free", "free extent", 83)):
        for i, record in enumerate(index.table(kind)):
            start, length = int(record["offset"]), int(record["length"])
            yield _sum(index, rule, start, length, int(record["crc"]), f"{name} {i}"), start


def _sum(
    index: Index, rule: int, start: int, length: int, stored: int, what: str
) -> Violation | None:
    computed = check_sum(index.data, start, length, stored)
    if computed is None:
        return None
    message = f"{what}: stored checksum is {stored:#010x}, computed {computed:#010x}"
    return Violation(rule, start, message)


def _arrays(
    index: Index, start: int, end: int, arrays: list[tuple[int, int]], what: str, rule: int = 61
) -> Iterator[Violation]:
    """Padding, blocks and encodings of the runs between two offsets."""
    position = start
    for layout_id, row_length in arrays:
        for code, count in index.layout_runs(layout_id):
            encoding = ENCODINGS.get(code)
            if encoding is None:
                yield Violation(88, start, f"{what}: encoding {code:#04x} is not known")
                return
            if encoding.row_bytes is None:
                try:
                    length = encoding.run_bytes(index.data[position:end], count, row_length)
                except RmmError as error:
                    yield Violation(87, position, f"{what}: {error.message}")
                    return
            else:
                length = count * encoding.row_bytes(row_length)
                aligned = start + layout.ceil_to(position - start, layout.alignment(length, 1))
                if (at := _first_nonzero(index, position, min(aligned, end))) is not None:
                    yield Violation(85, at, f"{what}: padding is not zero")
                position = aligned
            if position + length > end:
                yield Violation(rule, position, f"{what}: arrays end behind their extent")
                return
            fault = encoding.check(index.data[position : position + length], count, row_length)
            if fault is not None:
                broken = 86 if encoding.row_bytes is not None else 87
                yield Violation(broken, position, f"{what}: {fault}")
            position += length
    if position != end:
        yield Violation(
            rule, start, f"{what}: arrays take {position - start} of {end - start} bytes"
        )


def _first_nonzero(index: Index, start: int, end: int) -> int | None:
    """Offset of the first byte that is not zero; ranges of padding are short."""
    for offset in range(start, end):
        if index.data[offset]:
            return offset
    return None


def _padding(index: Index) -> Iterator[Violation]:
    """Zeros between extents and between the entries of a run."""
    position = layout.HEADER_LENGTH
    for start, length, _, _ in extent_table(index):
        if (at := _first_nonzero(index, position, start)) is not None:
            yield Violation(72, at, f"padding before {start} is not zero")
        position = start + length
    for number, task in enumerate(index.table("TASK")):
        position, first = int(task["offset"]), int(task["first_entry"])
        for j, start in enumerate(index.entry_offsets(number)):
            if (at := _first_nonzero(index, position, start)) is not None:
                yield Violation(85, at, f"padding before entry {first + j} is not zero")
            position = start + int(index.table("ENTR")["length"][first + j])


def parse_metadata(raw: bytes) -> dict[str, Any]:
    """Parse metadata strictly (RMM-090).

    Raises
    ------
    FormatError
        Not one JSON object in UTF-8, duplicate keys, NaN or infinity, lone surrogates, or nested
        too deep.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            raise FormatError("metadata has duplicate keys", rule="RMM-090")
        return result

    def number(text: str) -> int | float:
        value = int(text) if text.lstrip("-").isdecimal() and len(text) < 20 else float(text)
        if not math.isfinite(value):
            raise FormatError(f"metadata holds the number {text[:40]}", rule="RMM-090")
        return value

    try:
        text = raw.decode()
        # Depth first, since the parser recurses: brackets outside of strings.
        if _depth(text) > MAX_DEPTH:
            raise FormatError(f"metadata is nested more than {MAX_DEPTH} deep", rule="RMM-090")
        value = json.loads(
            text, object_pairs_hook=pairs, parse_constant=number, parse_float=number,
            parse_int=number,
        )  # fmt: skip
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    except (RecursionError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"metadata is not JSON: {error}", rule="RMM-090") from None
    if not isinstance(value, dict):
        raise FormatError("metadata is not a JSON object", rule="RMM-090")
    return value


def _depth(text: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def read_metadata(index: Index) -> dict[str, Any] | None:
    """Metadata of a file, None where it has none.

    Raises
    ------
    FormatError
        They break RMM-026, RMM-090 or RMM-091.
    """
    raw = index.section_bytes("meta")
    if raw is None:
        return None
    offset = index.sections["meta"].offset
    try:
        value = parse_metadata(raw)
        wrong = fault(value)
        if wrong is not None:
            raise MetadataError(f"metadata: {wrong}", rule="RMM-091")
    except FormatError as error:
        raise MetadataError(error.message, rule=error.rule, offset=offset) from None
    return value


def check_metadata(index: Index) -> list[Violation]:
    """RMM-090 and RMM-091."""
    try:
        read_metadata(index)
    except FormatError as error:
        return [_violation(error, index.sections["meta"].offset)]
    return []


def _violation(error: FormatError, offset: int) -> Violation:
    return Violation(int((error.rule or "RMM-026")[4:]), offset, error.message)


def _errors(index: Index) -> list[Violation]:
    section = index.sections.get("erro")
    if section is None:
        return []
    try:
        errors = index.table("erro")["error"]
    except FormatError as error:
        return [_violation(error, section.offset)]
    if len(errors) not in (0, len(index.table("ENTR"))):
        message = f"{len(errors)} measured errors for {len(index.table('ENTR'))} entries"
        return [Violation(92, section.offset, message)]
    if np.any(errors < 0):
        return [Violation(92, section.offset, "a measured error is negative")]
    return []
