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
from array import array as integers
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
    """A row of the table in 8.2: fixed-size with the first two functions, else with the third."""

    name: str
    row_bytes: Callable[[int], int] | None  # of the row's length n
    decode: Callable[[bytes, int], F32] | None  # of the bytes of one row and n
    bits: int = 0  # of a quantised value
    # Of the bytes from the run on, the number of rows and n: bytes taken, and the rows, where None
    # is a row of zeros. ValueError if the run is not well formed (RMM-087).
    run: Callable[[bytes, int, int], tuple[int, list[F32 | None]]] | None = None


def _quantised(name: str, bits: int) -> Encoding:
    return Encoding(name, lambda n: (2 + 4 * bits) * -(-n // 32), q_decode(bits), bits)


def _bf16(raw: bytes, n: int) -> F32:  # noqa: ARG001
    """8.2: "the upper half of a binary32"."""
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


# --- The trellis encoding (8.3) ------------------------------------------------------------------

STEPS = "3f800000 3f6ac0c7 3f5744fd 3f45672a 3f3504f3 3f25fed7 3f1837f0 3f0b95c2"
FAMILIES = (
    """04b0556e 08dc431a 0f218de0 17bb0546 22a55547 2fa05396 3e3ce5f8 4df14256
    5e2d58d9 6e6b3af7 7e39bff0 8d418996 9b4597e3 a820ecbf b3c2a029 be29706c
    c75f7cf5 cf768ba8 d684ff71 dca38252 e1eb5127 e6750e8b ea5800a6 eda99fd4
    f07d5fde f2e4a20a f4eec215 f6a93407 f81fab54 f95c4650 fa67ba65 fb497ef1""",
    """0f218de0 1322754c 17bb0546 1ce8c54d 22a55547 28e6cfbb 2fa05396 36c2a71d
    3e3ce5f8 45fd2e33 4df14256 56071975 5e2d58d9 6653b528 6e6b3af7 76668014
    7e39bff0 85dae60a 8d418996 9466dd83 9b4597e3 a1d9d354 a820ecbf ae195f50
    b3c2a029 b91cfafe be29706c c2e996ae c75f7cf5 cb8d91ae cf768ba8 d31d561d""",
)


def trellis_table(number: int) -> tuple[int, list[int], list[int]]:
    """8.3 *Tables*: "A table number gives b raw bits and frequencies f[0 … Q]"."""
    family, i = number >> 7, (number & 127) - 1
    b = 0 if i < 32 else (i - 32) // 8 + 1
    t = r = int(FAMILIES[family].split()[i - 8 * b], 16)
    g = [2**32]
    while (x := (g[-1] * t) >> 32) >= 2**18:
        g.append(x)
        t = t if family else (t * r) >> 32
    room = 4096 - len(g) - 1
    f = [1 + x * room // sum(g) for x in g] + [1]
    f[0] += 4096 - sum(f)
    return b, f, [sum(f[:q]) for q in range(len(f))]


def trellis_run(data: bytes, k: int, n: int) -> tuple[int, list[F32 | None]]:
    """8.3: "A run of trellis codes k rows of n values"; well formed as RMM-087 asks."""

    def need(holds: bool, text: str) -> None:
        if not holds:
            raise ValueError(text)

    ends = [i for i, byte in enumerate(data[:5]) if byte < 128]
    need(bool(ends), "length has no end")
    start = ends[0] + 1
    length = sum((byte & 127) << 7 * i for i, byte in enumerate(data[:start]))
    need((start == 1 or data[start - 1] > 0) and length < 2**32, "length is not in shortest form")
    need(start + length <= len(data) and length >= 2 + k, f"length {length}")
    base, numbers = struct.unpack_from("<H", data, start)[0], data[start + 2 : start + 2 + k]
    need(all(x == 0 or 1 <= x & 127 <= 112 for x in numbers) and any(numbers), "row bytes")
    n_symbols = n * (k - numbers.count(0))
    lanes = 1 if n_symbols < 2**14 else 4 if n_symbols < 2**16 else 16
    n_words = (length - 2 - k - 4 * lanes) // 2
    need(length == 2 + k + 4 * lanes + 2 * n_words and n_words >= 0, f"length {length}")
    x = list(struct.unpack_from(f"<{lanes}I", data, start + 2 + k))
    need(min(x) >= 2**16, "initial state")
    words = iter(struct.unpack_from(f"<{n_words}H", data, start + length - 2 * n_words))
    mode, step = base >> 15, float(np.uint32((base & 0x7FFF) << 16).view(np.float32))
    shrink = max(-(-((y & 127) - 1) // 8) for y in numbers if y)  # max of ceil(i / 8)
    need(1 + mode * shrink <= base >> 7 & 255 <= 230, "base step")
    s, rows = [0] * lanes, []

    def word() -> int:
        found = next(words, -1)
        need(found >= 0, "a word behind the last")
        return found

    for number in numbers:
        if number == 0:
            rows.append(None)
            continue
        b, f, cum = trellis_table(number)
        m = integers("i")
        for p in range(n):
            lane = p % lanes
            y, slot = x[lane], x[lane] % 4096
            q = bisect_right(cum, slot) - 1
            y = f[q] * (y >> 12) + slot - cum[q]
            y = y if y >= 2**16 else y << 16 | word()
            j = q if q < len(f) - 1 else q + word()
            if b:
                j, y = j << b | y % 2**b, y >> b
                y = y if y >= 2**16 else y << 16 | word()
            need(j < 2**23, "a value is too large")
            m.append(-(2 * j + 1) if (s[lane] ^ j) & 1 else 2 * j + 1)
            feedback = (0xA6 if s[lane] & 1 else 0) ^ (0x79 if j + 1 & 2 else 0)
            x[lane], s[lane] = y, s[lane] >> 1 ^ feedback
        i = (number & 127) - 1
        c = float(np.uint32(int(STEPS.split()[i % 8], 16)).view(np.float32)) * 2.0 ** -(i // 8)
        rows.append(np.array(m, np.float32) * np.float32(step * (c if mode else 1.0)))
    need(next(words, None) is None and all(y == 2**16 for y in x), "words or states are left")
    return start + length, rows


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
    0x20: Encoding("trellis", None, None, run=trellis_run),
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


class Member(NamedTuple):
    """What a task stores at one target (term *entry*), with its place in the file."""

    index: int
    offset: int
    record: Any
    target: Any
    form: Any
    frame: int | None  # id


class Run(NamedTuple):
    """A run with its place in the payload; decoded, if it is not fixed-size."""

    first: int  # number of its first row in the array
    position: int
    n_bytes: int
    count: int
    encoding: Encoding
    rows: list[F32 | None] | None


class Array:
    """7.2: "An array is its runs in order"."""

    def __init__(self, payload: bytes, n: int) -> None:
        self.payload, self.n = payload, n
        self.runs: list[Run] = []

    def row(self, i: int) -> F32:
        run = self.runs[bisect_right(self.runs, i, key=lambda run: run.first) - 1]
        if run.encoding.decode is None:
            row = run.rows[i - run.first] if run.rows else None
            return np.zeros(self.n, np.float32) if row is None else row
        size = run.n_bytes // run.count
        position = run.position + (i - run.first) * size
        return run.encoding.decode(self.payload[position : position + size], self.n)


class Collection:
    """The checked index of a file; payload is decoded by `load`.

    With a list to fill, broken rules are listed there, up to the first step that finds the file
    unusable; without one, the first broken rule refuses the file.
    """

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

    def need(self, holds: bool, rule: str, at: int, text: str, status: str = "malformed") -> bool:
        """Check a rule that is marked "open"."""
        if not holds and self.listing is None:
            raise Refused(rule, at, text, status)
        if not holds and self.listing is not None:
            self.usable = False
            self.listing.append((rule, at, text))
        return holds

    def note(self, holds: bool, rule: str, at: int, text: str) -> bool:
        """Check a rule that is marked "validate"."""
        if not holds and self.listing is not None:
            self.listing.append((rule, at, text))
        return holds

    def spare(self, start: int, end: int) -> int:
        """Return the offset of the first byte in the range that is not zero, or -1."""
        found = re.search(rb"[^\0]", self.data[start:end])
        return -1 if found is None else start + found.start()

    def at(self, table: str, i: int) -> int:
        """Return the offset of a record; of the section, where the section is deflated."""
        if table not in self.sections:
            return self.slot.index_offset
        section = self.sections[table]
        return section.offset + (0 if section.coding else i * section.record_size)

    # --- 5 Header ---

    def preamble(self) -> None:
        """5.1, RMM-001 to RMM-005."""
        data, n = self.data, len(self.data)
        if not self.need(data[:8] == SIGNATURE, "RMM-001", 0, "no signature"):
            return
        if not self.need(n >= 640, "RMM-013", n, f"the header has 640 bytes, the file {n}"):
            return  # no file_length can be smaller (RMM-016)
        major, self.minor, features = struct.unpack_from("<HHI", data, 8)
        self.need(major == 1, "RMM-002", 8, f"major version {major}", "unsupported")
        self.need(features == 0, "RMM-003", 12, f"features {features:#x}", "unsupported")
        crc = struct.unpack_from("<I", data, 60)[0]
        self.need(crc32c(data[:60]) == crc, "RMM-004", 60, "wrong crc of the preamble")
        for spare in (self.spare(16, 60), self.spare(192, 512)):
            self.need(spare < 0, "RMM-005", spare, "reserved byte is not zero")

    def slots(self) -> None:
        """5.2: "The active slot is the valid slot with the larger sequence" (RMM-010 to 012)."""
        valid, damaged = [], []
        for base, parity in ((64, 1), (512, 0)):
            raw = self.data[base : base + 128]
            slot = Slot._make(struct.unpack("<6QII68sI", raw))
            if not any(raw):
                continue  # empty
            if crc32c(raw[:124]) != slot.crc:
                damaged.append(("RMM-012", base, "damaged slot: wrong crc"))
            elif slot.sequence == 0 or slot.sequence % 2 != parity:
                damaged.append(("RMM-011", base, f"damaged slot: sequence {slot.sequence}"))
            else:
                valid.append((slot, base))
                unused = self.minor == 0 and any(slot.unused)
                self.note(not unused, "RMM-015", base + 56, "unused byte is not zero")
        if valid:
            self.slot, self.base = max(valid)
            for fault in damaged:
                self.note(False, *fault)
        else:  # a right crc shows that the sequence is at fault
            at_fault = [fault for fault in damaged if fault[0] == "RMM-011"]
            self.need(False, *(at_fault or [("RMM-010", 64, "no valid slot")])[0])

    def index(self) -> None:
        """5.2 and 6, RMM-013 to RMM-017."""
        slot, base, n, size = self.slot, self.base, len(self.data), self.slot.section_record_size
        end, limit = slot.file_length, slot.growth_limit
        self.need(end <= n, "RMM-013", base + 8, f"{end} bytes, cut to {n}")
        self.need(limit >= max(end, n), "RMM-014", base + 16, f"growth_limit {limit}")
        fits = size >= 40 and size % 8 == 0 and (size == 40 or self.minor > 0)
        self.need(fits, "RMM-017", base + 48, f"section_record_size {size}")
        fits = slot.index_offset % 8 == 0 and slot.index_offset >= 640
        self.need(fits, "RMM-016", base + 24, f"index at {slot.index_offset}")
        fits = slot.index_offset + slot.index_length <= end
        self.need(fits, "RMM-016", base + 32, "the index ends behind file_length")
        fits = slot.n_sections * size <= slot.index_length
        self.need(fits, "RMM-016", base + 40, f"no room for {slot.n_sections} section records")

    # --- 6 Index ---

    def section_table(self) -> None:
        """6, RMM-020 to RMM-026."""
        slot, size = self.slot, self.slot.section_record_size
        start, end = slot.index_offset, slot.index_offset + slot.index_length
        position = start + slot.n_sections * size
        right = crc32c(self.data[start:position]) == slot.section_table_crc
        if not self.need(right, "RMM-020", start, "wrong crc of the section table"):
            return
        for at in range(start, position, size):
            s = Section._make(struct.unpack_from("<4sIQQQII", self.data, at))
            name, n_bytes, least = s.type.decode("latin-1"), s.count * s.record_size, 0
            fits = re.fullmatch("[A-Za-z]{4}", name) is not None and name not in self.sections
            self.need(fits, "RMM-022", at, f"section type {name!r}")
            known, critical = name in SIZES, name[0].isupper()
            fits = known or not critical
            self.need(fits, "RMM-023", at, f"unknown critical section {name!r}", "unsupported")
            if known:
                least = SIZES[name]
                fits = (
                    s.record_size >= least if self.minor and least > 1 else s.record_size == least
                )
                self.need(fits, "RMM-024", at, f"{name}: record_size {s.record_size}")
            fits = s.length == n_bytes or s.coding != 0
            self.need(fits, "RMM-024", at, f"{name}: length {s.length}, not {n_bytes}")
            fits = s.coding == 0 or (s.coding == 1 and not critical)
            self.need(fits, "RMM-026", at, f"{name}: coding {s.coding}")
            fits = s.coding == 0 or n_bytes <= 256 * s.length + 65536
            self.need(fits, "RMM-026", at, f"{name}: {n_bytes} bytes out of {s.length}")
            fits = s.offset == ceil_to(position, 8) and s.offset + s.length <= end
            if not self.need(fits, "RMM-021", at, f"{name}: at {s.offset}"):
                return
            spare = self.spare(position, s.offset)
            self.need(spare < 0, "RMM-021", spare, "byte between sections is not zero")
            position = s.offset + s.length
            right = crc32c(self.data[s.offset : position]) == s.crc
            self.need(right, "RMM-025", s.offset, f"{name}: wrong crc")
            self.sections[name] = s
        self.need(position == end, "RMM-021", position, "the last section does not end the index")

    def decode(self) -> None:
        """6: "a reader steps by record_size and ignores what it does not know"."""
        for name, s in self.sections.items():
            raw = self.data[s.offset : s.offset + s.length]
            if s.coding == 1:  # opening needs `free` alone (RMM-072)
                plain = inflate(raw, s.count * s.record_size)
                check = self.need if name == "free" else self.note
                if not check(plain is not None, "RMM-026", s.offset, f"{name}: bad zlib stream"):
                    continue
                raw = plain or b""
            if name in SIZES:
                self.raw[name] = raw
            if name in RECORDS:
                step = f"{RECORDS[name][0]}{s.record_size - SIZES[name]}x"
                self.table[name] = [*map(TUPLES[name]._make, struct.iter_unpack(step, raw))]

    def strings(self) -> None:
        """6.1 STRS, RMM-030 and RMM-031."""
        raw, self.names, before, position = self.raw.get("STRS", b""), [], b"", 0
        for text in raw.split(b"\0")[:-1]:
            at = self.at("STRS", position)
            try:
                self.names.append(text.decode("utf-8"))
                fits = 1 <= len(text) <= 1024 and not re.search(rb"[\0-\x1f\x7f]", text)
            except UnicodeDecodeError:
                fits = False
            if self.need(fits, "RMM-030", at, f"string {text[:40]!r}"):
                self.need(text > before, "RMM-031", at, f"string {text[:40]!r}: order")
            before, position = text, position + len(text) + 1
        self.need(position == len(raw), "RMM-030", self.at("STRS", position), "string has no end")

    def targets(self) -> None:
        """6.1 TARG, RMM-035 to RMM-037."""
        before: tuple[int, ...] = ()
        for i, t in enumerate(self.table["TARG"]):
            at, kernel = self.at("TARG", i), (t.k0, t.k1, t.k2)
            sizes = [k for k in kernel if k]
            if self.need(t.kind <= 2, "RMM-036", at, f"unknown kind {t.kind}", "unsupported"):
                fits = (
                    1 <= t.n_in <= 2**40
                    and 1 <= t.n_out <= 2**40
                    and t.flags <= 1
                    and (t.kind == 2) == bool(sizes)
                    and kernel == (*sizes, 0, 0, 0)[:3]
                    and t.n_in % math.prod(sizes) == 0
                )
                self.need(fits, "RMM-036", at, f"{t}")
            self.need(t.reserved == 0, "RMM-037", at, "reserved field is not zero")
            key = (t.name, t.n_in, t.n_out, t.kind, t.flags, *kernel)
            fits = t.name < len(self.names) and key > before
            self.need(fits, "RMM-035", at, f"name {t.name}, or order")
            before = key

    def layouts(self) -> None:
        """6.1 RUNS and LAYO, RMM-037, RMM-040, RMM-041."""
        for i, run in enumerate(self.table["RUNS"]):
            at = self.at("RUNS", i)
            self.need(not any(run.reserved), "RMM-037", at, "reserved field is not zero")
            self.need(run.count > 0, "RMM-040", at, "empty run")
        first = 0
        for i, x in enumerate(self.table["LAYO"]):
            runs = self.table["RUNS"][first : first + x.n_runs]
            fits = x.first_run == first and len(runs) == x.n_runs > 0
            fits = fits and sum(run.count for run in runs) == x.n_rows
            if not self.need(fits, "RMM-041", self.at("LAYO", i), f"{x}"):
                return
            first += x.n_runs
        left = first < len(self.table["RUNS"])
        self.need(not left, "RMM-041", self.at("RUNS", first), "runs without a layout")

    def n_rows(self, layout: int) -> int:
        return 0 if layout == NONE else self.table["LAYO"][layout].n_rows

    def known(self, *layouts: int) -> bool:
        return all(i == NONE or i < len(self.table["LAYO"]) for i in layouts)

    def forms(self) -> None:
        """6.1 FORM, RMM-037, RMM-042, RMM-043."""
        for i, f in enumerate(self.table["FORM"]):
            at, residuals = self.at("FORM", i), (f.residual_a, f.residual_b)
            self.need(not any(f.reserved), "RMM-037", at, "reserved field is not zero")
            fits = math.isfinite(f.scale) and 1 <= f.rank <= 2**20
            fits = fits and {f.dtype_a, f.dtype_b} <= {1, 2, 3}
            fits = fits and self.known(f.coefficients_a, f.coefficients_b, *residuals)
            if self.need(fits, "RMM-042", at, f"{f}"):
                fits = all(x == NONE or self.n_rows(x) == f.rank for x in residuals)
                self.need(fits, "RMM-043", at, f"a residual has not {f.rank} rows")

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
            and self.n_rows(part.basis) == p * (1 if mixing else rank)
            and not part.mean == part.basis == NONE
        )

    def parts(self, frame: int | None) -> tuple[Any, Any]:
        """Return the parts of a frame; without a frame it is as if both were absent."""
        if frame is None:
            return ABSENT, ABSENT
        record = self.table["FRAM"][frame]
        return Part._make(record[4:11]), Part._make(record[11:18])

    def frames(self) -> None:
        """6.1 FRAM, RMM-037 and RMM-050 to RMM-052."""
        self.clusters: dict[int, list[int]] = {}
        before = 0
        for i, f in enumerate(self.table["FRAM"]):
            at, parts = self.at("FRAM", i), self.parts(i)
            fits = before <= f.target < len(self.table["TARG"])
            if not self.need(fits, "RMM-050", at, f"target {f.target}"):
                return
            before = f.target
            self.clusters.setdefault(f.target, []).append(i)
            reserved = any(part.reserved for part in parts)
            self.need(not reserved, "RMM-037", at, "reserved field is not zero")
            sides = zip(parts, self.table["TARG"][f.target][:2], strict=True)
            fits = all(part == ABSENT or self.part_fits(part, n) for part, n in sides)
            if self.need(fits and parts != (ABSENT, ABSENT), "RMM-051", at, f"{parts}"):
                takes = self.length(self.frame_arrays(i))
                fits = takes in (None, f.length) and (f.length > 0 or f.offset == 0)
                self.need(fits, "RMM-052", at, f"{f.length} bytes, arrays take {takes}")

    def tasks_table(self) -> None:
        """6.1 TASK, RMM-037, RMM-055, RMM-056; the second half of RMM-058."""
        entries, privates, before, self.tasks = 0, 0, -1, []
        for i, t in enumerate(self.table["TASK"]):
            at = self.at("TASK", i)
            self.need(t.reserved == 0, "RMM-037", at, "reserved field is not zero")
            if self.need(before < t.name < len(self.names), "RMM-055", at, f"name {t.name}"):
                self.tasks.append(self.names[t.name])
            fits = (t.first_entry, t.first_private) == (entries, privates)
            self.need(fits, "RMM-056", at, "entries or private tensors do not follow on")
            self.need(t.length > 0 or t.offset == 0, "RMM-058", at, f"empty run at {t.offset}")
            before, entries, privates = t.name, entries + t.n_entries, privates + t.n_privates
        fits = (entries, privates) == (len(self.table["ENTR"]), len(self.table["PRIV"]))
        self.need(fits, "RMM-056", self.at("TASK", 0), "entries or private tensors of no task")

    def lists(self) -> None:
        """6.1 TLST and TASK, RMM-057."""
        targets = self.table["TARG"]
        for i, t in enumerate(self.table["TASK"]):
            ids = [x.target for x in self.table["TLST"][t.first_target :][: t.n_entries]]
            fits = t.first_target + t.n_entries <= len(self.table["TLST"])
            fits = (
                fits
                and all(a < b for a, b in pairwise(ids))
                and max(ids, default=-1) < len(targets)
            )
            fits = fits and len({targets[x].name for x in ids}) == len(ids)
            self.need(fits, "RMM-057", self.at("TASK", i), f"targets {ids[:8]}")

    def members(self, task: int) -> Iterator[Member]:
        """6.1: "Entry first_entry + j belongs to the j-th target"; 7.1 places it in the run."""
        t, position = self.table["TASK"][task], 0
        for i in range(t.first_entry, t.first_entry + t.n_entries):
            record = self.table["ENTR"][i]
            target = self.table["TLST"][t.first_target + i - t.first_entry].target
            form = (
                self.table["FORM"][record.form] if record.form < len(self.table["FORM"]) else None
            )
            frames = self.clusters.get(target, [])
            known = form is not None and 1 <= form.cluster <= len(frames)
            frame = frames[form.cluster - 1] if known else None
            if record.length >= 4096:
                position = ceil_to(position, 64)
            yield Member(i, t.offset + position, record, self.table["TARG"][target], form, frame)
            position += record.length

    def entry_fits(self, m: Member) -> bool:
        """6.1 ENTR: "The entry's form, its target and the frame [...] MUST fit"."""
        if m.form is None or (m.form.cluster and m.frame is None):
            return False
        a, b = self.parts(m.frame)
        return all(
            (part == ABSENT or m.form.rank <= part.rank)
            and (layout == NONE) == (part.n_components == 0)
            and self.n_rows(layout) == part.n_components
            for part, layout in ((a, m.form.coefficients_a), (b, m.form.coefficients_b))
        )

    def entries_table(self) -> None:
        """6.1 ENTR and 7.1, RMM-058 and RMM-060 to RMM-062."""
        for i, t in enumerate(self.table["TASK"]):
            end, n_values, at_task = t.offset, 0, self.at("TASK", i)
            for m in self.members(i):
                at, length = self.at("ENTR", m.index), m.record.length
                if self.need(self.entry_fits(m), "RMM-060", at, f"form {m.record.form}"):
                    takes = self.length(self.entry_arrays(m))
                    fits = takes in (None, length)
                    self.need(fits, "RMM-061", at, f"{length} bytes, arrays take {takes}")
                    n_values += m.form.rank * (m.target.n_in + m.target.n_out)
                end = m.offset + length
            if self.usable:
                takes = end - t.offset
                self.need(takes == t.length, "RMM-058", at_task, f"{t.length}, not {takes} bytes")
            fits = n_values <= 1024 * self.slot.file_length
            self.need(fits, "RMM-062", at_task, f"{n_values} values")

    def privates_table(self) -> None:
        """6.1 PRIV, BLOB and DIMS, RMM-037 and RMM-065 to RMM-067."""
        blobs, dims = self.table["BLOB"], [d.size for d in self.table["DIMS"]]
        for i, b in enumerate(blobs):
            at = self.at("BLOB", i)
            self.need(b.reserved == 0, "RMM-037", at, "reserved field is not zero")
            self.need(b.length > 0 or b.offset == 0, "RMM-067", at, f"empty blob at {b.offset}")
        for t in self.table["TASK"]:
            before = -1
            for i in range(t.first_private, t.first_private + t.n_privates):
                at, p = self.at("PRIV", i), self.table["PRIV"][i]
                self.need(
                    p.reserved == p.reserved2 == 0, "RMM-037", at, "reserved field is not zero"
                )
                fits = before < p.name < len(self.names) and p.blob < len(blobs)
                fits = fits and p.dtype in DTYPES and p.n_dims <= 8
                fits = fits and p.first_dim + p.n_dims <= len(dims)
                if self.need(fits, "RMM-065", at, f"{p}"):
                    shape = dims[p.first_dim : p.first_dim + p.n_dims]
                    n_bytes = math.prod(shape) * int(DTYPES[p.dtype].split()[1])
                    fits = max(shape, default=0) <= 2**40 and n_bytes == blobs[p.blob].length
                    self.need(fits, "RMM-066", at, f"shape {shape}, {blobs[p.blob].length} bytes")
                before = p.name

    # --- 7 Extents ---

    def extents(self) -> None:
        """7, RMM-070 to RMM-072."""
        kinds = ("FRAM", "TASK", "BLOB", "free")
        found = [(x.offset, x.length, name) for name in kinds for x in self.table[name] if x.length]
        found.append((self.slot.index_offset, self.slot.index_length, "index"))
        for i, x in enumerate(self.table["free"]):
            at = self.at("free", i)
            self.need(x.reserved == 0, "RMM-037", at, "reserved field is not zero")
            self.need(x.length > 0, "RMM-071", at, "empty free extent")
        before, end = 640, self.slot.file_length
        for offset, length, name in sorted(found):
            fits = name == "free" or offset % (64 if length >= 4096 else 8) == 0
            self.need(fits, "RMM-070", offset, f"{name}: {length} bytes at {offset}")
            fits = before <= offset and offset + length <= end
            if self.need(fits, "RMM-071", offset, f"{name}: overlap, or outside of the payload"):
                fits = offset - before < 64
                if self.need(fits, "RMM-072", before, f"{offset - before} bytes in no extent"):
                    spare = self.spare(before, offset)
                    self.note(spare < 0, "RMM-072", spare, "byte between extents is not zero")
            before = max(before, offset + length)
        self.need(before >= end, "RMM-072", before, "the last extent does not end the file")

    def frame_arrays(self, i: int) -> list[tuple[int, int]]:
        """7.2: "a frame's are: mean of A, basis of A, mean of B, basis of B"."""
        n_in, n_out = self.table["TARG"][self.table["FRAM"][i].target][:2]
        a, b = self.parts(i)
        return [(a.mean, n_in), (a.basis, n_in), (b.mean, n_out), (b.basis, n_out)]

    def entry_arrays(self, m: Member) -> list[tuple[int, int]]:
        """7.2: "coefficients of A, residual of A, coefficients of B, residual of B"."""
        arrays, (a, b) = [], self.parts(m.frame)
        for part, ids, n in ((a, m.form[3:5], m.target.n_in), (b, m.form[5:7], m.target.n_out)):
            k = m.form.rank if part.flags & 1 else 1  # "K = rank with row mixing and 1 otherwise"
            positions = 0 if part == ABSENT else ceil_to(n, part.group) // part.group
            arrays += [(ids[0], k * positions), (ids[1], n)]
        return arrays

    def length(self, arrays: list[tuple[int, int]]) -> int | None:
        """RMM-052, RMM-061: what the arrays take, "if all encodings are fixed-size"."""
        key = tuple(arrays)
        if key not in self.lengths:
            self.lengths[key] = self.place(arrays)[1]
        return self.lengths[key]

    def place(
        self, arrays: list[tuple[int, int]], offset: int = 0, payload: bytes | None = None
    ) -> tuple[list[Array | None], int | None]:
        """7.2: place every run; no length where that takes a payload and there is none."""
        placed: list[Array | None] = []
        position = 0
        for layout, n in arrays:
            array, first = Array(payload or b"", n), 0
            placed.append(None if layout == NONE else array)
            x = None if layout == NONE else self.table["LAYO"][layout]
            for i in range(x.first_run, x.first_run + x.n_runs) if x else ():
                count, code = self.table["RUNS"][i][:2]
                encoding, rows = ENCODINGS.get(code), None
                if payload is None and (encoding is None or encoding.run):
                    return placed, None
                if encoding is None:
                    text = f"unknown encoding {code:#04x}"
                    raise Refused("RMM-088", self.at("RUNS", i), text, "unsupported")
                if encoding.row_bytes is not None:
                    n_bytes = count * encoding.row_bytes(n)
                    position = ceil_to(position, 64) if n_bytes >= 4096 else position
                elif encoding.run is not None and payload is not None:
                    try:
                        n_bytes, rows = encoding.run(payload[position:], count, n)
                    except ValueError as fault:
                        text = f"{encoding.name}: {fault}"
                        raise Refused("RMM-087", offset + position, text) from fault
                array.runs.append(Run(first, position, n_bytes, count, encoding, rows))
                first, position = first + count, position + n_bytes
        return placed, position

    def payload(self, arrays: list[tuple[int, int]], offset: int, length: int, rule: str) -> Any:
        """Place the arrays of an entry or frame on its bytes."""
        placed, takes = self.place(arrays, offset, self.data[offset : offset + length])
        if takes != length:
            raise Refused(rule, offset, f"{length} bytes, arrays take {takes}")
        return placed

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

    # --- What validators check beyond: optional sections and payload ---

    def optional_sections(self) -> None:
        """6.1 erro and section 9, RMM-090 to RMM-092."""
        errors, n, at = self.table["erro"], len(self.table["ENTR"]), self.at("meta", 0)
        fits = len(errors) in (0, n)
        self.note(fits, "RMM-092", self.at("erro", 0), f"{len(errors)} errors, {n} entries")
        for i, (error,) in enumerate(errors):
            self.note(not error < 0, "RMM-092", self.at("erro", i), f"negative error {error}")
        try:
            value = self.metadata()
        except ValueError as fault:
            self.note(False, "RMM-090", at, f"metadata: {fault}")
            return
        schema = json.loads(Path(__file__).with_name("metadata.schema.json").read_text("utf-8"))
        path = None if value is None else misfit(value, schema, schema)
        self.note(path is None, "RMM-091", at, f"metadata: {path} breaks the schema")

    def payloads(self) -> None:
        """RMM-080 to RMM-088."""
        for i, f in enumerate(self.table["FRAM"]):
            self.check_payload(self.frame_arrays(i), f.offset, f, "RMM-081", "RMM-052")
        for i, t in enumerate(self.table["TASK"]):
            position = t.offset
            for m in self.members(i):
                spare = self.spare(position, m.offset)
                self.note(spare < 0, "RMM-085", spare, "padding is not zero")
                position = m.offset + m.record.length
                self.check_payload(self.entry_arrays(m), m.offset, m.record, "RMM-080", "RMM-061")
        for name, rule in (("BLOB", "RMM-082"), ("free", "RMM-083")):
            for x in self.table[name]:
                right = crc32c(self.data[x.offset : x.offset + x.length]) == x.crc
                self.note(right, rule, x.offset, f"{name}: wrong crc")

    def check_payload(
        self, arrays: list[tuple[int, int]], offset: int, record: Any, crc_rule: str, rule: str
    ) -> None:
        right = crc32c(self.data[offset : offset + record.length]) == record.crc
        if not self.note(right, crc_rule, offset, "wrong crc"):
            return
        try:
            placed = self.payload(arrays, offset, record.length, rule)
        except Refused as refused:
            self.note(False, refused.rule, refused.offset, refused.message)
            return
        position = offset
        for array in placed:
            for run in array.runs if array else ():
                start, size = offset + run.position, run.n_bytes // run.count
                spare = self.spare(position, start)
                self.note(spare < 0, "RMM-085", spare, "padding is not zero")
                position = start + run.n_bytes
                for at in range(start, position, size) if run.encoding.bits and size else ():
                    block = bad_block(self.data[at : at + size], array.n, run.encoding.bits)
                    self.note(block is None, "RMM-086", at + (block or 0), "scale, or spare code")


def inflate(raw: bytes, n_bytes: int) -> bytes | None:
    """6: "a zlib stream (RFC 1950) of count · record_size bytes" (RMM-026)."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(raw, n_bytes + 1)
    except zlib.error:
        return None
    return plain if stream.eof and not stream.unused_data and len(plain) == n_bytes else None


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
