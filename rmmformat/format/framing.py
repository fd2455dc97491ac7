"""The rules of what frames the tables: preamble, slots, section table (specification, 5 and 6).

Stages of the same kind as those of :mod:`rmmformat.format.rules`, which run behind these.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rmmformat.format import layout
from rmmformat.format.reader import Index, Section, Slot, Violation, check_sum

__all__ = ["Broken", "header", "section_table", "slots"]

Broken = Iterator[Violation]


def header(index: Index) -> Broken:
    """Preamble and slots (section 5)."""
    data = memoryview(index.header)
    if len(data) < layout.HEADER_LENGTH:
        start = bytes(data[: len(layout.SIGNATURE)])
        if start != layout.SIGNATURE:
            yield Violation(1, 0, f"file starts with {start.hex(' ') or 'nothing'}")
        else:
            n_bytes = len(data)
            yield Violation(13, n_bytes, f"file has {n_bytes} bytes, a header 640")
        return
    preamble = np.frombuffer(data[: layout.PREAMBLE.itemsize], layout.PREAMBLE)[0]
    if bytes(data[:8]) != layout.SIGNATURE:
        got, want = bytes(data[:8]).hex(" "), layout.SIGNATURE.hex(" ")
        yield Violation(1, 0, f"file starts with {got}, not {want}")
        return
    if preamble["major"] != layout.MAJOR:
        yield Violation(2, 8, f"major version is {preamble['major']}, this reader knows 1")
        return
    if (computed := check_sum(data, 0, 60, int(preamble["crc"]))) is not None:
        yield Violation(
            4, 60, f"preamble checksum is {preamble['crc']:#010x}, computed {computed:#010x}"
        )
    if preamble["features"]:
        yield Violation(3, 12, f"unknown features {preamble['features']:#x}")
    first = layout.SLOT_OFFSETS[0] + layout.SLOT.itemsize
    for at, end in ((16, 60), (first, layout.SLOT_OFFSETS[1])):
        if any(data[at:end]):
            yield Violation(5, at, f"reserved bytes {at} to {end - 1} are not zero")
    index.minor = int(preamble["minor"])


def slots(index: Index) -> Broken:
    """The two slots and what the active one says."""
    data, header = index.data, memoryview(index.header)
    parity_broken = None
    for number, offset in enumerate(layout.SLOT_OFFSETS):
        raw = header[offset : offset + layout.SLOT.itemsize]
        record = np.frombuffer(raw, layout.SLOT)[0]
        sequence = int(record["sequence"])
        state = "valid"
        if not any(raw):
            state = "empty"
        elif check_sum(header, offset, 124, int(record["crc"])) is not None:
            state = "damaged"
        elif sequence == 0 or sequence % 2 != 1 - number:
            state = "damaged"
            parity_broken = parity_broken or Violation(
                11, offset, f"sequence {sequence} does not belong in slot {number}"
            )
        index.slots.append(Slot(offset, record, state))
    valid = [slot for slot in index.slots if slot.state == "valid"]
    if not valid:
        yield parity_broken or Violation(10, layout.SLOT_OFFSETS[0], "neither slot is valid")
        return
    for number, slot in enumerate(index.slots):
        if slot.state == "damaged":
            yield Violation(12, slot.offset, f"slot {number} is damaged")
        if slot.state == "valid" and index.minor == 0 and any(bytes(slot.record["unused"])):
            yield Violation(15, slot.offset + 56, f"unused bytes of slot {number} are not zero")
    active = max(valid, key=lambda slot: int(slot.record["sequence"]))
    record, offset = active.record, active.offset
    index.active = record
    length, limit = int(record["file_length"]), int(record["growth_limit"])
    if length > len(data):
        yield Violation(13, offset + 8, f"file has {len(data)} bytes, its header says {length}")
    if limit < length or limit < len(data):
        yield Violation(
            14,
            offset + 16,
            f"growth limit {limit} is below the recorded length {length} or the file's "
            f"{len(data)} bytes",
        )
    size = int(record["section_record_size"])
    if size < 40 or size % 8 or (index.minor == 0 and size != 40):
        yield Violation(17, offset + 48, f"section record size is {size}, expected 40")
        return
    start, index_length = int(record["index_offset"]), int(record["index_length"])
    if (
        start % 8
        or start < layout.HEADER_LENGTH
        or start + index_length > length
        or int(record["n_sections"]) * size > index_length
    ):
        yield Violation(
            16,
            offset + 24,
            f"index of {index_length} bytes with {record['n_sections']} sections at {start} does "
            f"not fit a file of {length} bytes",
        )


def section_table(index: Index) -> Broken:
    """The section table and every section's place, size and checksum (section 6)."""
    data, active = index.data, index.active
    start, size = int(active["index_offset"]), int(active["section_record_size"])
    count = int(active["n_sections"])
    table_length = count * size
    computed = check_sum(data, start, table_length, int(active["section_table_crc"]))
    if computed is not None:
        yield Violation(20, start, f"section table checksum computed {computed:#010x}")
        return
    end = start + int(active["index_length"])
    position = start + table_length
    for number in range(count):
        at = start + number * size
        record = np.frombuffer(data[at : at + layout.SECTION.itemsize], layout.SECTION)[0]
        raw_type = bytes(data[at : at + 4])
        if not raw_type.isalpha() or not raw_type.isascii():
            yield Violation(22, at, f"section type {raw_type!r} is not four ASCII letters")
            return
        kind = raw_type.decode()
        if kind in index.sections:
            yield Violation(22, at, f"section {kind} occurs twice")
            return
        offset, length = int(record["offset"]), int(record["length"])
        if (
            offset % 8
            or not position <= offset < position + 8
            or length > end - offset
            or any(data[position:offset])
        ):
            yield Violation(
                21,
                at + 8,
                f"section {kind} of {length} bytes at {offset} does not follow {position} within "
                f"the index that ends at {end}",
            )
            return
        position = offset + length
        known = layout.RECORDS.get(kind)
        if known is None and kind[0].isupper():
            yield Violation(23, at, f"section {kind} is critical and not known")
            return
        computed = check_sum(data, offset, length, int(record["crc"]))
        if computed is not None:
            yield Violation(25, at + 36, f"section {kind} checksum computed {computed:#010x}")
            return
        section = Section(
            kind, offset, length, int(record["count"]), int(record["coding"]),
            int(record["record_size"]),
        )  # fmt: skip
        broken = list(_sizes(index, section, at))
        yield from broken
        if broken:
            return
        index.sections[kind] = section
    if position != end:
        yield Violation(21, start, f"sections end at {position}, the index at {end}")


def _sizes(index: Index, section: Section, at: int) -> Broken:
    """RMM-024 and what of RMM-026 needs no decoding; `at` is the record's offset."""
    kind, size, n_bytes = section.type, section.record_size, section.count * section.record_size
    known = layout.RECORDS.get(kind)
    if known is not None:
        least = known.itemsize
        if size < least or (size > least and (index.minor == 0 or least == 1)):
            yield Violation(24, at + 32, f"record size of {kind} is {size}, expected {least}")
            return
    if section.coding == 0:
        if n_bytes != section.length:
            message = f"section {kind} has {section.length} bytes, its records take {n_bytes}"
            yield Violation(24, at + 16, message)
        return
    limit = layout.DEFLATE_RATIO * section.length + layout.DEFLATE_FLOOR
    if section.coding != 1 or kind[0].isupper() or kind == "free" or n_bytes > limit:
        message = f"section {kind}: coding {section.coding} of {n_bytes} bytes"
        yield Violation(26, at + 4, message)
