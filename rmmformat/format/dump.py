"""A file as annotated hex: every field with its offset, bytes, value and rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from rmmformat.format import layout
from rmmformat.format.reader import Index

__all__ = ["Field", "dump_fields"]

#: Rules that speak of the fields of a structure.
_RULES = {
    "preamble": {"signature": 1, "major": 2, "features": 3, "crc": 4, "reserved": 5},
    "slot": {
        "sequence": 11, "file_length": 13, "growth_limit": 14, "index_offset": 16,
        "index_length": 16, "n_sections": 16, "section_record_size": 17,
        "section_table_crc": 20, "unused": 15, "crc": 12,
    },
    "section": {"type": 22, "coding": 26, "offset": 21, "length": 21, "count": 24,
                "record_size": 24, "crc": 25},
    "STRS": {"byte": 30},
    "TARG": {"name": 35, "": 36},
    "RUNS": {"": 40},
    "LAYO": {"": 41},
    "FORM": {"": 42},
    "FRAM": {"target": 50, "offset": 70, "length": 52, "crc": 81, "": 51},
    "TLST": {"": 57},
    "TASK": {"name": 55, "offset": 58, "length": 58, "first_target": 57, "": 56},
    "ENTR": {"length": 61, "form": 60, "crc": 80},
    "DIMS": {"": 66},
    "PRIV": {"": 65},
    "BLOB": {"crc": 82, "": 67},
    "erro": {"": 92},
    "free": {"crc": 83, "": 71},
    "meta": {"": 90},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Field:
    """One line of a dump."""

    offset: int
    raw: bytes
    where: str
    name: str
    value: str
    rule: str


def dump_fields(index: Index, limit: int | None = None) -> Iterator[Field]:
    """Walk a file in the order of its bytes.

    Parameters
    ----------
    index
        From :func:`~rmmformat.format.reader.read_index`.
    limit
        At most so many records of a table, so many bytes of a blob; None for all.
    """
    data = index.data
    yield from _record("preamble", layout.PREAMBLE, data, 0, "preamble", 0)
    for number, offset in enumerate(layout.SLOT_OFFSETS):
        state = index.slots[number].state
        what = f"slot {number} ({state})"
        if state == "empty":
            raw = bytes(data[offset : offset + layout.SLOT.itemsize])
            yield Field(offset, raw, what, "all", "zero", "RMM-012")
        else:
            yield from _record("slot", layout.SLOT, data, offset, what, 0)
    yield from _extents(index, limit)
    start, size = int(index.active["index_offset"]), int(index.active["section_record_size"])
    for number, name in enumerate(index.sections):
        at = start + number * size
        yield from _record("section", layout.SECTION, data, at, f"section {name}", 0)
    for name, section in index.sections.items():
        record = layout.RECORDS.get(name)
        content = data[section.offset : section.offset + section.length]
        if name == "STRS":
            position = section.offset
            for i, string in enumerate(index.strings[:limit]):
                stored = string.encode() + b"\0"
                yield Field(position, stored, f"STRS {i}", "string", string, "RMM-030")
                position += len(stored)
        elif record is None or name == "meta" or section.coding:
            shown = bytes(content if limit is None else content[: limit * 16])
            coding = "deflated" if section.coding else "as it is"
            value = f"{section.length} bytes, {coding}"
            rule = "RMM-090" if name == "meta" else ""
            yield Field(section.offset, shown, name, "content", value, rule)
        else:
            stride = section.length // section.count
            count = section.count if limit is None else min(section.count, limit)
            for i in range(count):
                at = section.offset + i * stride
                yield from _record(name, record, data, at, f"{name} {i}", 0)


def _extents(index: Index, limit: int | None) -> Iterator[Field]:
    from rmmformat.format.rules import extent_table

    for start, size, kind, _ in extent_table(index):
        if kind != "index":
            shown = size if limit is None else min(size, limit * 16)
            raw = bytes(index.data[start : start + shown])
            rule = {"frame": "RMM-081", "task": "RMM-080", "blob": "RMM-082", "free": "RMM-083"}
            yield Field(start, raw, kind, "extent", f"{size} bytes", rule[kind.split()[0]])


def _record(
    kind: str, dtype: np.dtype[Any], data: memoryview, at: int, where: str, depth: int
) -> Iterator[Field]:
    rules = _RULES[kind]
    record = np.frombuffer(data[at : at + dtype.itemsize], dtype)[0]
    for name in dtype.names or ():
        field, offset = dtype.fields[name][:2]  # type: ignore[index]
        raw = bytes(data[at + offset : at + offset + field.itemsize])
        if field.names:
            for inner in _record(kind, field, data, at + offset, where, depth + 1):
                yield dataclasses.replace(inner, name=f"{name}.{inner.name}")
            continue
        rule = rules.get(name, rules.get("", 37 if name.startswith("reserved") else 0))
        if name.startswith("reserved") and kind not in ("preamble",):
            rule = 37
        shown = _show(record[name], name)
        yield Field(at + offset, raw, where, name, shown, f"RMM-{rule:03d}" if rule else "")


def _show(value: Any, name: str) -> str:
    if isinstance(value, (np.void, bytes)):
        raw = value if isinstance(value, bytes) else value.tobytes()
        return "zero" if not any(raw) else repr(raw)[1:]
    if isinstance(value, np.ndarray):
        return " ".join(str(item) for item in value.tolist())
    if isinstance(value, np.floating):
        return repr(float(value))
    number = int(value)
    if number == layout.NONE:
        return "NONE"
    return f"{number:#010x}" if "crc" in name else str(number)
