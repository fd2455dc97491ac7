"""Bytes of ``.rmm`` files from plain tables, so that vectors can break one thing at a time.

Struct and the standard library only; shares no code with any reader or writer.  `Collection` takes
what a file shall hold and knows the values that must come out; `Draft` is the file as tables of
named fields, all open to edits, of which `Draft.pack` computes what an edit left at None:
checksums, lengths, offsets.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

NONE = 0xFFFFFFFF
SIGNATURE = b"\x89RMM\r\n\x1a\n"
LARGE = 4096

# --- Checksum ------------------------------------------------------------------------------------

_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def crc32c(data: bytes) -> int:
    register = NONE
    for byte in data:
        register = _TABLE[(register ^ byte) & 255] ^ register >> 8
    return register ^ NONE


def align(offset: int, length: int, small: int = 8) -> int:
    step = 64 if length >= LARGE else small
    return -(-offset // step) * step


# --- Rows: the bytes and the values that they stand for ------------------------------------------


def f32(x: float) -> float:
    """Round to binary32.  Of sums and products of two binary32 this rounds once (53 > 2·24 + 1)."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


@dataclass
class Row:
    code: int
    raw: bytes
    values: list[float]
    bits: bytes = b""  # the values as binary32, where they have NaNs that must come back


def zero(n: int) -> Row:
    return Row(0x00, b"", [0.0] * n)


def raw_f32(raw: bytes) -> Row:
    return Row(0x01, raw, list(struct.unpack(f"<{len(raw) // 4}f", raw)), raw)


def row_f32(values: Iterable[float]) -> Row:
    values = list(values)
    return raw_f32(struct.pack(f"<{len(values)}f", *values))


def widened(half: int) -> bytes:
    """A binary16 as binary32; a NaN keeps its payload in the upper bits."""
    if half & 0x7C00 == 0x7C00:
        return struct.pack("<I", (half & 0x8000) << 16 | 0x7F800000 | (half & 0x3FF) << 13)
    return struct.pack("<f", struct.unpack("<e", struct.pack("<H", half))[0])


def raw_f16(raw: bytes) -> Row:
    wide = b"".join(map(widened, struct.unpack(f"<{len(raw) // 2}H", raw)))
    return Row(0x02, raw, list(struct.unpack(f"<{len(raw) // 2}f", wide)), wide)


def row_f16(values: Iterable[float]) -> Row:
    values = list(values)
    return raw_f16(struct.pack(f"<{len(values)}e", *values))


def raw_bf16(raw: bytes) -> Row:
    wide = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    return Row(0x03, raw, list(struct.unpack(f"<{len(raw) // 2}f", wide)), wide)


def row_q(bits: int, scales: list[float], codes: list[int]) -> Row:
    """A quantised row; `codes` are the stored bits, its length is the row's."""
    raw, values = b"", []
    for block, start in enumerate(range(0, len(codes), 32)):
        u = codes[start : start + 32]
        d = struct.unpack("<e", struct.pack("<e", scales[block]))[0]
        whole = u + [0] * (32 - len(u))
        if bits == 4:
            packed = bytes(whole[i] | whole[i + 16] << 4 for i in range(16))
        else:
            packed = sum(x << bits * i for i, x in enumerate(whole)).to_bytes(4 * bits, "little")
        raw += struct.pack("<e", d) + packed
        level = {
            4: lambda x: x - 8,
            8: lambda x: x - 256 if x > 127 else x,
        }.get(bits, lambda x: 2 * x - (2**bits - 1))
        values += [f32(d * float(level(x))) for x in u]
    return Row(0x10 + bits, raw, values)


# --- The trellis encoding (8.3), written from its decoding steps backwards -----------------------

GAUSSIAN = """
04b0556e 08dc431a 0f218de0 17bb0546 22a55547 2fa05396 3e3ce5f8 4df14256
5e2d58d9 6e6b3af7 7e39bff0 8d418996 9b4597e3 a820ecbf b3c2a029 be29706c
c75f7cf5 cf768ba8 d684ff71 dca38252 e1eb5127 e6750e8b ea5800a6 eda99fd4
f07d5fde f2e4a20a f4eec215 f6a93407 f81fab54 f95c4650 fa67ba65 fb497ef1
"""
EXPONENTIAL = """
0f218de0 1322754c 17bb0546 1ce8c54d 22a55547 28e6cfbb 2fa05396 36c2a71d
3e3ce5f8 45fd2e33 4df14256 56071975 5e2d58d9 6653b528 6e6b3af7 76668014
7e39bff0 85dae60a 8d418996 9466dd83 9b4597e3 a1d9d354 a820ecbf ae195f50
b3c2a029 b91cfafe be29706c c2e996ae c75f7cf5 cb8d91ae cf768ba8 d31d561d
"""
OCTAVE = "3f800000 3f6ac0c7 3f5744fd 3f45672a 3f3504f3 3f25fed7 3f1837f0 3f0b95c2"


def _f32_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@dataclass
class Table:
    """What a table number stands for."""

    number: int

    def __post_init__(self) -> None:
        self.i = self.number % 128 - 1
        self.b = 0 if self.i < 32 else 1 + (self.i - 32) // 8
        constants = (EXPONENTIAL if self.number > 128 else GAUSSIAN).split()
        ratio = int(constants[self.i - 8 * self.b], 16)
        weights, t = [1 << 32], ratio
        while True:
            weight = weights[-1] * t >> 32
            if weight < 1 << 18:
                break
            weights.append(weight)
            if self.number < 128:
                t = t * ratio >> 32
        self.Q = len(weights)
        total, room = sum(weights), 4095 - self.Q
        self.f = [1 + weight * room // total for weight in weights] + [1]
        self.f[0] += 4096 - sum(self.f)


@dataclass
class Trellis:
    """A run: for each row None, or a table number and the indices j of its values."""

    rows: list[tuple[int, list[int]] | None]
    n: int
    base: int = 0x3F80  # 1.0
    lanes: int | None = None  # other than the text asks

    def __post_init__(self) -> None:
        n_symbols = self.n * sum(row is not None for row in self.rows)
        if self.lanes is None:
            self.lanes = 1 if n_symbols < 1 << 14 else 4 if n_symbols < 1 << 16 else 16
        self.numbers = bytes(0 if row is None else row[0] for row in self.rows)
        symbols = []
        for row in self.rows:
            if row is not None:
                table = Table(row[0])
                symbols += [(position % self.lanes, table, j) for position, j in enumerate(row[1])]
        self.states, backwards = [1 << 16] * self.lanes, []
        for lane, table, j in reversed(symbols):
            x = self.states[lane]
            if table.b:
                if x << table.b >= 1 << 32:
                    backwards.append(x & 0xFFFF)
                    x >>= 16
                x = x << table.b | j & (1 << table.b) - 1
            q = j >> table.b
            if q >= table.Q:
                backwards.append(q - table.Q)
                q = table.Q
            if x >= table.f[q] << 20:
                backwards.append(x & 0xFFFF)
                x >>= 16
            self.states[lane] = (x // table.f[q] << 12) + x % table.f[q] + sum(table.f[:q])
        self.words = backwards[::-1]

    def values(self) -> list[list[float]]:
        states, out = [0] * (self.lanes or 1), []
        base = _f32_of((self.base & 0x7FFF) << 16)
        for row in self.rows:
            if row is None:
                out.append([0.0] * self.n)
                continue
            step = base
            if self.base >> 15:
                i = row[0] % 128 - 1
                step = f32(base * _f32_of(int(OCTAVE.split()[i % 8], 16))) / (1 << i // 8)
            values = []
            for position, j in enumerate(row[1]):
                lane = position % len(states)
                state = states[lane]
                sign = -1 if (state ^ j) % 2 else 1
                values.append(f32(sign * (2 * j + 1) * step))
                turned = state >> 1
                turned ^= 0xA6 if state % 2 else 0
                turned ^= 0x79 if (j + 1) // 2 % 2 else 0
                states[lane] = turned
            out.append(values)
        return out

    def raw(self, length: bytes | None = None) -> bytes:
        """The run's bytes, with a length of the caller's choice or the right one."""
        body = struct.pack("<H", self.base) + self.numbers
        body += struct.pack(f"<{len(self.states)}I", *self.states)
        body += struct.pack(f"<{len(self.words)}H", *self.words)
        return (base128(len(body)) if length is None else length) + body

    def run(self, length: bytes | None = None) -> list[Row]:
        """The run as rows: the first one carries its bytes."""
        raw, values = self.raw(length), self.values()
        return [Row(0x20, b"" if i else raw, row) for i, row in enumerate(values)]


def base128(x: int) -> bytes:
    out = b""
    while x >= 128:
        out += bytes([x % 128 | 128])
        x //= 128
    return out + bytes([x])


def draw(random: Random, number: int, n: int) -> list[int]:
    """Indices as the table has them, with escapes now and then."""
    table, out = Table(number), []
    for _ in range(n):
        slot, q = random.getrandbits(12), 0
        while slot >= table.f[q]:
            slot -= table.f[q]
            q += 1
        q += random.getrandbits(4) if q == table.Q or random.getrandbits(6) == 0 else 0
        out.append(q << table.b | random.getrandbits(table.b) if table.b else q)
    return out


def row_unknown(code: int, raw: bytes, n: int) -> Row:
    return Row(code, raw, [0.0] * n)


def some(random: Random, kind: int, n: int) -> Row:
    """A row of encoding `kind` with random, finite content."""
    small = [random.getrandbits(12) / 256 - 8 for _ in range(n)]
    if kind == 0:
        return zero(n)
    if kind == 1:
        return row_f32(f32(x * (1 + random.getrandbits(20) / 2**20)) for x in small)
    if kind == 2:
        return row_f16(small)
    if kind == 3:
        return raw_bf16(b"".join(struct.pack("<f", x)[2:] for x in small))
    bits = kind - 0x10
    scales = [(random.getrandbits(10) - 512) / 4096 for _ in range(0, n, 32)]
    return row_q(bits, scales, [random.getrandbits(bits) for _ in range(n)])


Runs = list[list[Row]]  # an array as its runs


def runs(*rows: Row) -> Runs:
    """Group successive rows of one encoding into runs."""
    out: Runs = []
    for row in rows:
        if out and out[-1][0].code == row.code:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def flat(array: Runs | None) -> list[Row]:
    return [row for run in array or () for row in run]


# --- What a collection holds ---------------------------------------------------------------------


@dataclass
class Target:
    name: str
    n_in: int
    n_out: int
    kind: int = 0
    flags: int = 0
    kernel: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        kernel = (*self.kernel, 0, 0, 0)[:3]
        return (self.name.encode(), self.n_in, self.n_out, self.kind, self.flags, kernel)


@dataclass
class Part:
    group: int
    rank: int
    mean: Runs | None = None
    basis: Runs | None = None
    mixing: bool = False

    @property
    def p(self) -> int:
        return len(flat(self.basis)) // (1 if self.mixing else self.rank)


@dataclass
class Frame:
    target: Target
    a: Part | None
    b: Part | None


@dataclass
class Side:
    """What an entry stores of one factor."""

    coefficients: Runs | None = None
    residual: Runs | None = None


@dataclass
class Entry:
    target: Target
    rank: int
    a: Side
    b: Side
    scale: float = 1.0
    frame: Frame | None = None
    dtypes: tuple[int, int] = (1, 1)


@dataclass
class Private:
    name: str
    dtype: int
    shape: tuple[int, ...]
    content: bytes
    role: int = 0


@dataclass
class Task:
    name: str
    entries: list[Entry] = field(default_factory=list)
    privates: list[Private] = field(default_factory=list)


@dataclass
class Collection:
    tasks: list[Task] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)  # beyond those that entries name
    meta: bytes = b""
    errors: list[float] | None = None
    extra_strings: list[str] = field(default_factory=list)


def pack_arrays(arrays: list[Runs | None]) -> bytes:
    """7.2."""
    out = b""
    for array in arrays:
        for run in array or ():
            raw = b"".join(row.raw for row in run)
            fixed_size = run[0].code != 0x20
            out += bytes(align(len(out), len(raw), 1) - len(out) if fixed_size else 0) + raw
    return out


def factor(entry: Entry, side: Side, part: Part | None, length: int) -> list[list[bytes]]:
    """8.1, value by value, as four bytes each."""
    mean = flat(part.mean) if part else []
    basis = flat(part.basis) if part else []
    coefficients, residual = flat(side.coefficients), flat(side.residual)
    out = []
    for k in range(entry.rank):
        row = []
        for position in range(length):
            terms = [mean[k].values[position]] if mean else []
            for j in range(part.p if part else 0):
                positions = -(-length // part.group)
                kc = k if part.mixing else 0
                c = coefficients[j].values[kc * positions + position // part.group]
                b = basis[j if part.mixing else j * part.rank + k].values[position]
                terms.append(f32(c * b))
            if residual:
                terms.append(residual[k].values[position])
            if len(terms) == 1 and residual and residual[k].bits:
                row.append(residual[k].bits[4 * position : 4 * position + 4])
                continue
            total = terms[0] if terms else 0.0
            for term in terms[1:]:
                total = f32(total + term)
            row.append(struct.pack("<f", total))
        out.append(row)
    return out


def expected_factor(matrix: list[list[bytes]]) -> dict[str, Any]:
    values = [x for row in matrix for x in row]
    return {
        "shape": [len(matrix), len(matrix[0])],
        "sha256": hashlib.sha256(b"".join(values)).hexdigest(),
        "first": [struct.unpack("<f", x)[0].hex() for x in values[:4]],
    }


def expect(collection: Collection) -> dict[str, Any]:
    """The values that every reader must give."""
    tasks = {}
    for task in sorted(collection.tasks, key=lambda task: task.name.encode()):
        entries = []
        for e in sorted(task.entries, key=lambda e: e.target.key):
            t, frame = e.target, e.frame
            a = factor(e, e.a, frame.a if frame else None, t.n_in)
            b = factor(e, e.b, frame.b if frame else None, t.n_out)
            entries.append(
                {
                    "target": t.name,
                    "n_in": t.n_in,
                    "n_out": t.n_out,
                    "kind": t.kind,
                    "transposed": bool(t.flags & 1),
                    "kernel": list(t.kernel),
                    "rank": e.rank,
                    "scale": e.scale.hex(),
                    "dtypes": list(e.dtypes),
                    "A": expected_factor(a),
                    "B": expected_factor([list(row) for row in zip(*b, strict=True)]),
                }
            )
        privates = [
            {
                "name": p.name,
                "dtype": p.dtype,
                "role": p.role,
                "shape": list(p.shape),
                "sha256": hashlib.sha256(p.content).hexdigest(),
            }
            for p in sorted(task.privates, key=lambda p: p.name.encode())
        ]
        tasks[task.name] = {"entries": entries, "privates": privates}
    return {"tasks": tasks}


# --- The file as tables --------------------------------------------------------------------------

_PART = "Q:group I:n_components I:rank I:mean I:basis I:flags I:reserved"
_SIDES = [f"{item}_{side}" for side in "ab" for item in _PART.split()]
FIELDS = {
    "preamble": "8s:signature H:major H:minor I:features 44s:reserved I:crc",
    "slot": "Q:sequence Q:file_length Q:growth_limit Q:index_offset Q:index_length Q:n_sections "
    "I:section_record_size I:section_table_crc 68s:unused I:crc",
    "section": "4s:type I:coding Q:offset Q:length Q:count I:record_size I:crc",
    "TARG": "Q:n_in Q:n_out H:kernel0 H:kernel1 H:kernel2 B:kind B:flags I:name I:reserved",
    "RUNS": "I:count B:encoding 3s:reserved",
    "LAYO": "Q:first_run I:n_runs I:n_rows",
    "FORM": "d:scale I:rank I:cluster I:coefficients_a I:residual_a I:coefficients_b I:residual_b "
    "B:dtype_a B:dtype_b 6s:reserved",
    "FRAM": "Q:offset Q:length I:target I:crc " + " ".join(_SIDES),
    "TLST": "I:target",
    "TASK": "Q:offset Q:length Q:first_entry Q:n_entries Q:first_target Q:first_private "
    "Q:n_privates I:name I:reserved",
    "ENTR": "Q:length I:form I:crc",
    "DIMS": "Q:size",
    "PRIV": "I:name I:blob B:dtype B:n_dims B:role B:reserved I:reserved2 Q:first_dim",
    "BLOB": "Q:offset Q:length I:crc I:reserved",
    "erro": "f:error",
    "free": "Q:offset Q:length I:crc I:reserved",
}
ORDER = ("STRS", *(name for name in FIELDS if len(name) == 4 and name != "slot"), "meta")
Record = dict[str, Any]


def fields(kind: str) -> list[tuple[str, str, int]]:
    """Code, name and size of each field of a record."""
    items = [item.split(":") for item in FIELDS[kind].split()]
    return [(code, name, struct.calcsize("<" + code)) for code, name in items]


def pack_record(kind: str, record: Record) -> bytes:
    return b"".join(
        struct.pack("<" + code, record.get(name, b"" if code.endswith("s") else 0))
        for code, name, _ in fields(kind)
    )


class Draft:
    """A file as tables of named fields, open to edits until `pack`."""

    def __init__(self, collection: Collection) -> None:
        self.preamble: Record = {"signature": SIGNATURE, "major": 1, "minor": 0, "crc": None}
        self.slots: list[Record | None] = [{"sequence": 1}, None]
        self.strings: list[bytes] = []
        self.tables: dict[str, list[Record]] = {name: [] for name in ORDER if name in FIELDS}
        self.meta = collection.meta
        self.payload = bytearray()  # from offset 640 on
        self.sections: dict[str, Record] = {}  # overrides by type; "raw" adds a section
        self.order = list(ORDER)
        self.table_extra = b""  # behind each section record
        self.keep_empty = False
        self.tail = b""  # behind the index
        self.align_index = True
        self._fill(collection)

    # Tables -------------------------------------------------------------------------------------

    def _fill(self, c: Collection) -> None:
        tasks = sorted(c.tasks, key=lambda task: task.name.encode())
        targets = {t.key: t for t in c.targets}
        targets |= {e.target.key: e.target for task in tasks for e in task.entries}
        targets |= {frame.target.key: frame.target for frame in c.frames}
        ordered = [targets[key] for key in sorted(targets)]
        names = {t.name for t in ordered} | {task.name for task in tasks} | set(c.extra_strings)
        names |= {p.name for task in tasks for p in task.privates}
        self.strings = sorted(name.encode() for name in names)
        self.id_of = {name: i for i, name in enumerate(self.strings)}
        target_id = {t.key: i for i, t in enumerate(ordered)}
        for t in ordered:
            kernel = (*t.kernel, 0, 0, 0)[:3]
            self.tables["TARG"].append(
                {"n_in": t.n_in, "n_out": t.n_out, "kind": t.kind, "flags": t.flags,
                 "name": self.id_of[t.name.encode()],
                 **{f"kernel{i}": k for i, k in enumerate(kernel)}}
            )  # fmt: skip
        self._layouts: dict[tuple[tuple[int, int], ...], int] = {}
        frames = sorted(c.frames, key=lambda frame: target_id[frame.target.key])
        for frame in frames:
            raw = pack_arrays(
                [x for part in (frame.a, frame.b) for x in
                 ((part.mean, part.basis) if part else (None, None))]
            )  # fmt: skip
            record: Record = {"target": target_id[frame.target.key], "crc": None}
            for side, part in (("a", frame.a), ("b", frame.b)):
                record |= {f"{name}_{side}": x for name, x in self._part(part).items()}
            self.tables["FRAM"].append(record | self._extent(raw))
        lists: dict[tuple[int, ...], int] = {}
        forms: dict[tuple[Any, ...], int] = {}
        for task in tasks:
            entries = sorted(task.entries, key=lambda e: target_id[e.target.key])
            run = b""
            first_entry = len(self.tables["ENTR"])
            for e in entries:
                raw = pack_arrays([e.a.coefficients, e.a.residual, e.b.coefficients, e.b.residual])
                of_target = [f for f in frames if f.target is e.target]
                cluster = 1 + [f is e.frame for f in of_target].index(True) if e.frame else 0
                form = {
                    "scale": e.scale, "rank": e.rank, "cluster": cluster,
                    "coefficients_a": self._layout(e.a.coefficients),
                    "residual_a": self._layout(e.a.residual),
                    "coefficients_b": self._layout(e.b.coefficients),
                    "residual_b": self._layout(e.b.residual),
                    "dtype_a": e.dtypes[0], "dtype_b": e.dtypes[1],
                }  # fmt: skip
                key = tuple(form.values())
                if key not in forms:
                    forms[key] = len(self.tables["FORM"])
                    self.tables["FORM"].append(form)
                run += bytes(align(len(run), len(raw), 1) - len(run)) + raw
                self.tables["ENTR"].append({"length": len(raw), "form": forms[key], "crc": None})
            ids = tuple(target_id[e.target.key] for e in entries)
            if ids not in lists:
                lists[ids] = len(self.tables["TLST"])
                self.tables["TLST"] += [{"target": i} for i in ids]
            self.tables["TASK"].append(
                {"first_entry": first_entry, "n_entries": len(entries),
                 "first_target": lists[ids], "first_private": len(self.tables["PRIV"]),
                 "n_privates": len(task.privates), "name": self.id_of[task.name.encode()],
                 **self._extent(run)}
            )  # fmt: skip
            for p in sorted(task.privates, key=lambda p: p.name.encode()):
                self._private(p)
        if c.errors is not None:
            self.tables["erro"] = [{"error": x} for x in c.errors]

    def _part(self, part: Part | None) -> Record:
        if part is None:
            return {"mean": NONE, "basis": NONE}
        return {
            "group": part.group, "n_components": part.p, "rank": part.rank,
            "mean": self._layout(part.mean), "basis": self._layout(part.basis),
            "flags": int(part.mixing),
        }  # fmt: skip

    def _layout(self, array: Runs | None) -> int:
        if array is None:
            return NONE
        key = tuple((run[0].code, len(run)) for run in array)
        if key not in self._layouts:
            self._layouts[key] = len(self.tables["LAYO"])
            self.tables["LAYO"].append(
                {"first_run": len(self.tables["RUNS"]), "n_runs": len(key),
                 "n_rows": sum(n for _, n in key)}
            )  # fmt: skip
            self.tables["RUNS"] += [{"count": n, "encoding": code} for code, n in key]
        return self._layouts[key]

    def _private(self, p: Private) -> None:
        shared = [
            i for i, b in enumerate(self.tables["BLOB"])
            if self.bytes_of(b) == p.content
        ]  # fmt: skip
        if not shared:
            self.tables["BLOB"].append({"crc": None, **self._extent(p.content)})
            shared = [len(self.tables["BLOB"]) - 1]
        self.tables["PRIV"].append(
            {"name": self.id_of[p.name.encode()], "blob": shared[0], "dtype": p.dtype,
             "n_dims": len(p.shape), "role": p.role, "first_dim": len(self.tables["DIMS"])}
        )  # fmt: skip
        self.tables["DIMS"] += [{"size": d} for d in p.shape]

    def _extent(self, raw: bytes) -> Record:
        return self.place(raw) if raw else {"offset": 0, "length": 0}

    def bytes_of(self, record: Record) -> bytes:
        start, length = record.get("offset", 0) - 640, record.get("length", 0)
        return bytes(self.payload[start : start + length]) if length else b""

    def entry_offsets(self) -> list[int]:
        """Offset of each entry (7.1)."""
        out = []
        for task in self.tables["TASK"]:
            start, first = task.get("offset", 0), task["first_entry"]
            position = 0
            for entry in self.tables["ENTR"][first : first + task.get("n_entries", 0)]:
                position = align(position, entry.get("length", 0), 1)
                out.append(start + position)
                position += entry.get("length", 0)
        return out

    def place(self, raw: bytes, offset: int | None = None) -> Record:
        """Append bytes to the payload, at an offset of the caller's choice or aligned."""
        at = align(640 + len(self.payload), len(raw)) if offset is None else offset
        self.payload += bytes(at - 640 - len(self.payload)) + raw
        return {"offset": at, "length": len(raw)}

    # Where things are, after `pack`

    def find(self, token: int | tuple[int, int] | str) -> tuple[int, int]:
        """Return offset and length of what a token like ``TARG[1]`` or ``slot0.crc`` names."""
        if isinstance(token, int):
            return token, 1
        if isinstance(token, tuple):
            return token
        if token.startswith(("slot", "preamble")):
            base = {"slot0": 64, "slot1": 512, "preamble": 0}[token.split(".")[0]]
            kind = "slot" if base else "preamble"
            for _, name, n_bytes in fields(kind) if "." in token else ():
                if token.endswith("." + name):
                    return base, n_bytes
                base += n_bytes
            return base, 128 if kind == "slot" else 64
        kind, _, rest = token.partition(":")
        if kind in ("section", "content"):
            names = [r["type"].decode("latin-1") for r in self.table]
            at = len(names) - 1 - names[::-1].index(rest)
            size = 40 + len(self.table_extra)
            if kind == "section":
                return self.index_offset + at * size, size
            return self.table[at]["offset"], self.table[at]["length"]
        if kind == "entry":
            return self.entry_offsets()[int(rest)], self.tables["ENTR"][int(rest)]["length"]
        kind, _, index = token.rstrip("]").partition("[")
        if kind.startswith("extent-"):
            record = self.tables[kind[7:]][int(index)]
            return record["offset"], record["length"]
        section = next(r for r in self.table if r["type"] == kind.encode())
        size = section["record_size"]
        if section["coding"]:
            return section["offset"], section["length"]
        return section["offset"] + int(index) * size, size

    # Bytes --------------------------------------------------------------------------------------

    def _checksums(self) -> None:
        offsets = self.entry_offsets()
        for entry, offset in zip(self.tables["ENTR"], offsets):  # noqa: B905
            if entry["crc"] is None:
                entry["crc"] = crc32c(self.bytes_of({**entry, "offset": offset}))
        for name in ("FRAM", "BLOB", "free"):
            for record in self.tables[name]:
                if record["crc"] is None:
                    record["crc"] = crc32c(self.bytes_of(record))

    def pack(self, notes: list[tuple[int, bytes, str]] | None = None) -> bytes:
        """Return the file; `notes` takes each field as offset, bytes, meaning."""
        self._checksums()
        index_offset = align(640 + len(self.payload), 0)
        content: dict[str, bytes] = {}
        for name in self.order:
            extra = self.sections.get(name, {}).get("record_extra", b"")
            if name == "STRS":
                content[name] = b"".join(s + b"\0" for s in self.strings)
            elif name == "meta":
                content[name] = self.meta
            elif name in self.tables:
                records = self.tables[name]
                content[name] = b"".join(pack_record(name, r) + extra for r in records)
            if "raw" in self.sections.get(name, {}):
                content[name] = self.sections[name]["raw"]
        kept = [n for n in self.order if content.get(n) or self.keep_empty or n in self.sections]
        size = 40 + len(self.table_extra)
        index = bytearray(size * len(kept))
        table: list[Record] = []
        for name in kept:
            override = dict(self.sections.get(name, {}))
            override.pop("raw", None)
            one = sum(size for _, _, size in fields(name)) if name in FIELDS else 1
            one += len(override.pop("record_extra", b""))
            plain, raw = content[name], override.pop("stored", content[name])
            index += override.pop("pad", bytes(-len(index) % 8))
            record = {
                "type": name.encode("latin-1"), "coding": 0, "offset": index_offset + len(index),
                "length": len(raw), "record_size": one, "count": len(plain) // one,
                "crc": crc32c(raw),
            }  # fmt: skip
            table.append(record | override)
            index += raw
        index_end = len(index)
        for i, record in enumerate(table):
            index[i * size : (i + 1) * size] = pack_record("section", record) + self.table_extra
        self.table, self.index_offset = table, index_offset
        if self.align_index and index_end >= LARGE:  # a large index is aligned like any extent
            shift = align(index_offset, LARGE) - index_offset
            if shift:
                self.payload += bytes(index_offset - 640 - len(self.payload) + shift)
                return self.pack(notes)
        out = bytearray(640)
        if index:
            out += self.payload + bytes(index_offset - 640 - len(self.payload)) + index
        out += self.tail
        file_length = len(out) - len(self.tail)
        for base, slot in zip((64, 512), self.slots, strict=True):
            if slot is None:
                continue
            full = {
                "file_length": file_length, "growth_limit": len(out),
                "index_offset": index_offset if index else 640, "index_length": len(index),
                "n_sections": len(table), "section_record_size": size,
                "section_table_crc": crc32c(bytes(index[: size * len(table)])),
            } | slot  # fmt: skip
            raw = pack_record("slot", full | {"crc": 0})[:124]
            out[base : base + 128] = raw + struct.pack("<I", full.get("crc", crc32c(raw)))
            slot.update(full)
        crc = self.preamble["crc"]
        raw = pack_record("preamble", self.preamble | {"crc": 0})[:60]
        out[:64] = raw + struct.pack("<I", crc32c(raw) if crc is None else crc)
        if notes is not None:
            self._notes(bytes(out), notes)
        return bytes(out)

    def _notes(self, data: bytes, notes: list[tuple[int, bytes, str]]) -> None:
        """Describe every byte of the file, field by field."""
        raw_fields: list[tuple[int, str, str]] = [(0, "preamble", "preamble")]
        raw_fields += [(64, "slot", "slot 0"), (512, "slot", "slot 1")]
        size = 40 + len(self.table_extra)
        slot = next(s for s in self.slots if s is not None)
        for i, record in enumerate(self.table):
            name = record["type"].decode()
            raw_fields.append((slot["index_offset"] + i * size, "section", f"section {name}"))
            if name in FIELDS and not record["coding"]:
                raw_fields += [
                    (record["offset"] + j * record["record_size"], name, f"{name} {j}")
                    for j in range(record["count"])
                ]
        for start, kind, label in raw_fields:
            at = start
            for code, name, n_bytes in fields(kind):
                raw = data[at : at + n_bytes]
                value = struct.unpack("<" + code, raw)[0]
                if isinstance(value, bytes):
                    text = name if any(value) else f"{name}, zero"
                    text = f"{name}: {value.decode()}" if name == "type" else text
                elif name in ("crc", "section_table_crc"):
                    text = f"{name} = {value:#010x}"
                else:
                    text = f"{name} = {'NONE' if value == NONE else value}"
                notes.append((at, raw, f"{label}: {text}"))
                at += len(raw)


# --- Deflate, by hand, so that the bytes do not hang on a library's version ---------------------


def adler32(data: bytes) -> int:
    a, b = 1, 0
    for byte in data:
        a = (a + byte) % 65521
        b = (b + a) % 65521
    return b << 16 | a


def zlib_stored(data: bytes) -> bytes:
    """A zlib stream of one stored block."""
    head = struct.pack("<BHH", 1, len(data), len(data) ^ 0xFFFF)
    return b"\x78\x01" + head + data + struct.pack(">I", adler32(data))


def zlib_fixed(data: bytes) -> bytes:
    """A zlib stream of one block of fixed Huffman codes, with matches at distance 1 only."""
    bits = "110"  # last block, type 1; each string is in the order of the stream

    def symbol(value: int) -> str:
        if value < 144:
            return f"{0x30 + value:08b}"
        if value < 256:
            return f"{0x190 + value - 144:09b}"
        return f"{value - 256:07b}" if value < 280 else f"{0xC0 + value - 280:08b}"

    i = 0
    while i < len(data):
        if i and data[i : i + 258] == data[i - 1 : i] * 258:
            bits += symbol(285) + "00000"
            i += 258
        else:
            bits += symbol(data[i])
            i += 1
    bits += symbol(256)
    body = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    return b"\x78\x01" + body + struct.pack(">I", adler32(data))
