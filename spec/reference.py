"""Reader and validator of ``.rmm`` files, written from the text of ``rmm-1.md`` alone.

It is slow and short, to be read beside the text; no code is shared with any other reader.
``open_file`` refuses a file at the first rule marked "open" that it breaks.  ``validate`` lists
that rule or, if there is none, all rules marked "load" and "validate" that the file breaks.

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
Fault = tuple[str, int, str]  # rule, offset, message
NONE = 0xFFFFFFFF


class Refused(Exception):  # noqa: N818
    """The file breaks ``rule`` at ``offset``; ``status`` is malformed or unsupported."""

    def __init__(self, rule: str, offset: int, message: str, status: str) -> None:
        super().__init__(f"{rule} at {offset}: {message}")
        self.rule, self.offset, self.message, self.status = rule, offset, message, status


def need(holds: Any, rule: str, at: int, text: str, status: str = "malformed") -> None:
    if not holds:
        raise Refused(rule, at, text, status)


def ceil_to(x: int, a: int) -> int:
    """2: "the least multiple of a that is not less than x"."""
    return -(-x // a) * a


CRC_TABLE = []
for n in range(256):
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    CRC_TABLE.append(n)


def crc32c(data: bytes) -> int:
    """Castagnoli's polynomial 1EDC6F41, reflected; register and result inverted."""
    register = NONE
    for byte in data:
        register = CRC_TABLE[(register ^ byte) & 255] ^ register >> 8
    return register ^ NONE


# --- Encodings (8.2) -----------------------------------------------------------------------------


class Encoding(NamedTuple):
    """A row of the table in 8.2; without the two functions it is not fixed-size."""

    name: str
    row_bytes: Callable[[int], int] | None = None  # of the number of values
    decode: Callable[[bytes, int], F32] | None = None  # of one row's bytes and number of values
    bits: int = 0  # of a quantised value


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


def quantised(name: str, bits: int) -> Encoding:
    def decode(raw: bytes, n: int) -> F32:
        scales, codes = q_blocks(raw, bits)
        u = codes.astype(np.int32)
        level = {8: codes.view(np.int8), 4: u - 8}.get(bits, 2 * u - (2**bits - 1))
        return (scales.astype(np.float32)[:, None] * level.astype(np.float32)).reshape(-1)[:n]

    return Encoding(name, lambda n: (2 + 4 * bits) * -(-n // 32), decode, bits)


def plain(name: str, stored: str) -> Encoding:
    def decode(raw: bytes, n: int) -> F32:  # noqa: ARG001
        return np.frombuffer(raw, stored).astype(np.float32)

    return Encoding(name, lambda n: int(stored[2]) * n, decode)


def bf16(raw: bytes, n: int) -> F32:  # noqa: ARG001
    """8.2: "the upper half of a binary32"."""
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


ENCODINGS = {
    0x00: Encoding("zero", lambda n: 0, lambda raw, n: np.zeros(n, np.float32)),  # noqa: ARG005
    0x01: plain("f32", "<f4"),
    0x02: plain("f16", "<f2"),
    0x03: Encoding("bf16", lambda n: 2 * n, bf16),
    **{0x10 + n: quantised({4: "q4_0", 8: "q8_0"}.get(n, f"q{n}"), n) for n in range(1, 9)},
    0x20: Encoding("trellis"),
}

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


def trellis_run(data: bytes, k: int, n: int, at: int) -> tuple[int, list[F32 | None]]:
    """8.3: "A run of trellis codes k rows of n values"; well formed as RMM-087 asks.

    `data` begins with the run, at offset `at`.  Gives the bytes that the run takes, and its rows,
    where None is a row of zeros.
    """

    def well(formed: bool, text: str) -> None:
        need(formed, "RMM-087", at, f"trellis: {text}")

    start = next((i + 1 for i, byte in enumerate(data[:5]) if byte < 128), 0)
    length = sum((byte & 127) << 7 * i for i, byte in enumerate(data[:start]))
    well(start == 1 or (start > 1 and data[start - 1] > 0), "length is not in shortest form")
    well(length < 2**32 and start + length <= len(data) and length >= 2 + k, f"length {length}")
    base, numbers = struct.unpack_from("<H", data, start)[0], data[start + 2 : start + 2 + k]
    well(all(x == 0 or 1 <= x & 127 <= 112 for x in numbers) and any(numbers), "row bytes")
    n_symbols = n * (k - numbers.count(0))
    lanes = 1 if n_symbols < 2**14 else 4 if n_symbols < 2**16 else 16
    n_words = (length - 2 - k - 4 * lanes) // 2
    well(length == 2 + k + 4 * lanes + 2 * n_words and n_words >= 0, f"length {length}")
    x = list(struct.unpack_from(f"<{lanes}I", data, start + 2 + k))
    well(min(x) >= 2**16, "initial state")
    words = iter(struct.unpack_from(f"<{n_words}H", data, start + length - 2 * n_words))
    mode, step = base >> 15, float(np.uint32((base & 0x7FFF) << 16).view(np.float32))
    shrink = max(-(-((y & 127) - 1) // 8) for y in numbers if y)  # max of ceil(i / 8)
    well(1 + mode * shrink <= base >> 7 & 255 <= 230, "base step")

    def word() -> int:
        found = next(words, -1)
        well(found >= 0, "a word behind the last")
        return found

    s, rows = [0] * lanes, []
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
            well(j < 2**23, "a value is too large")
            m.append(-(2 * j + 1) if (s[lane] ^ j) & 1 else 2 * j + 1)
            feedback = (0xA6 if s[lane] & 1 else 0) ^ (0x79 if j + 1 & 2 else 0)
            x[lane], s[lane] = y, s[lane] >> 1 ^ feedback
        i = (number & 127) - 1
        c = float(np.uint32(int(STEPS.split()[i % 8], 16)).view(np.float32)) * 2.0 ** -(i // 8)
        rows.append(np.array(m, np.float32) * np.float32(step * (c if mode else 1.0)))
    well(next(words, None) is None and all(y == 2**16 for y in x), "words or states are left")
    return start + length, rows


# --- Tables (6.1): the fields of each record, in order -------------------------------------------

PART = "group n_components rank mean basis flags reserved"
RECORDS = {
    "TARG": ("<QQ3HBBII", "n_in n_out k0 k1 k2 kind flags name reserved"),
    "RUNS": ("<IB3s", "count encoding reserved"),
    "LAYO": ("<QII", "first_run n_runs n_rows"),
    "FORM": (
        "<d6IBB6s",
        "scale rank cluster coefficients_a residual_a coefficients_b residual_b dtype_a dtype_b "
        "reserved",
    ),
    "FRAM": (
        "<QQIIQ6IQ6I",
        " ".join(["offset length target crc"] + [f"{x}_{f}" for f in "ab" for x in PART.split()]),
    ),
    "TLST": ("<I", "target"),
    "TASK": (
        "<7QII",
        "offset length first_entry n_entries first_target first_private n_privates name reserved",
    ),
    "ENTR": ("<QII", "length form crc"),
    "DIMS": ("<Q", "size"),
    "PRIV": ("<IIBBBBIQ", "name blob dtype n_dims role reserved reserved_2 first_dim"),
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
    """What a task stores at one target (term *entry*): records, and place in the file."""

    at: int  # of the record in ENTR
    entry: Any
    target: Any
    form: Any
    frame: int | None
    offset: int


class Run(NamedTuple):
    """A run with its place in the file; decoded, if it is not fixed-size."""

    array: int  # 0 … 3
    first: int  # number of its first row in the array
    count: int
    n: int  # values of a row
    encoding: Encoding
    offset: int
    length: int
    rows: list[F32 | None]


class Collection:
    """The checked index of a file; payload is decoded by `load`.

    The steps of opening are in the order of section 12, but for extents (7), which come early: once
    they are known not to overlap, all that follows takes time in proportion to the file's length.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.preamble()
        self.slots()
        self.section_table()
        self.extents()
        self.strings()
        self.targets()
        self.layouts()
        self.forms()
        self.frames()
        self.tiling()
        self.tasks: dict[str, list[Member]] = {}
        for i, task in enumerate(self.table["TASK"]):
            self.task(task, self.at("TASK", i))

    def nonzero(self, start: int, end: int) -> int:
        """Return the offset of the first byte in the range that is not zero, or 0."""
        found = re.search(rb"[^\0]", self.data[start:end])
        return start + found.start() if found else 0

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
        need(data[:8] == b"\x89RMM\r\n\x1a\n", "RMM-001", 0, "no signature")
        need(n >= 640, "RMM-013", n, f"the header has 640 bytes, the file {n}")
        major, self.minor, features = struct.unpack_from("<HHI", data, 8)
        need(major == 1, "RMM-002", 8, f"major version {major}", "unsupported")
        need(features == 0, "RMM-003", 12, f"features {features:#x}", "unsupported")
        crc = struct.unpack_from("<I", data, 60)[0]
        need(crc32c(data[:60]) == crc, "RMM-004", 60, "wrong crc of the preamble")
        spare = self.nonzero(16, 60) or self.nonzero(192, 512)
        need(not spare, "RMM-005", spare, "reserved byte is not zero")

    def slots(self) -> None:
        """5.2, RMM-010 to RMM-017."""
        valid, misplaced, self.slot_faults = [], 0, list[Fault]()
        for base, parity in ((64, 1), (512, 0)):
            raw = self.data[base : base + 128]
            slot = Slot._make(struct.unpack("<6QII68sI", raw))
            right = crc32c(raw[:124]) == slot.crc
            if right and slot.sequence > 0 and slot.sequence % 2 == parity:
                valid.append((slot, base))
                if self.minor == 0 and any(slot.unused):
                    self.slot_faults.append(("RMM-015", base + 56, "unused byte is not zero"))
            elif any(raw):
                self.slot_faults.append(("RMM-012", base, "damaged slot"))
                misplaced = misplaced or (base if right else 0)
        need(valid or not misplaced, "RMM-011", misplaced, "sequence of no slot is as it should be")
        need(valid, "RMM-010", 64, "no valid slot")
        slot, base = max(valid)  # "the valid slot with the larger sequence"
        self.slot, n, size = slot, len(self.data), slot.section_record_size
        need(slot.file_length <= n, "RMM-013", base + 8, f"{slot.file_length} bytes, cut to {n}")
        fits = slot.growth_limit >= max(slot.file_length, n)
        need(fits, "RMM-014", base + 16, f"growth_limit {slot.growth_limit}")
        fits = size >= 40 and size % 8 == 0 and (size == 40 or self.minor > 0)
        need(fits, "RMM-017", base + 48, f"section_record_size {size}")
        fits = slot.index_offset % 8 == 0 and slot.index_offset >= 640
        need(fits, "RMM-016", base + 24, f"index at {slot.index_offset}")
        fits = slot.index_offset + slot.index_length <= slot.file_length
        need(fits, "RMM-016", base + 32, "the index ends behind file_length")
        fits = slot.n_sections * size <= slot.index_length
        need(fits, "RMM-016", base + 40, f"no room for {slot.n_sections} section records")

    # --- 6 Index ---

    def section_table(self) -> None:
        """6, RMM-020 to RMM-026 and RMM-037."""
        slot, size = self.slot, self.slot.section_record_size
        self.sections: dict[str, Section] = {}
        self.table: dict[str, list[Any]] = {name: [] for name in RECORDS}
        start, end = slot.index_offset, slot.index_offset + slot.index_length
        position = start + slot.n_sections * size
        right = crc32c(self.data[start:position]) == slot.section_table_crc
        need(right, "RMM-020", start, "wrong crc of the section table")
        for at in range(start, position, size):
            s = Section._make(struct.unpack_from("<4sIQQQII", self.data, at))
            name, n_bytes = s.type.decode("latin-1"), s.count * s.record_size
            fits = re.fullmatch("[A-Za-z]{4}", name) and name not in self.sections
            need(fits, "RMM-022", at, f"section type {name!r}")
            critical, least = name[0].isupper(), SIZES.get(name)
            fits = least or not critical
            need(fits, "RMM-023", at, f"unknown critical section {name!r}", "unsupported")
            fits = least in (None, s.record_size) or (self.minor > 0 and s.record_size > least > 1)
            need(fits, "RMM-024", at, f"{name}: record_size {s.record_size}")
            fits = s.coding == 0 or (s.coding == 1 and not critical and name != "free")
            need(fits, "RMM-026", at, f"{name}: coding {s.coding}")
            fits = s.length == n_bytes or s.coding
            need(fits, "RMM-024", at, f"{name}: length {s.length}, not {n_bytes}")
            fits = s.coding == 0 or n_bytes <= 256 * s.length + 65536
            need(fits, "RMM-026", at, f"{name}: {n_bytes} bytes out of {s.length}")
            fits = s.offset == ceil_to(position, 8) and s.offset + s.length <= end
            need(fits, "RMM-021", at, f"{name}: at {s.offset}")
            spare = self.nonzero(position, s.offset)
            need(not spare, "RMM-021", spare, "byte between sections is not zero")
            position = s.offset + s.length
            right = crc32c(self.data[s.offset : position]) == s.crc
            need(right, "RMM-025", s.offset, f"{name}: wrong crc")
            self.sections[name] = s
            if name in RECORDS and not s.coding:
                self.table[name] = self.records(name, self.raw(name))
        need(position == end, "RMM-021", position, "the last section does not end the index")

    def raw(self, name: str) -> bytes:
        """6: a section's records; "one zlib stream [...] of count · record_size bytes"."""
        if name not in self.sections:
            return b""
        s = self.sections[name]
        raw, n_bytes = self.data[s.offset : s.offset + s.length], s.count * s.record_size
        if s.coding:
            stream = zlib.decompressobj()
            try:
                raw = stream.decompress(raw, n_bytes + 1)
            except zlib.error as fault:
                raise Refused("RMM-026", s.offset, f"{name}: {fault}", "malformed") from fault
            fits = stream.eof and not stream.unused_data and len(raw) == n_bytes
            need(fits, "RMM-026", s.offset, f"{name}: not one stream of {n_bytes} bytes")
        return raw

    def records(self, name: str, raw: bytes) -> list[Any]:
        """6: "a reader steps by record_size and ignores what it does not know"."""
        step = f"{RECORDS[name][0]}{self.sections[name].record_size - SIZES[name]}x"
        records = [*map(TUPLES[name]._make, struct.iter_unpack(step, raw))]
        reserved = [i for i, x in enumerate(TUPLES[name]._fields) if x.startswith("reserved")]
        for i, record in enumerate(records if reserved else ()):
            zero = all(record[x] in (0, bytes(3), bytes(6)) for x in reserved)
            need(zero, "RMM-037", self.at(name, i), "reserved field is not zero")
        return records

    def extents(self) -> None:
        """7, RMM-070 to RMM-072; RMM-067 and the like for those of no bytes."""
        found = [(self.slot.index_offset, self.slot.index_length, "index")]
        empty = {"FRAM": "RMM-052", "TASK": "RMM-058", "BLOB": "RMM-067", "free": "RMM-071"}
        for kind, rule in empty.items():
            for i, x in enumerate(self.table[kind]):
                fits = x.length > 0 or (x.offset == 0 and kind != "free")
                need(fits, rule, self.at(kind, i), f"empty extent at {x.offset}")
            found += [(x.offset, x.length, kind) for x in self.table[kind] if x.length]
        before, end = 640, self.slot.file_length
        self.gaps = []
        for offset, length, kind in sorted(found):
            fits = kind == "free" or offset % (64 if length >= 4096 else 8) == 0
            need(fits, "RMM-070", offset, f"{kind}: {length} bytes at {offset}")
            fits = before <= offset and offset + length <= end
            need(fits, "RMM-071", offset, f"{kind}: overlap, or outside of the payload")
            need(offset - before < 64, "RMM-072", before, f"{offset - before} bytes in no extent")
            self.gaps.append((before, offset))
            before = offset + length
        need(before == end, "RMM-072", before, "the last extent does not end the file")

    def strings(self) -> None:
        """6.1 STRS, RMM-030 and RMM-031."""
        self.names, raw, before, position = list[str](), self.raw("STRS"), b"", 0
        for text in raw.split(b"\0")[:-1]:
            at = self.at("STRS", position)
            fits = 1 <= len(text) <= 1024 and not re.search(rb"[\0-\x1f\x7f]", text)
            need(fits, "RMM-030", at, f"string {text[:40]!r}")
            try:
                self.names.append(text.decode("utf-8"))
            except UnicodeDecodeError as fault:
                raise Refused("RMM-030", at, f"string {text[:40]!r}", "malformed") from fault
            need(text > before, "RMM-031", at, f"string {text[:40]!r}: order")
            before, position = text, position + len(text) + 1
        need(position == len(raw), "RMM-030", self.at("STRS", position), "string has no end")

    def targets(self) -> None:
        """6.1 TARG, RMM-035 and RMM-036."""
        before: tuple[int, ...] = ()
        for i, t in enumerate(self.table["TARG"]):
            at, kernel = self.at("TARG", i), (t.k0, t.k1, t.k2)
            sizes = [k for k in kernel if k]
            need(t.kind <= 2, "RMM-036", at, f"unknown kind {t.kind}", "unsupported")
            fits = (
                1 <= t.n_in <= 2**40
                and 1 <= t.n_out <= 2**40
                and t.flags <= 1
                and (t.kind == 2) == bool(sizes)
                and kernel == (*sizes, 0, 0, 0)[:3]
                and t.n_in % math.prod(sizes) == 0
            )
            need(fits, "RMM-036", at, f"{t}")
            key = (t.name, t.n_in, t.n_out, t.kind, t.flags, *kernel)
            fits = t.name < len(self.names) and key > before
            need(fits, "RMM-035", at, f"name {t.name}, or order")
            before = key

    def layouts(self) -> None:
        """6.1 RUNS and LAYO, RMM-040 and RMM-041."""
        runs, first = self.table["RUNS"], 0
        for i, run in enumerate(runs):
            need(run.count > 0, "RMM-040", self.at("RUNS", i), "empty run")
        self.n_rows, self.fixed_size = {NONE: 0}, {NONE: True}  # by layout
        for i, x in enumerate(self.table["LAYO"]):
            at, own = self.at("LAYO", i), runs[first : first + x.n_runs]
            fits = x.first_run == first and len(own) == x.n_runs > 0
            need(fits and sum(run.count for run in own) == x.n_rows, "RMM-041", at, f"{x}")
            fixed = [run.encoding in ENCODINGS and run.encoding != 0x20 for run in own]
            for j, (one, two) in enumerate(pairwise(own)):
                text = f"successive runs of encoding {one.encoding:#04x}"
                need(one.encoding != two.encoding or not fixed[j], "RMM-041", at, text)
            self.n_rows[i], self.fixed_size[i] = x.n_rows, all(fixed)
            first += x.n_runs
        need(first == len(runs), "RMM-041", self.at("RUNS", first), "runs without a layout")

    def forms(self) -> None:
        """6.1 FORM, RMM-042 and RMM-043."""
        for i, f in enumerate(self.table["FORM"]):
            residuals = (f.residual_a, f.residual_b)
            fits = math.isfinite(f.scale) and 1 <= f.rank <= 2**20
            fits = fits and {f.dtype_a, f.dtype_b} <= {1, 2, 3}
            fits = fits and {f.coefficients_a, f.coefficients_b, *residuals} <= self.n_rows.keys()
            need(fits, "RMM-042", self.at("FORM", i), f"{f}")
            fits = all(x == NONE or self.n_rows[x] == f.rank for x in residuals)
            need(fits, "RMM-043", self.at("FORM", i), f"a residual has not {f.rank} rows")

    def parts(self, frame: int | None) -> tuple[Any, Any]:
        """Return the parts of a frame; without a frame it is as if both were absent."""
        if frame is None:
            return ABSENT, ABSENT
        record = self.table["FRAM"][frame]
        return Part._make(record[4:11]), Part._make(record[11:18])

    def part_fits(self, part: Any, length: int) -> bool:
        """6.1 FRAM: "In a part that is not absent (RMM-051)"."""
        mixing, p, rank = part.flags & 1, part.n_components, part.rank
        return (
            1 <= rank <= 2**20
            and 1 <= part.group <= length
            and (not mixing or part.group == length)
            and p <= 2**20
            and part.flags <= 1
            and {part.mean, part.basis} <= self.n_rows.keys()
            and (part.basis == NONE) == (p == 0)
            and (part.mean == NONE or self.n_rows[part.mean] == rank)
            and self.n_rows[part.basis] == p * (1 if mixing else rank)
            and not part.mean == part.basis == NONE
        )

    def frames(self) -> None:
        """6.1 FRAM, RMM-050 to RMM-052."""
        self.clusters: dict[int, list[int]] = {}
        before = 0
        for i, f in enumerate(self.table["FRAM"]):
            at, parts = self.at("FRAM", i), self.parts(i)
            fits = before <= f.target < len(self.table["TARG"])
            need(fits, "RMM-050", at, f"target {f.target}")
            sides = zip(parts, self.table["TARG"][f.target][:2], strict=True)
            fits = all(part == ABSENT or self.part_fits(part, n) for part, n in sides)
            need(fits and parts != (ABSENT, ABSENT), "RMM-051", at, f"{parts}")
            self.check_length(self.frame_arrays(i), f, at, "RMM-052")
            before = f.target
            self.clusters.setdefault(f.target, []).append(i)

    def tiling(self) -> None:
        """6.1 TASK, RMM-055 and RMM-056."""
        entries, privates, before = 0, 0, -1
        for i, t in enumerate(self.table["TASK"]):
            at = self.at("TASK", i)
            need(before < t.name < len(self.names), "RMM-055", at, f"name {t.name}")
            fits = (t.first_entry, t.first_private) == (entries, privates)
            need(fits, "RMM-056", at, "entries or private tensors do not follow on")
            before, entries, privates = t.name, entries + t.n_entries, privates + t.n_privates
        fits = (entries, privates) == (len(self.table["ENTR"]), len(self.table["PRIV"]))
        need(fits, "RMM-056", self.at("TASK", 0), "entries or private tensors of no task")

    def task(self, t: Any, at: int) -> None:
        """6.1 TASK and ENTR, RMM-057 to RMM-063."""
        targets, forms = self.table["TARG"], self.table["FORM"]
        ids = [x.target for x in self.table["TLST"][t.first_target : t.first_target + t.n_entries]]
        fits = t.first_target + t.n_entries <= len(self.table["TLST"])
        fits = fits and all(a < b for a, b in pairwise(ids))
        fits = fits and max(ids, default=-1) < len(targets)
        fits = fits and len({targets[x].name for x in ids}) == len(ids)
        need(fits, "RMM-057", at, f"targets {ids[:8]}")
        members, end, n_values, work = list[Member](), 0, 0, 0
        for i, target in enumerate(ids, t.first_entry):
            e, sides = self.table["ENTR"][i], targets[target][:2]
            form = forms[e.form] if e.form < len(forms) else None
            clusters = [None, *self.clusters.get(target, ())]
            fits = form and form.cluster < len(clusters)
            frame = clusters[form.cluster] if fits else None
            parts = self.parts(frame)
            fits = fits and all(
                (part == ABSENT or form.rank <= part.rank)
                and (layout == NONE) == (part.n_components == 0)
                and self.n_rows[layout] == part.n_components
                for part, layout in zip(parts, form[3:7:2], strict=True)
            )
            need(fits, "RMM-060", self.at("ENTR", i), f"form {e.form}")
            end = ceil_to(end, 64) if e.length >= 4096 else end  # 7.1
            members.append(
                Member(self.at("ENTR", i), e, targets[target], form, frame, t.offset + end)
            )
            end += e.length
            n_values += form.rank * sum(sides)
            for part, n in zip(parts, sides, strict=True):
                work += (1 + part.n_components) * form.rank * n
        need(end == t.length, "RMM-058", at, f"{t.length} bytes, entries take {end}")
        for m in members:
            self.check_length(self.entry_arrays(m), m.entry, m.at, "RMM-061")
        need(n_values <= 1024 * self.slot.file_length, "RMM-062", at, f"{n_values} values")
        need(work <= 16384 * self.slot.file_length, "RMM-063", at, f"{work} products and sums")
        self.tasks[self.names[t.name]] = members
        self.check_privates(t, at)

    def check_privates(self, t: Any, at_task: int) -> None:
        """6.1 PRIV, BLOB and DIMS, RMM-064 to RMM-066."""
        blobs, dims, before, total = self.table["BLOB"], self.table["DIMS"], -1, 0
        for i in range(t.first_private, t.first_private + t.n_privates):
            at, p = self.at("PRIV", i), self.table["PRIV"][i]
            fits = before < p.name < len(self.names) and p.blob < len(blobs)
            fits = fits and p.dtype in DTYPES and p.n_dims <= 8
            need(fits and p.first_dim + p.n_dims <= len(dims), "RMM-065", at, f"{p}")
            shape = [d.size for d in dims[p.first_dim : p.first_dim + p.n_dims]]
            n_bytes = math.prod(shape) * int(DTYPES[p.dtype].split()[1])
            fits = max(shape, default=0) <= 2**40 and n_bytes == blobs[p.blob].length
            need(fits, "RMM-066", at, f"shape {shape}, {blobs[p.blob].length} bytes")
            before, total = p.name, total + n_bytes
        need(total <= 1024 * self.slot.file_length, "RMM-064", at_task, f"{total} private bytes")

    # --- 7 Extents ---

    def frame_arrays(self, i: int) -> list[tuple[int, int]]:
        """7.2: "a frame's are: mean of A, basis of A, mean of B, basis of B"; layout, length."""
        n_in, n_out = self.table["TARG"][self.table["FRAM"][i].target][:2]
        a, b = self.parts(i)
        return [(a.mean, n_in), (a.basis, n_in), (b.mean, n_out), (b.basis, n_out)]

    def entry_arrays(self, m: Member) -> list[tuple[int, int]]:
        """7.2: "coefficients of A, residual of A, coefficients of B, residual of B"."""
        arrays, (a, b) = [], self.parts(m.frame)
        for part, ids, n in ((a, m.form[3:5], m.target.n_in), (b, m.form[5:7], m.target.n_out)):
            k = m.form.rank if part.flags & 1 else 1  # "K = rank with row mixing and 1 otherwise"
            positions = -(-n // part.group) if part.group else 0
            arrays += [(ids[0], k * positions), (ids[1], n)]
        return arrays

    def check_length(self, arrays: list[tuple[int, int]], x: Any, at: int, rule: str) -> None:
        """RMM-052, RMM-061: what the arrays take, "if all encodings are fixed-size"."""
        if all(self.fixed_size[layout] for layout, _ in arrays):
            self.place(arrays, 0, x.length, at, rule)

    def place(
        self, arrays: list[tuple[int, int]], offset: int, length: int, at: int, rule: str
    ) -> list[Run]:
        """7.2: find the runs of an entry or frame whose record is at `at`."""
        placed, end = [], 0
        for number, (layout, n) in enumerate(arrays):
            x = None if layout == NONE else self.table["LAYO"][layout]
            first = 0
            for i in range(x.first_run, x.first_run + x.n_runs) if x else ():
                count, code = self.table["RUNS"][i][:2]
                text = f"unknown encoding {code:#04x}"
                need(code in ENCODINGS, "RMM-088", self.at("RUNS", i), text, "unsupported")
                encoding, rows, start = ENCODINGS[code], list[F32 | None](), end
                if encoding.row_bytes:
                    n_bytes = count * encoding.row_bytes(n)
                    start = ceil_to(end, 64) if n_bytes >= 4096 else end
                else:
                    raw = self.data[offset + end : offset + length]
                    n_bytes, rows = trellis_run(raw, count, n, offset + end)
                end = start + n_bytes
                need(end <= length, rule, at, f"{length} bytes, arrays take more")
                placed.append(Run(number, first, count, n, encoding, offset + start, n_bytes, rows))
                first += count
        need(end == length, rule, at, f"{length} bytes, arrays take {end}")
        return placed

    # --- 8 Reconstruction ---

    def arrays(self, layouts: list[tuple[int, int]], *place: Any) -> list[Array | None]:
        """Return the arrays of an entry or frame, None where the layout is NONE."""
        runs = self.place(layouts, *place)
        return [
            None if layout == NONE else Array(self.data, [r for r in runs if r.array == number])
            for number, (layout, _) in enumerate(layouts)
        ]

    def load(self, task: str) -> dict[str, tuple[F32, F32, float]]:
        """Return A (rank, n_in), B (n_out, rank) and the scale at each target of a task."""
        out = {}
        for m in self.tasks[task]:
            rank, shared = m.form.rank, list[Array | None]([None] * 4)
            if m.frame is not None:
                f, at = self.table["FRAM"][m.frame], self.at("FRAM", m.frame)
                shared = self.arrays(self.frame_arrays(m.frame), f.offset, f.length, at, "RMM-052")
            own = self.arrays(self.entry_arrays(m), m.offset, m.entry.length, m.at, "RMM-061")
            a, b = self.parts(m.frame)
            A = factor(rank, m.target.n_in, a, *shared[:2], *own[:2])
            B = factor(rank, m.target.n_out, b, *shared[2:], *own[2:])
            out[self.names[m.target.name]] = A, np.ascontiguousarray(B.T), m.form.scale
        return out

    def privates(self, task: str) -> dict[str, tuple[int, int, tuple[int, ...], bytes]]:
        """Return dtype, role, shape and bytes of each private tensor of a task."""
        t, out = self.table["TASK"][[*self.tasks].index(task)], {}
        for p in self.table["PRIV"][t.first_private : t.first_private + t.n_privates]:
            blob, dims = self.table["BLOB"][p.blob], self.table["DIMS"]
            shape = tuple(d.size for d in dims[p.first_dim : p.first_dim + p.n_dims])
            content = self.data[blob.offset : blob.offset + blob.length]
            out[self.names[p.name]] = p.dtype, p.role, shape, content
        return out

    def metadata(self) -> dict[str, Any] | None:
        """9; None if there is none.  Refuses what breaks RMM-026, RMM-090 or RMM-091."""
        raw = self.raw("meta")
        if not raw:
            return None
        at = self.at("meta", 0)
        try:
            value = parse_metadata(raw)
        except ValueError as fault:
            raise Refused("RMM-090", at, f"metadata: {fault}", "malformed") from fault
        schema = json.loads(Path(__file__).with_name("metadata.schema.json").read_text("utf-8"))
        path = misfit(value, schema, schema)
        need(path is None, "RMM-091", at, f"metadata: {path} breaks the schema")
        fits = all(t.get("config", -1) < len(value["configs"]) for t in value["tasks"].values())
        need(fits, "RMM-091", at, "metadata: a config is not below the number of configs")
        return value

    # --- What validators check beyond ---

    def faults(self) -> Iterator[Fault]:
        """Yield the rules marked "load" and "validate" that the file breaks."""
        yield from self.slot_faults
        for start, end in self.gaps:
            yield from self.zeros("RMM-072", start, end)
        try:
            self.metadata()
            errors, n = self.records("erro", self.raw("erro")) if "erro" in self.sections else [], 0
            n, at = len(self.table["ENTR"]), self.at("erro", 0)
            need(len(errors) in (0, n), "RMM-092", at, f"{len(errors)} errors, {n} entries")
            for i, (error,) in enumerate(errors):
                need(not error < 0, "RMM-092", self.at("erro", i), f"negative error {error}")
        except Refused as fault:
            yield fault.rule, fault.offset, fault.message
        for i, f in enumerate(self.table["FRAM"]):
            arrays, at = self.frame_arrays(i), self.at("FRAM", i)
            yield from self.payload(arrays, f.offset, f, at, "RMM-052", "RMM-081")
        for t, members in zip(self.table["TASK"], self.tasks.values(), strict=True):
            end = t.offset
            for m in members:
                yield from self.zeros("RMM-085", end, m.offset)
                arrays, end = self.entry_arrays(m), m.offset + m.entry.length
                yield from self.payload(arrays, m.offset, m.entry, m.at, "RMM-061", "RMM-080")
        for name, rule in (("BLOB", "RMM-082"), ("free", "RMM-083")):
            for x in self.table[name]:
                if crc32c(self.data[x.offset : x.offset + x.length]) != x.crc:
                    yield rule, x.offset, "wrong crc"

    def zeros(self, rule: str, start: int, end: int) -> Iterator[Fault]:
        at = self.nonzero(start, end)
        if at:
            yield rule, at, "padding is not zero"

    def payload(
        self, arrays: Any, offset: int, x: Any, at: int, rule: str, crc_rule: str
    ) -> Iterator[Fault]:
        """RMM-080, 081, 085 to 088 for one entry or frame; contents only if its crc is right."""
        if crc32c(self.data[offset : offset + x.length]) != x.crc:
            yield crc_rule, offset, "wrong crc"
            return
        try:
            placed = self.place(arrays, offset, x.length, at, rule)
        except Refused as fault:
            yield fault.rule, fault.offset, fault.message
            return
        end = offset
        for run in placed:
            yield from self.zeros("RMM-085", end, run.offset)
            end = run.offset + run.length
            if bits := run.encoding.bits:  # "finite", "codes beyond the row's end [...] zero"
                scales, codes = q_blocks(self.data[run.offset : end], bits)
                spare = codes.reshape(run.count, -1).copy()
                spare[:, : run.n] = 0
                bad = ~np.isfinite(scales) | spare.reshape(-1, 32).any(axis=1)
                if bad.any():
                    block = run.offset + int(bad.argmax()) * (2 + 4 * bits)
                    yield "RMM-086", block, "scale is not finite, or spare code is not zero"


class Array:
    """7.2: "An array is its runs in order"."""

    def __init__(self, data: bytes, runs: list[Run]) -> None:
        self.data, self.runs = data, runs

    def row(self, i: int) -> F32:
        run = self.runs[bisect_right(self.runs, i, key=lambda run: run.first) - 1]
        if run.encoding.decode is None:
            row = run.rows[i - run.first]
            return np.zeros(run.n, np.float32) if row is None else row
        size = run.length // run.count
        start = run.offset + (i - run.first) * size
        return run.encoding.decode(self.data[start : start + size], run.n)


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

    mixing = part.flags & 1
    with np.errstate(all="ignore"):
        for j in range(part.n_components if basis and coefficients else 0):
            c_j = coefficients.row(j)  # type: ignore[union-attr]
            positions = -(-length // part.group)
            for k in range(rank):
                c = c_j[k * positions :][:positions] if mixing else c_j  # kc
                row = basis.row(j if mixing else j * part.rank + k)  # type: ignore[union-attr]  # kb
                add(k, np.repeat(c, part.group)[:length] * row)
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
        if not math.isfinite(value):
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
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


TYPES = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int}


def misfit(value: Any, schema: Any, root: Any, path: str = "") -> str | None:
    """Return the path of the first value that breaks the schema, for the keywords it uses."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    kind, inner = schema.get("type"), []
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind and (not isinstance(value, TYPES[kind]) or isinstance(value, bool)):
        return path
    if kind in ("number", "integer") and value < schema.get("minimum", value):
        return path
    if kind == "string" and not re.search(schema.get("pattern", ""), value):
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
    return Collection(bytes(data))


def validate(data: bytes) -> list[Fault]:
    """Return the rules that the file breaks: the first "open" one, or all others."""
    try:
        return [*open_file(data).faults()]
    except Refused as fault:
        return [(fault.rule, fault.offset, fault.message)]


def main(argv: list[str]) -> int:
    """List the tasks of a file, then the rules that it breaks."""
    data = Path(argv[1]).read_bytes()
    try:
        collection = open_file(data)
    except Refused as refused:
        print(f"refused: {refused}")
        return 4 if refused.status == "unsupported" else 3
    for task, members in collection.tasks.items():
        print(task)
        for m in members:
            name, t, form = collection.names[m.target.name], m.target, m.form
            print(f"  {name}: rank {form.rank}, {t.n_in} to {t.n_out}, scale {form.scale:g}")
        for name, (dtype, _, shape, _) in collection.privates(task).items():
            print(f"  {name}: {DTYPES[dtype].split()[0]} {list(shape)}")
    found = validate(data)
    for rule, offset, message in found:
        print(f"{rule} at {offset}: {message}")
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
