"""Reader and validator of ``.rmm`` files, written from the text of ``rmm-1.md`` alone.

It is slow and short, to be read beside the text: each function names the clause that it obeys, and
no code is shared with any other reader.  ``open_file`` refuses a file at the first rule that it
breaks; ``validate`` lists what it breaks.  Checks run in steps, in the order of section 12; a step
relies on the ones before it, so a listing ends with the first step that finds the file unusable.

``python reference.py FILE`` lists the tasks of a file and the rules that it breaks.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
import zlib
from bisect import bisect_right
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
NONE = 0xFFFFFFFF
SIGNATURE = b"\x89RMM\r\n\x1a\n"


class Refused(Exception):  # noqa: N818
    """The file breaks ``rule`` at ``offset``; ``status`` is malformed or unsupported."""

    def __init__(self, rule: str, offset: int, message: str, status: str = "malformed") -> None:
        super().__init__(f"{rule} at {offset}: {message}")
        self.rule, self.offset, self.message, self.status = rule, offset, message, status


def ceil_to(x: int, a: int) -> int:
    """2: "the least multiple of a that is not less than x"."""
    return -(-x // a) * a


# --- CRC32C: Castagnoli's polynomial 1EDC6F41, reflected, register and result inverted -----------

_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    _TABLE = (_TABLE >> 1) ^ np.where(_TABLE & 1, np.uint32(0x82F63B78), np.uint32(0))
_LIST = _TABLE.tolist()


def crc32c(data: bytes) -> int:
    """Return the CRC32C; long data are split into lanes that numpy takes forward together."""
    register, lanes = NONE, len(data) // 512 if len(data) >= 8192 else 0
    if lanes:
        steps = len(data) // lanes
        columns = np.frombuffer(data[: lanes * steps], np.uint8).reshape(lanes, steps)
        state, shift = np.zeros(lanes, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)
        for i in range(steps):
            state = _TABLE[(state ^ columns[:, i]) & 255] ^ (state >> 8)
            shift = _TABLE[shift & 255] ^ (shift >> 8)  # what `steps` zero bytes make of each bit
        matrix = shift.tolist()
        for lane in state.tolist():
            moved = lane
            for bit in range(32):
                if register >> bit & 1:
                    moved ^= matrix[bit]
            register = moved
        data = data[lanes * steps :]
    for byte in data:
        register = _LIST[(register ^ byte) & 255] ^ register >> 8
    return register ^ NONE


# --- Encodings (8.2) -----------------------------------------------------------------------------


def q_blocks(raw: bytes, bits: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """8.2: "a sequence of blocks of 32 values, each block an f16 scale d [...] and 32 codes"."""
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, 2 + 4 * bits)
    scales, packed = blocks[:, :2].copy().view("<f2")[:, 0], blocks[:, 2:]
    if bits == 8:
        return scales, packed
    if bits == 4:  # "byte i holds the code of value i in its low and of value i + 16 in its high"
        return scales, np.concatenate([packed & 15, packed >> 4], axis=1)
    # "one little-endian integer of 32 · N bits in which value i has bits i·N … i·N + N − 1"
    split = np.unpackbits(packed, axis=1, bitorder="little").reshape(-1, 32, bits)
    return scales, (split << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)


def q_decode(bits: int) -> Callable[[bytes, int], F32]:
    """8.2, column *value*; "the product with d is exact in f32"."""

    def decode(raw: bytes, n: int) -> F32:
        scales, codes = q_blocks(raw, bits)
        u = codes.astype(np.int32)
        level = {8: codes.view(np.int8), 4: u - 8}.get(bits, 2 * u - (2**bits - 1))
        return (scales.astype(np.float32)[:, None] * level.astype(np.float32)).reshape(-1)[:n]

    return decode


class Encoding(NamedTuple):
    """A row of the table in 8.2; one without ``row_bytes`` is not fixed-size."""

    name: str
    row_bytes: Callable[[int], int] | None
    decode: Callable[[bytes, int], F32]  # the bytes of one row and its length n
    bits: int = 0  # of a quantised value


def _quantised(name: str, bits: int) -> Encoding:
    return Encoding(name, lambda n: (2 + 4 * bits) * -(-n // 32), q_decode(bits), bits)


def _bf16(raw: bytes, n: int) -> F32:  # noqa: ARG001
    """8.2: "the upper half of a binary32"."""
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


ENCODINGS = {
    0x00: Encoding("zero", lambda n: 0, lambda raw, n: np.zeros(n, np.float32)),  # noqa: ARG005
    0x01: Encoding("f32", lambda n: 4 * n, lambda raw, n: np.frombuffer(raw, "<f4")),  # noqa: ARG005
    0x02: Encoding(
        "f16",
        lambda n: 2 * n,
        lambda raw, n: np.frombuffer(raw, "<f2").astype(np.float32),  # noqa: ARG005
    ),
    0x03: Encoding("bf16", lambda n: 2 * n, _bf16),
    0x11: _quantised("q1", 1),
    0x12: _quantised("q2", 2),
    0x13: _quantised("q3", 3),
    0x14: _quantised("q4_0", 4),
    0x15: _quantised("q5", 5),
    0x16: _quantised("q6", 6),
    0x17: _quantised("q7", 7),
    0x18: _quantised("q8_0", 8),
}

# --- Tables (6.1): record layouts in the order of the fields ------------------------------------

PART = "group n_components rank mean basis flags reserved"
RECORDS = {
    "TARG": ("<QQ3HBBII", "n_in n_out k0 k1 k2 kind flags name reserved"),
    "RUNS": ("<IB3s", "count encoding reserved"),
    "LAYO": ("<QII", "first_run n_runs n_rows"),
    "FORM": (
        "<d6IBB6s",
        "scale rank cluster coefficients_a residual_a coefficients_b residual_b "
        "dtype_a dtype_b reserved",
    ),
    "FRAM": (
        "<QQIIQ6IQ6I",
        "offset length target crc "
        + " ".join(f"{name}_{side}" for side in "ab" for name in PART.split()),
    ),
    "TLST": ("<I", "target"),
    "TASK": (
        "<7QII",
        "offset length first_entry n_entries first_target first_private n_privates name reserved",
    ),
    "ENTR": ("<QII", "length form crc"),
    "DIMS": ("<Q", "size"),
    "PRIV": ("<IIBBBBIQ", "name blob dtype n_dims role reserved reserved2 first_dim"),
    "BLOB": ("<QQII", "offset length crc reserved"),
    "erro": ("<f", "error"),
    "free": ("<QQII", "offset length crc reserved"),
}
TUPLES = {name: namedtuple(name, fields) for name, (_, fields) in RECORDS.items()}  # type: ignore[misc]
SIZES = {"STRS": 1, "meta": 1} | {name: struct.calcsize(fmt) for name, (fmt, _) in RECORDS.items()}
Part = namedtuple("Part", PART)
ABSENT = Part(0, 0, 0, NONE, NONE, 0, 0)
Section = namedtuple("Section", "type coding offset length count record_size crc")
Slot = namedtuple(
    "Slot",
    "sequence file_length growth_limit index_offset index_length n_sections "
    "section_record_size section_table_crc unused crc",
)
DTYPES = {
    1: "f32 4", 2: "f16 2", 3: "bf16 2", 4: "f64 8", 5: "i8 1", 6: "u8 1", 7: "i16 2", 8: "u16 2",
    9: "i32 4", 10: "u32 4", 11: "i64 8", 12: "u64 8", 13: "bool 1", 14: "f8_e4m3 1",
    15: "f8_e5m2 1", 16: "c64 8",
}  # fmt: skip


class Array:
    """7.2: "An array is its runs in order"; here with the place of each run in the payload."""

    def __init__(self, payload: bytes, n: int) -> None:
        self.payload, self.n = payload, n
        self.firsts: list[int] = []
        self.runs: list[tuple[int, int, Encoding, int]] = []  # position, count, encoding, n_bytes

    def row(self, i: int) -> F32:
        at = bisect_right(self.firsts, i) - 1
        position, _, encoding, _ = self.runs[at]
        assert encoding.row_bytes is not None
        size = encoding.row_bytes(self.n)
        position += (i - self.firsts[at]) * size
        return encoding.decode(self.payload[position : position + size], self.n)


class Member(NamedTuple):
    """What a task stores at one target (term *entry*), with its place in the file."""

    index: int
    offset: int
    record: Any
    target: Any
    form: Any
    frame: int | None  # id


class Collection:
    """The checked index of a file; payload is decoded by ``load``."""

    def __init__(self, data: bytes, listing: list[tuple[str, int, str]] | None) -> None:
        self.data, self.listing, self.usable = data, listing, True
        self.sections: dict[str, Section] = {}
        self.raw: dict[str, bytes] = {}
        self.table: dict[str, list[Any]] = {name: [] for name in RECORDS}
        self.lengths: dict[tuple[Any, ...], int | None] = {}
        steps = [
            self.preamble, self.slots, self.index, self.section_table, self.decode, self.strings,
            self.targets, self.layouts, self.forms, self.frames, self.tasks_table, self.lists,
            self.entries_table, self.privates_table, self.extents,
        ]  # fmt: skip
        if listing is not None:
            steps += [self.optional_sections, self.payloads]
        for step in steps:
            if self.usable:
                step()

    # A broken "open" or "load" rule refuses the file, or is listed and ends the listing with this
    # step; "validate" rules are only listed.

    def broken(self, rule: str, offset: int, message: str, status: str = "malformed") -> None:
        if self.listing is None:
            raise Refused(rule, offset, message, status)
        self.usable = False
        self.listing.append((rule, offset, message))

    def note(self, rule: str, offset: int, message: str) -> None:
        if self.listing is not None:
            self.listing.append((rule, offset, message))

    def zeros(self, start: int, end: int) -> int | None:
        """Return the offset of the first byte in the range that is not zero."""
        found = re.search(rb"[^\0]", self.data[start:end])
        return None if found is None else start + found.start()

    def at(self, table: str, i: int) -> int:
        """Return the offset of a record; of the section, where the section is deflated."""
        if table not in self.sections:
            return self.slot.index_offset
        section = self.sections[table]
        return section.offset + (0 if section.coding else i * section.record_size)

    # --- 5 Header ---

    def preamble(self) -> None:
        """5.1, RMM-001 to RMM-005."""
        data = self.data
        if data[:8] != SIGNATURE:
            return self.broken("RMM-001", 0, "no signature")
        if len(data) < 640:  # no file_length can be smaller (RMM-016)
            return self.broken("RMM-013", len(data), f"the header is 640 bytes, not {len(data)}")
        major, self.minor, features = struct.unpack_from("<HHI", data, 8)
        if major != 1:
            self.broken("RMM-002", 8, f"major version {major}, not 1", "unsupported")
        if features:
            self.broken("RMM-003", 12, f"features {features:#x}, not 0", "unsupported")
        if crc32c(data[:60]) != struct.unpack_from("<I", data, 60)[0]:
            self.broken("RMM-004", 60, "wrong crc of the preamble")
        for start, end in ((16, 60), (192, 512)):
            spare = self.zeros(start, end)
            if spare is not None:
                self.broken("RMM-005", spare, "reserved byte is not zero")
        return None

    def slots(self) -> None:
        """5.2: "The active slot is the valid slot with the larger sequence" (RMM-010 to 012)."""
        valid, damaged = [], []
        for base, parity in ((64, 1), (512, 0)):
            raw = self.data[base : base + 128]
            slot = Slot._make(struct.unpack("<6QII68sI", raw))
            if crc32c(raw[:124]) != slot.crc:
                damaged += [("RMM-012", base, "damaged slot: wrong crc")] if any(raw) else []
            elif slot.sequence == 0 or slot.sequence % 2 != parity:
                damaged.append(("RMM-011", base, f"damaged slot: sequence {slot.sequence}"))
            else:
                valid.append((slot, base))
                if any(slot.unused) and self.minor == 0:
                    self.note("RMM-015", base + 56, "unused byte is not zero")
        if not valid:  # a right crc shows that the sequence is at fault
            at_fault = [fault for fault in damaged if fault[0] == "RMM-011"]
            return self.broken(*(at_fault or [("RMM-010", 64, "no valid slot")])[0])
        for fault in damaged:
            self.note(*fault)
        self.slot, self.base = max(valid)
        return None

    def index(self) -> None:
        """5.2 and 6, RMM-013 to RMM-017."""
        slot, base = self.slot, self.base
        if slot.file_length > len(self.data):
            self.broken("RMM-013", base + 8, f"{slot.file_length} bytes cut to {len(self.data)}")
        if slot.growth_limit < max(slot.file_length, len(self.data)):
            self.broken("RMM-014", base + 16, f"growth_limit {slot.growth_limit} is too small")
        size = slot.section_record_size
        if size < 40 or size % 8 or (self.minor == 0 and size != 40):
            self.broken("RMM-017", base + 48, f"section_record_size {size}")
        if slot.index_offset % 8 or slot.index_offset < 640:
            self.broken("RMM-016", base + 24, f"index at {slot.index_offset}")
        if slot.index_offset + slot.index_length > slot.file_length:
            self.broken("RMM-016", base + 32, "the index ends behind file_length")
        if slot.n_sections * size > slot.index_length:
            self.broken("RMM-016", base + 40, f"no room for {slot.n_sections} section records")

    # --- 6 Index ---

    def section_table(self) -> None:
        """6, RMM-020 to RMM-026."""
        slot, size = self.slot, self.slot.section_record_size
        start, end = slot.index_offset, slot.index_offset + slot.index_length
        position = start + slot.n_sections * size
        if crc32c(self.data[start:position]) != slot.section_table_crc:
            return self.broken("RMM-020", start, "wrong crc of the section table")
        for at in range(start, position, size):
            section = Section._make(struct.unpack_from("<4sIQQQII", self.data, at))
            name = section.type.decode("latin-1")
            if not re.fullmatch("[A-Za-z]{4}", name) or name in self.sections:
                self.broken("RMM-022", at, f"section type {name!r}")
            critical, n_bytes = name[0].isupper(), section.count * section.record_size
            if critical and name not in SIZES:
                self.broken("RMM-023", at, f"unknown critical section {name!r}", "unsupported")
            least = SIZES.get(name, 0)
            exact = name in SIZES and (self.minor == 0 or name in ("STRS", "meta"))
            if section.record_size < least or (exact and section.record_size != least):
                self.broken("RMM-024", at, f"{name}: record_size {section.record_size}")
            if section.coding == 0 and section.length != n_bytes:
                self.broken("RMM-024", at, f"{name}: {section.length} bytes, not {n_bytes}")
            if section.coding > 1 or (section.coding == 1 and critical):
                self.broken("RMM-026", at, f"{name}: coding {section.coding}")
            if section.coding == 1 and n_bytes > 256 * section.length + 65536:
                self.broken("RMM-026", at, f"{name}: {n_bytes} bytes from {section.length}")
            if section.offset != ceil_to(position, 8) or section.offset + section.length > end:
                return self.broken("RMM-021", at, f"{name}: at {section.offset}")
            spare = self.zeros(position, section.offset)
            if spare is not None:
                self.broken("RMM-021", spare, "byte between sections is not zero")
            position = section.offset + section.length
            if crc32c(self.data[section.offset : position]) != section.crc:
                self.broken("RMM-025", section.offset, f"{name}: wrong crc")
            self.sections[name] = section
        if position != end:
            self.broken("RMM-021", position, "the last section does not end the index")
        return None

    def inflate(self, section: Section) -> bytes | None:
        """6: "a zlib stream (RFC 1950) of count · record_size bytes" (RMM-026)."""
        raw = self.data[section.offset : section.offset + section.length]
        n_bytes, stream = section.count * section.record_size, zlib.decompressobj()
        try:
            plain = stream.decompress(raw, n_bytes + 1)
        except zlib.error:
            return None
        whole = stream.eof and not stream.unused_data and len(plain) == n_bytes
        return plain if whole else None

    def decode(self) -> None:
        """6: "a reader steps by record_size and ignores what it does not know"."""
        for name, section in self.sections.items():
            raw: bytes | None = self.data[section.offset : section.offset + section.length]
            if section.coding == 1 and (name in SIZES or self.listing is not None):
                raw = self.inflate(section)
                if raw is None:
                    return self.broken("RMM-026", section.offset, f"{name}: bad zlib stream")
            if name in SIZES:
                self.raw[name] = raw or b""
            if name in RECORDS:
                step = RECORDS[name][0] + f"{section.record_size - SIZES[name]}x"
                self.table[name] = [*map(TUPLES[name]._make, struct.iter_unpack(step, raw or b""))]
        return None

    def strings(self) -> None:
        """6.1 STRS, RMM-030 and RMM-031."""
        raw, self.names, before, position = self.raw.get("STRS", b""), [], b"", 0
        for text in raw.split(b"\0")[:-1]:
            at = self.at("STRS", position)
            try:
                self.names.append(text.decode("utf-8"))
            except UnicodeDecodeError:
                self.broken("RMM-030", at, f"string {text!r} is not UTF-8")
            if not 1 <= len(text) <= 1024 or re.search(rb"[\0-\x1f\x7f]", text):
                self.broken("RMM-030", at, f"string {text[:40]!r}: length or control character")
            elif text <= before:
                self.broken("RMM-031", at, f"string {text!r} is not above {before!r}")
            before, position = text, position + len(text) + 1
        if position != len(raw):
            self.broken("RMM-030", self.at("STRS", position), "the last string has no end")

    def targets(self) -> None:
        """6.1 TARG, RMM-035 to RMM-037."""
        before: tuple[int, ...] = ()
        for i, t in enumerate(self.table["TARG"]):
            at, kernel = self.at("TARG", i), (t.k0, t.k1, t.k2)
            sizes = [k for k in kernel if k]
            if t.kind > 2:
                self.broken("RMM-036", at, f"unknown kind {t.kind}", "unsupported")
            elif not (1 <= t.n_in <= 2**40 and 1 <= t.n_out <= 2**40 and t.flags <= 1):
                self.broken("RMM-036", at, f"sides {t.n_in}, {t.n_out}, flags {t.flags}")
            elif (t.kind == 2) != bool(sizes) or kernel != (*sizes, 0, 0, 0)[:3]:
                self.broken("RMM-036", at, f"kernel {kernel} of kind {t.kind}")
            elif t.n_in % math.prod(sizes):
                self.broken("RMM-036", at, f"n_in {t.n_in} is no multiple of kernel {kernel}")
            if t.reserved:
                self.broken("RMM-037", at, "reserved field is not zero")
            key = (t.name, t.n_in, t.n_out, t.kind, t.flags, *kernel)
            if t.name >= len(self.names) or key <= before:
                self.broken("RMM-035", at, f"name {t.name}, or order")
            before = key

    def layouts(self) -> None:
        """6.1 RUNS and LAYO, RMM-037, RMM-040, RMM-041."""
        for i, run in enumerate(self.table["RUNS"]):
            if any(run.reserved):
                self.broken("RMM-037", self.at("RUNS", i), "reserved field is not zero")
            if run.count == 0:
                self.broken("RMM-040", self.at("RUNS", i), "empty run")
        first = 0
        for i, layout in enumerate(self.table["LAYO"]):
            runs = self.table["RUNS"][first : first + layout.n_runs]
            tiles = layout.first_run == first and len(runs) == layout.n_runs > 0
            if not tiles or sum(run.count for run in runs) != layout.n_rows:
                return self.broken("RMM-041", self.at("LAYO", i), f"layout {i}: {layout}")
            first += layout.n_runs
        if first != len(self.table["RUNS"]):
            self.broken("RMM-041", self.at("RUNS", first), "runs without a layout")
        return None

    def n_rows(self, layout: int) -> int:
        return 0 if layout == NONE else self.table["LAYO"][layout].n_rows

    def known(self, *layouts: int) -> bool:
        return all(i == NONE or i < len(self.table["LAYO"]) for i in layouts)

    def forms(self) -> None:
        """6.1 FORM, RMM-037, RMM-042, RMM-043."""
        for i, f in enumerate(self.table["FORM"]):
            at = self.at("FORM", i)
            if any(f.reserved):
                self.broken("RMM-037", at, "reserved field is not zero")
            if not math.isfinite(f.scale) or not 1 <= f.rank <= 2**20:
                self.broken("RMM-042", at, f"scale {f.scale}, rank {f.rank}")
            if f.dtype_a not in (1, 2, 3) or f.dtype_b not in (1, 2, 3):
                self.broken("RMM-042", at, f"dtypes {f.dtype_a}, {f.dtype_b}")
            residuals = f.residual_a, f.residual_b
            if not self.known(f.coefficients_a, f.coefficients_b, *residuals):
                self.broken("RMM-042", at, "unknown layout")
            elif any(x != NONE and self.n_rows(x) != f.rank for x in residuals):
                self.broken("RMM-043", at, f"a residual has not {f.rank} rows")

    def part_fits(self, part: Any, length: int) -> bool:
        """6.1 FRAM: "In a part that is not absent (RMM-051)"."""
        mixing, p, rank = part.flags & 1, part.n_components, part.rank
        return (
            1 <= rank <= 2**20
            and 1 <= part.group <= length
            and (not mixing or part.group == length)
            and p <= 2**20
            and (part.basis == NONE) == (p == 0)
            and part.flags <= 1
            and self.known(part.mean, part.basis)
            and (part.mean == NONE or self.n_rows(part.mean) == rank)
            and (part.basis == NONE or self.n_rows(part.basis) == p * (1 if mixing else rank))
            and not part.mean == part.basis == NONE
        )

    def frames(self) -> None:
        """6.1 FRAM, RMM-037 and RMM-050 to RMM-052."""
        self.clusters: dict[int, list[int]] = {}
        before = 0
        for i, f in enumerate(self.table["FRAM"]):
            at, parts = self.at("FRAM", i), (Part._make(f[4:11]), Part._make(f[11:18]))
            if f.target >= len(self.table["TARG"]) or f.target < before:
                self.broken("RMM-050", at, f"target {f.target}")
                continue
            before = f.target
            self.clusters.setdefault(f.target, []).append(i)
            target = self.table["TARG"][f.target]
            if any(part.reserved for part in parts):
                self.broken("RMM-037", at, "reserved field is not zero")
            fit = (p == ABSENT or self.part_fits(p, n) for p, n in zip(parts, target[:2]))  # noqa: B905
            if not all(fit) or parts == (ABSENT, ABSENT):
                self.broken("RMM-051", at, f"parts {parts}")
                continue
            takes = self.length(self.frame_arrays(i))
            if takes not in (None, f.length) or (f.length == 0 and f.offset):
                self.broken("RMM-052", at, f"{f.length} at {f.offset}, arrays take {takes}")

    def parts(self, frame: int | None) -> tuple[Any, Any]:
        """Return the parts of a frame; cluster 0 is as if both were absent."""
        if frame is None:
            return ABSENT, ABSENT
        record = self.table["FRAM"][frame]
        return Part._make(record[4:11]), Part._make(record[11:18])

    def tasks_table(self) -> None:
        """6.1 TASK, RMM-037, RMM-055, RMM-056; the second half of RMM-058."""
        entries, privates, before, self.tasks = 0, 0, -1, []
        for i, t in enumerate(self.table["TASK"]):
            at = self.at("TASK", i)
            if t.reserved:
                self.broken("RMM-037", at, "reserved field is not zero")
            if t.name >= len(self.names) or t.name <= before:
                self.broken("RMM-055", at, f"name {t.name}")
            else:
                self.tasks.append(self.names[t.name])
            if t.first_entry != entries or t.first_private != privates:
                self.broken("RMM-056", at, "entries or private tensors do not follow on")
            if t.length == 0 and t.offset:
                self.broken("RMM-058", at, f"an empty run at {t.offset}")
            before, entries, privates = t.name, entries + t.n_entries, privates + t.n_privates
        if entries != len(self.table["ENTR"]) or privates != len(self.table["PRIV"]):
            self.broken("RMM-056", self.at("TASK", 0), "entries or privates without a task")

    def lists(self) -> None:
        """6.1 TLST and TASK, RMM-057."""
        targets = self.table["TARG"]
        for i, t in enumerate(self.table["TASK"]):
            ids = [x.target for x in self.table["TLST"][t.first_target :][: t.n_entries]]
            ascending = all(a < b for a, b in pairwise(ids))
            known = t.first_target + t.n_entries <= len(self.table["TLST"])
            if not known or not ascending or any(x >= len(targets) for x in ids):
                self.broken("RMM-057", self.at("TASK", i), "list of targets")
            elif len({targets[x].name for x in ids}) != len(ids):
                self.broken("RMM-057", self.at("TASK", i), "two targets of one name")

    def entries_table(self) -> None:
        """6.1 ENTR and 7.1, RMM-058 and RMM-060 to RMM-062."""
        for i, t in enumerate(self.table["TASK"]):
            end = n_values = 0
            for m in self.members(i):
                at = self.at("ENTR", m.index)
                if m.form is None or not self.entry_fits(m):
                    self.broken("RMM-060", at, f"form {m.record.form} does not fit")
                    continue
                takes = self.length(self.entry_arrays(m))
                if takes not in (None, m.record.length):
                    self.broken("RMM-061", at, f"length {m.record.length}, arrays take {takes}")
                end = m.offset + m.record.length - t.offset
                n_values += m.form.rank * (m.target.n_in + m.target.n_out)
            if self.usable and end != t.length:
                self.broken("RMM-058", self.at("TASK", i), f"length {t.length}, ends at {end}")
            if n_values > 1024 * self.slot.file_length:
                self.broken("RMM-062", self.at("TASK", i), f"{n_values} values")

    def members(self, task: int) -> Iterator[Member]:
        """6.1: "Entry first_entry + j belongs to the j-th target"; 7.1 places it in the run."""
        t, position = self.table["TASK"][task], 0
        for j in range(t.n_entries):
            record = self.table["ENTR"][t.first_entry + j]
            target = self.table["TLST"][t.first_target + j].target
            known = record.form < len(self.table["FORM"])
            form = self.table["FORM"][record.form] if known else None
            frames = self.clusters.get(target, [])
            inside = form is not None and 1 <= form.cluster <= len(frames)
            frame = frames[form.cluster - 1] if inside else None  # type: ignore[union-attr]
            if record.length >= 4096:
                position = ceil_to(position, 64)
            target = self.table["TARG"][target]
            yield Member(t.first_entry + j, t.offset + position, record, target, form, frame)
            position += record.length

    def entry_fits(self, m: Member) -> bool:
        """6.1 ENTR: "The entry's form, its target and the frame [...] MUST fit"."""
        if m.form.cluster and m.frame is None:
            return False
        for part, ids in zip(self.parts(m.frame), (m.form[3:5], m.form[5:7])):  # noqa: B905
            if part != ABSENT and m.form.rank > part.rank:
                return False
            if (ids[0] == NONE) != (part.n_components == 0):
                return False
            if self.n_rows(ids[0]) != part.n_components:
                return False
        return True

    def privates_table(self) -> None:
        """6.1 PRIV, BLOB and DIMS, RMM-037 and RMM-065 to RMM-067."""
        for i, b in enumerate(self.table["BLOB"]):
            if b.reserved:
                self.broken("RMM-037", self.at("BLOB", i), "reserved field is not zero")
            if b.length == 0 and b.offset:
                self.broken("RMM-067", self.at("BLOB", i), f"an empty blob at {b.offset}")
        for t in self.table["TASK"]:
            before = -1
            for i in range(t.first_private, t.first_private + t.n_privates):
                at, p = self.at("PRIV", i), self.table["PRIV"][i]
                dims = [d.size for d in self.table["DIMS"][p.first_dim :][: p.n_dims]]
                if p.reserved or p.reserved2:
                    self.broken("RMM-037", at, "reserved field is not zero")
                ids = p.name < len(self.names) and p.blob < len(self.table["BLOB"])
                room = p.n_dims <= 8 and p.first_dim + p.n_dims <= len(self.table["DIMS"])
                if not ids or not room or p.dtype not in DTYPES or p.name <= before:
                    self.broken("RMM-065", at, f"private tensor {p}")
                elif self.n_bytes(p.dtype, dims) != self.table["BLOB"][p.blob].length:
                    self.broken("RMM-066", at, f"dimensions {dims} do not give the length")
                before = p.name

    def n_bytes(self, dtype: int, dims: list[int]) -> int:
        """6.1 PRIV: "The product of the dimensions [...] times the dtype's size"."""
        if any(d > 2**40 for d in dims):
            return -1  # no length is that
        return math.prod(dims) * int(DTYPES[dtype].split()[1])

    # --- 7 Extents ---

    def extents(self) -> None:
        """7, RMM-070 to RMM-072."""
        kinds = ("FRAM", "TASK", "BLOB", "free")
        found = [(x.offset, x.length, name) for name in kinds for x in self.table[name] if x.length]
        if any(x.length == 0 for x in self.table["free"]):
            self.broken("RMM-071", self.at("free", 0), "an empty free extent")
        if any(x.reserved for x in self.table["free"]):
            self.broken("RMM-037", self.at("free", 0), "reserved field is not zero")
        found.append((self.slot.index_offset, self.slot.index_length, "index"))
        before, end = 640, self.slot.file_length
        for offset, length, name in sorted(found):
            if name != "free" and offset % (64 if length >= 4096 else 8):
                self.broken("RMM-070", offset, f"{name}: {length} bytes at {offset}")
            if offset < before or offset + length > end:
                self.broken("RMM-071", offset, f"{name}: overlap, or outside of the payload")
            elif offset - before >= 64:
                self.broken("RMM-072", before, f"{offset - before} bytes in no extent")
            elif (spare := self.zeros(before, offset)) is not None:
                self.note("RMM-072", spare, "byte between extents is not zero")
            before = max(before, offset + length)
        if before < end:
            self.broken("RMM-072", before, "the last extent does not end the file")

    def frame_arrays(self, i: int) -> list[tuple[int, int]]:
        """7.2: "a frame's are: mean of A, basis of A, mean of B, basis of B"."""
        record = self.table["FRAM"][i]
        sides = self.table["TARG"][record.target][:2]
        a, b = self.parts(i)
        return [(a.mean, sides[0]), (a.basis, sides[0]), (b.mean, sides[1]), (b.basis, sides[1])]

    def entry_arrays(self, m: Member) -> list[tuple[int, int]]:
        """7.2: "coefficients of A, residual of A, coefficients of B, residual of B"."""
        arrays = []
        for part, ids, n in zip(self.parts(m.frame), (m.form[3:5], m.form[5:7]), m.target[:2]):  # noqa: B905
            k = m.form.rank if part.flags & 1 else 1  # "K = rank with row mixing and 1 otherwise"
            positions = 0 if part == ABSENT else -(-n // part.group)
            arrays += [(ids[0], k * positions), (ids[1], n)]
        return arrays

    def length(self, arrays: list[tuple[int, int]]) -> int | None:
        """RMM-052, RMM-061: what the arrays take, "if all encodings are fixed-size"."""
        key = tuple(arrays)
        if key not in self.lengths:
            placed = self.place(arrays, None)
            self.lengths[key] = None if placed is None else placed[1]
        return self.lengths[key]

    def place(
        self, arrays: list[tuple[int, int]], payload: bytes | None
    ) -> tuple[list[Array | None], int] | None:
        """7.2: place every run; None where that takes a payload and there is none."""
        placed: list[Array | None] = []
        position = 0
        for layout, n in arrays:
            if layout == NONE:
                placed.append(None)
                continue
            array, first, record = Array(payload or b"", n), 0, self.table["LAYO"][layout]
            for i in range(record.first_run, record.first_run + record.n_runs):
                run = self.table["RUNS"][i]
                encoding = ENCODINGS.get(run.encoding)
                if encoding is None or encoding.row_bytes is None:
                    if payload is None:
                        return None
                    where, what = self.at("RUNS", i), f"unknown encoding {run.encoding:#04x}"
                    raise Refused("RMM-088", where, what, "unsupported")
                size = run.count * encoding.row_bytes(n)
                if size >= 4096:
                    position = ceil_to(position, 64)
                array.firsts.append(first)
                array.runs.append((position, run.count, encoding, size))
                first, position = first + run.count, position + size
            placed.append(array)
        return placed, position

    def payload(self, arrays: list[tuple[int, int]], offset: int, length: int, rule: str) -> Any:
        """Place the arrays of an entry or frame on its bytes."""
        placed = self.place(arrays, self.data[offset : offset + length])
        assert placed is not None
        if placed[1] != length:
            raise Refused(rule, offset, f"length {length}, arrays take {placed[1]}")
        return placed[0]

    # --- 8 Reconstruction ---

    def load(self, task: str) -> dict[str, tuple[F32, F32, float]]:
        """Return A (rank, n_in), B (n_out, rank) and the scale at each target of a task."""
        out = {}
        for m in self.members(self.tasks.index(task)):
            frame: list[Any] = [None] * 4
            if m.frame is not None:
                f = self.table["FRAM"][m.frame]
                frame = self.payload(self.frame_arrays(m.frame), f.offset, f.length, "RMM-052")
            entry = self.payload(self.entry_arrays(m), m.offset, m.record.length, "RMM-061")
            a, b = self.parts(m.frame)
            A = factor(m.form.rank, m.target.n_in, a, *frame[:2], *entry[:2])
            B = factor(m.form.rank, m.target.n_out, b, *frame[2:], *entry[2:])
            out[self.names[m.target.name]] = A, np.ascontiguousarray(B.T), m.form.scale
        return out

    def entries(self, task: str) -> list[tuple[str, Any, Any]]:
        """Return the name, target and form of each entry of a task."""
        members = self.members(self.tasks.index(task))
        return [(self.names[m.target.name], m.target, m.form) for m in members]

    def privates(self, task: str) -> dict[str, tuple[int, int, tuple[int, ...], bytes]]:
        """Return dtype, role, shape and bytes of each private tensor of a task."""
        t, out = self.table["TASK"][self.tasks.index(task)], {}
        for p in self.table["PRIV"][t.first_private :][: t.n_privates]:
            blob = self.table["BLOB"][p.blob]
            shape = tuple(d.size for d in self.table["DIMS"][p.first_dim :][: p.n_dims])
            content = self.data[blob.offset : blob.offset + blob.length]
            out[self.names[p.name]] = p.dtype, p.role, shape, content
        return out

    def metadata(self) -> dict[str, Any] | None:
        """9; None if there is none, ValueError if it is broken."""
        raw = self.raw.get("meta")
        return parse_metadata(raw) if raw else None

    # --- What validators check beyond: the payload and the optional sections ---

    def optional_sections(self) -> None:
        """6.1 erro and section 9, RMM-090 to RMM-092."""
        errors, at = self.table["erro"], self.at("erro", 0)
        if errors and len(errors) != len(self.table["ENTR"]):
            self.note("RMM-092", at, f"{len(errors)} errors, {len(self.table['ENTR'])} entries")
        for i, (error,) in enumerate(errors):
            if error < 0:
                self.note("RMM-092", self.at("erro", i), f"negative error {error}")
        try:
            value = self.metadata()
        except (ValueError, RecursionError) as fault:
            return self.note("RMM-090", self.at("meta", 0), f"metadata: {fault}")
        schema = json.loads(Path(__file__).with_name("metadata.schema.json").read_text("utf-8"))
        if value is not None and (path := misfit(value, schema, schema)) is not None:
            self.note("RMM-091", self.at("meta", 0), f"metadata: {path or '/'} breaks the schema")
        return None

    def payloads(self) -> None:
        """RMM-080 to RMM-088."""
        for i, f in enumerate(self.table["FRAM"]):
            self.check_payload(self.frame_arrays(i), f.offset, f, "RMM-081", "RMM-052")
        for i, t in enumerate(self.table["TASK"]):
            position = t.offset
            for m in self.members(i):
                if (spare := self.zeros(position, m.offset)) is not None:
                    self.note("RMM-085", spare, "padding is not zero")
                position = m.offset + m.record.length
                self.check_payload(self.entry_arrays(m), m.offset, m.record, "RMM-080", "RMM-061")
        for name, rule in (("BLOB", "RMM-082"), ("free", "RMM-083")):
            for x in self.table[name]:
                if crc32c(self.data[x.offset : x.offset + x.length]) != x.crc:
                    self.note(rule, x.offset, f"{name}: wrong crc")

    def check_payload(
        self, arrays: list[tuple[int, int]], offset: int, record: Any, crc_rule: str, rule: str
    ) -> None:
        if crc32c(self.data[offset : offset + record.length]) != record.crc:
            return self.note(crc_rule, offset, "wrong crc")
        try:
            placed = self.payload(arrays, offset, record.length, rule)
        except Refused as refused:
            return self.note(refused.rule, refused.offset, refused.message)
        position = 0
        for array in placed:
            for start, count, encoding, size in array.runs if array else ():
                if (spare := self.zeros(offset + position, offset + start)) is not None:
                    self.note("RMM-085", spare, "padding is not zero")
                position = start + size
                for i in range(count if encoding.bits and size else 0):
                    at, step = start + i * (size // count), size // count
                    raw = array.payload[at : at + step]
                    if (block := bad_block(raw, array.n, encoding.bits)) is not None:
                        self.note("RMM-086", offset + at + block, "scale, or codes behind the row")
        return None


def bad_block(raw: bytes, n: int, bits: int) -> int | None:
    """RMM-086: "Block scales are finite, codes beyond the row's end zero"; where they are not."""
    scales, codes = q_blocks(raw, bits)
    spare = codes.reshape(-1).copy()
    spare[:n] = 0
    bad = ~np.isfinite(scales) | spare.reshape(-1, 32).any(axis=1)
    return None if not bad.any() else int(bad.argmax()) * (2 + 4 * bits)


def factor(
    rank: int,
    length: int,
    part: Any,
    mean: Array | None,
    basis: Array | None,
    coefficients: Array | None,
    residual: Array | None,
) -> F32:
    """8.1, term after term over whole rows; numpy rounds each product and each sum to f32."""
    x: list[F32 | None] = [mean.row(k) if mean else None for k in range(rank)]

    def add(k: int, term: F32) -> None:
        """8.1: "the sum starts with the first term that is present"."""
        before = x[k]
        x[k] = term if before is None else before + term

    mixing, positions = part.flags & 1, -(-length // max(part.group, 1))
    with np.errstate(all="ignore"):
        for j in range(part.n_components):
            assert basis is not None
            assert coefficients is not None
            c_j = coefficients.row(j)
            for k in range(rank):
                kc = k if mixing else 0
                c = np.repeat(c_j[kc * positions : (kc + 1) * positions], part.group)[:length]
                add(k, c * basis.row(j if mixing else j * part.rank + k))
        for k in range(rank if residual else 0):
            add(k, residual.row(k))  # type: ignore[union-attr]
    zero = np.zeros(length, np.float32)  # 8.1: "If no term is present the value is +0"
    return np.stack([zero if row is None else row for row in x])


# --- Metadata (9) --------------------------------------------------------------------------------


def parse_metadata(raw: bytes) -> dict[str, Any]:
    """9: "one JSON object in UTF-8 without a byte order mark, without duplicate keys [...]"."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a key twice")
        return dict(items)

    def number(text: str) -> float:
        value = int(text) if re.fullmatch(r"-?\d{1,18}", text) else float(text)
        if not np.isfinite(value):
            raise ValueError(f"number {text[:40]}")
        return value

    text = raw.decode("utf-8")
    depth = 0  # before parsing, so that nothing recurses deeper
    for mark in re.findall(r"[\[{]|[\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.S)):
        depth += 1 if mark in "[{" else -1
        if depth > 16:
            raise ValueError("nested more than 16 deep")
    value = json.loads(
        text, object_pairs_hook=pairs, parse_constant=number, parse_float=number, parse_int=number
    )
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


TYPES = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int}


def misfit(value: Any, schema: Any, root: Any, path: str = "") -> str | None:
    """Return the path of the first value that breaks the schema, for the keywords it uses."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    kind, inner = schema.get("type"), []
    if kind and (not isinstance(value, TYPES[kind]) or isinstance(value, bool)):
        return path
    if kind in ("number", "integer") and value < schema.get("minimum", value):
        return path
    if kind == "string" and not re.search(schema.get("pattern", ""), value):
        return path
    if kind == "string" and len(value) < schema.get("minLength", 0):
        return path
    if kind == "array":
        inner = [(i, item, schema.get("items", {})) for i, item in enumerate(value)]
    if kind == "object":
        named, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
        if not value.keys() >= set(schema.get("required", ())):
            return path
        if rest is False and not value.keys() <= named.keys():
            return path
        inner = [(key, item, named.get(key, rest)) for key, item in value.items()]
    found = (misfit(item, part, root, f"{path}/{key}") for key, item, part in inner)
    return next((at for at in found if at is not None), None)


# --- Doors ---------------------------------------------------------------------------------------


def open_file(data: bytes) -> Collection:
    """Return the collection, or raise `Refused` at the first "open" rule that the file breaks."""
    return Collection(bytes(data), None)


def validate(data: bytes) -> list[tuple[str, int, str]]:
    """Return the rules that the file breaks: rule, offset, message."""
    found: list[tuple[str, int, str]] = []
    Collection(bytes(data), found)
    return found


def main(argv: list[str]) -> int:
    """List the tasks of a file, then the rules that it breaks."""
    data = Path(argv[1]).read_bytes()
    try:
        collection = open_file(data)
    except Refused as refused:
        print(f"refused: {refused}")
        return 4 if refused.status == "unsupported" else 3
    for task in collection.tasks:
        print(task)
        for name, target, form in collection.entries(task):
            print(
                f"  {name}: rank {form.rank}, {target.n_in} to {target.n_out}, scale {form.scale:g}"
            )
        for name, (dtype, _, shape, _) in collection.privates(task).items():
            print(f"  {name}: {DTYPES[dtype].split()[0]} {list(shape)}")
    found = validate(data)
    for rule, offset, message in found:
        print(f"{rule} at {offset}: {message}")
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
