"""A builder of ``.rmm`` files for tests, from the specification alone.

Rows are made of random bytes of their encoding, so every level and scale occurs; what they decode
to is computed here, value by value, and so is the formula of reconstruction.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from dataclasses import dataclass, field

import google_crc32c
import ml_dtypes
import numpy as np

NONE = 0xFFFFFFFF
ZERO, F32, F16, BF16, TRELLIS = 0, 1, 2, 3, 0x20
QUANTISED = {1: 0x11, 2: 0x12, 3: 0x13, 4: 0x14, 5: 0x15, 6: 0x16, 7: 0x17, 8: 0x18}
ALL_ENCODINGS = (ZERO, F32, F16, BF16, *QUANTISED.values())
BITS = {code: bits for bits, code in QUANTISED.items()}
BF = np.dtype(ml_dtypes.bfloat16)


def crc32c(data: bytes) -> int:
    return google_crc32c.value(bytes(data))


def ceil_to(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass
class Row:
    encoding: int
    data: bytes
    values: np.ndarray


def block_values(bits: int, block: bytes) -> np.ndarray:
    d = np.frombuffer(block[:2], "<f2").astype(np.float32)[0]
    codes = block[2:]
    if bits == 4:
        levels = [(b & 15) - 8 for b in codes] + [(b >> 4) - 8 for b in codes]
    elif bits == 8:
        levels = list(np.frombuffer(codes, np.int8).astype(int))
    else:
        word = int.from_bytes(codes, "little")
        levels = [2 * ((word >> (i * bits)) & (2**bits - 1)) - (2**bits - 1) for i in range(32)]
    with np.errstate(all="ignore"):
        return np.float32(d) * np.array(levels, np.float32)


def random_row(rng: np.random.Generator, encoding: int, n: int, scale: float = 1.0) -> Row:
    """A row of n values; quantised rows have random codes, zero behind the end."""
    if encoding == ZERO:
        return Row(encoding, b"", np.zeros(n, np.float32))
    if encoding in (F32, F16, BF16):
        dtype = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: BF}[encoding]
        stored = (rng.standard_normal(n) * scale).astype(np.float32).astype(dtype)
        return Row(encoding, stored.tobytes(), stored.astype(np.float32))
    bits = BITS[encoding]
    data, values = b"", []
    for start in range(0, n, 32):
        d = np.float16(rng.standard_normal() * scale).tobytes()
        raw = int.from_bytes(rng.bytes(4 * bits), "little")
        if bits == 4:
            used = [i for i in range(32) if start + i < n]
            mask = sum(15 << ((i % 16) * 8 + (i // 16) * 4) for i in used)
        else:
            mask = (1 << (bits * min(32, n - start))) - 1
        block = d + (raw & mask).to_bytes(4 * bits, "little")
        data += block
        values.append(block_values(bits, block))
    return Row(encoding, data, np.concatenate(values)[:n])


def trellis_run(values: np.ndarray, run: bytes) -> list[Row]:
    """The rows of one run: its bytes go with the first."""
    return [Row(TRELLIS, run if k == 0 else b"", row) for k, row in enumerate(values)]


def exact_row(values: np.ndarray, encoding: int = F32) -> Row:
    dtype = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: BF}[encoding]
    stored = np.asarray(values).astype(dtype)
    return Row(encoding, stored.tobytes(), stored.astype(np.float32))


@dataclass
class Factor:
    """What a task stores of one factor: rows of coefficients and of the residual, or None."""

    coefficients: list[Row] | None = None
    residual: list[Row] | None = None


@dataclass
class Entry:
    target: int
    rank: int
    a: Factor
    b: Factor
    scale: float = 1.0
    cluster: int = 0
    dtypes: tuple[int, int] = (1, 1)


@dataclass
class Part:
    group: int
    rank: int
    p: int
    mean: list[Row] | None = None
    basis: list[Row] | None = None
    mixing: bool = False


@dataclass
class Frame:
    target: int
    a: Part | None = None
    b: Part | None = None


@dataclass
class Target:
    name: str
    n_in: int
    n_out: int
    kind: int = 0
    flags: int = 0
    kernel: tuple[int, ...] = ()


@dataclass
class Private:
    name: str
    dtype: int
    shape: tuple[int, ...]
    data: bytes
    role: int = 0


@dataclass
class Task:
    name: str
    entries: list[Entry] = field(default_factory=list)
    privates: list[Private] = field(default_factory=list)


@dataclass
class Collection:
    targets: list[Target]
    frames: list[Frame]
    tasks: list[Task]
    free: list[bytes] = field(default_factory=list)
    meta: bytes | None = None
    errors: list[float] | None = None
    deflate: bool = False
    scratch: bytes = b""
    sequence: int = 1
    minor: int = 0  # above 0, records of the index and of the section table have appended fields
    extra_sections: list[tuple[bytes, bytes]] = field(default_factory=list)

    def evaluate(self, task: int, entry: int, factor: str) -> np.ndarray:
        """The formula of 8.1, one element-wise step at a time: (rank, L) in f32."""
        item = self.tasks[task].entries[entry]
        target = self.targets[item.target]
        n = target.n_in if factor == "a" else target.n_out
        own: Factor = getattr(item, factor)
        part = None
        if item.cluster:
            frames = [frame for frame in self.frames if frame.target == item.target]
            part = getattr(frames[item.cluster - 1], factor)
        result = np.zeros((item.rank, n), np.float32)
        for k in range(item.rank):
            total = None
            if part is not None and part.mean is not None:
                total = part.mean[k].values
            for j in range(part.p if part is not None else 0):
                n_groups = -(-n // part.group)
                row = part.basis[j] if part.mixing else part.basis[j * part.rank + k]
                where = np.arange(n) // part.group + (k * n_groups if part.mixing else 0)
                with np.errstate(all="ignore"):
                    product = own.coefficients[j].values[where] * row.values
                    total = product if total is None else total + product
            if own.residual is not None:
                with np.errstate(all="ignore"):
                    value = own.residual[k].values
                    total = value if total is None else total + value
            if total is not None:
                result[k] = total
        return result

    def build(self) -> bytes:
        return _Writer(self).run()


class _Writer:
    def __init__(self, collection: Collection) -> None:
        self.c = collection
        self.out = bytearray(640)
        self.runs: list[bytes] = []
        self.layouts: dict[tuple, int] = {}
        self.layout_records: list[bytes] = []
        self.forms: dict[bytes, int] = {}

    def layout(self, rows: list[Row] | None) -> int:
        if rows is None:
            return NONE
        runs: list[list[int]] = []
        for row in rows:
            if runs and runs[-1][1] == row.encoding:
                runs[-1][0] += 1
            else:
                runs.append([1, row.encoding])
        key = tuple(map(tuple, runs))
        if key not in self.layouts:
            self.layouts[key] = len(self.layouts)
            self.layout_records.append(struct.pack("<QII", len(self.runs), len(runs), len(rows)))
            self.runs += [struct.pack("<IBxxx", count, encoding) for count, encoding in runs]
        return self.layouts[key]

    @staticmethod
    def arrays(arrays: list[list[Row] | None]) -> bytes:
        out = bytearray()
        for rows in arrays:
            start = 0
            while rows is not None and start < len(rows):
                stop = start
                while stop < len(rows) and rows[stop].encoding == rows[start].encoding:
                    stop += 1
                data = b"".join(row.data for row in rows[start:stop])
                if len(data) >= 4096 and rows[start].encoding != TRELLIS:
                    out += bytes(-len(out) % 64)
                out += data
                start = stop
        return bytes(out)

    def extent(self, data: bytes) -> int:
        if not data:
            return 0
        self.out += bytes(-len(self.out) % (64 if len(data) >= 4096 else 8))
        offset = len(self.out)
        self.out += data
        return offset

    def part(self, part: Part | None) -> bytes:
        if part is None:
            return struct.pack("<QIIIIII", 0, 0, 0, NONE, NONE, 0, 0)
        return struct.pack(
            "<QIIIIII",
            part.group,
            part.p,
            part.rank,
            self.layout(part.mean),
            self.layout(part.basis),
            int(part.mixing),
            0,
        )

    def form(self, entry: Entry) -> int:
        record = struct.pack(
            "<dIIIIIIBB6x",
            entry.scale,
            entry.rank,
            entry.cluster,
            self.layout(entry.a.coefficients),
            self.layout(entry.a.residual),
            self.layout(entry.b.coefficients),
            self.layout(entry.b.residual),
            *entry.dtypes,
        )
        return self.forms.setdefault(record, len(self.forms))

    def run(self) -> bytes:
        c = self.c
        names = sorted(
            {t.name.encode() for t in c.targets}
            | {t.name.encode() for t in c.tasks}
            | {p.name.encode() for t in c.tasks for p in t.privates}
        )
        ids = {name: i for i, name in enumerate(names)}
        fram, task_records, entr, tlst = [], [], [], []
        for frame in c.frames:
            parts = [frame.a, frame.b]
            data = self.arrays(
                [a for p in parts for a in ((p.mean, p.basis) if p else (None, None))]
            )
            fram.append(
                struct.pack("<QQII", self.extent(data), len(data), frame.target, crc32c(data))
                + self.part(frame.a)
                + self.part(frame.b)
            )
        priv, dims, blobs, contents = [], [], [], {}
        lists: dict[tuple, int] = {}
        for task in c.tasks:
            run, first_entry = bytearray(), len(entr)
            for entry in task.entries:
                data = self.arrays(
                    [entry.a.coefficients, entry.a.residual, entry.b.coefficients, entry.b.residual]
                )
                if len(data) >= 4096:
                    run += bytes(-len(run) % 64)
                run += data
                entr.append(struct.pack("<QII", len(data), self.form(entry), crc32c(data)))
            offset = self.extent(bytes(run))
            first_private = len(priv)
            for private in sorted(task.privates, key=lambda p: p.name.encode()):
                if private.data not in contents:
                    contents[private.data] = len(blobs)
                    blobs.append(
                        struct.pack(
                            "<QQII",
                            self.extent(private.data),
                            len(private.data),
                            crc32c(private.data),
                            0,
                        )
                    )
                priv.append(
                    struct.pack(
                        "<IIBBBBIQ",
                        ids[private.name.encode()],
                        contents[private.data],
                        private.dtype,
                        len(private.shape),
                        private.role,
                        0,
                        0,
                        len(dims),
                    )
                )
                dims += [struct.pack("<Q", side) for side in private.shape]
            targets = tuple(entry.target for entry in task.entries)
            if targets not in lists:
                lists[targets] = len(tlst)
                tlst += [struct.pack("<I", t) for t in targets]
            task_records.append(
                struct.pack(
                    "<QQQQQQQII",
                    offset,
                    len(run),
                    first_entry,
                    len(task.entries),
                    lists[targets],
                    first_private,
                    len(task.privates),
                    ids[task.name.encode()],
                    0,
                )
            )
        free = [struct.pack("<QQII", self.extent(f), len(f), crc32c(f), 0) for f in c.free]
        targ = [
            struct.pack(
                "<QQ3HBBII",
                t.n_in,
                t.n_out,
                *(*t.kernel, 0, 0, 0)[:3],
                t.kind,
                t.flags,
                ids[t.name.encode()],
                0,
            )
            for t in c.targets
        ]
        sections: list[tuple[bytes, list[bytes] | bytes, int]] = [
            (b"STRS", b"".join(name + b"\0" for name in names), 1),
            (b"TARG", targ, 32),
            (b"RUNS", self.runs, 8),
            (b"LAYO", self.layout_records, 16),
            (b"FORM", list(self.forms), 40),
            (b"FRAM", fram, 88),
            (b"TLST", tlst, 4),
            (b"TASK", task_records, 64),
            (b"ENTR", entr, 16),
            (b"DIMS", dims, 8),
            (b"PRIV", priv, 24),
            (b"BLOB", blobs, 24),
            (b"free", free, 24),
        ]
        if c.errors is not None:
            sections.append((b"erro", [struct.pack("<f", e) for e in c.errors], 4))
        if c.meta is not None:
            sections.append((b"meta", c.meta, 1))
        for kind, data in c.extra_sections:
            sections.append((kind, data, 1))
        sections = [s for s in sections if s[1]]
        return self.finish(sections)

    def finish(self, sections: list) -> bytes:
        c = self.c
        stored = []
        for kind, records, size in sections:
            if c.minor and not isinstance(records, bytes):
                records, size = [record + b"\xaa" * 8 for record in records], size + 8
            data = records if isinstance(records, bytes) else b"".join(records)
            count, coding = len(data) // size, 0
            if c.deflate and kind in (b"erro", b"meta"):
                data, coding = zlib.compress(data, 9), 1
            stored.append((kind, coding, data, count, size))
        record_size = 48 if c.minor else 40
        length = record_size * len(stored)
        for _, _, data, _, _ in stored:
            length = ceil_to(length, 8) + len(data)
        self.out += bytes(-len(self.out) % (64 if length >= 4096 else 8))
        start = len(self.out)
        table, body = b"", bytearray()
        for kind, coding, data, count, size in stored:
            body += bytes(-len(body) % 8)
            offset = start + record_size * len(stored) + len(body)
            table += struct.pack(
                "<4sIQQQII", kind, coding, offset, len(data), count, size, crc32c(data)
            ) + b"\xbb" * (record_size - 40)
            body += data
        self.out += table + body
        file_length = len(self.out)
        self.out += c.scratch
        slot = struct.pack(
            "<QQQQQQII68x",
            c.sequence,
            file_length,
            len(self.out),
            start,
            length,
            len(stored),
            record_size,
            crc32c(table),
        )
        preamble = struct.pack("<8sHHI44x", b"\x89RMM\r\n\x1a\n", 1, c.minor, 0)
        self.out[:64] = preamble + struct.pack("<I", crc32c(preamble))
        at = 64 if c.sequence % 2 else 512
        self.out[at : at + 128] = slot + struct.pack("<I", crc32c(slot))
        return bytes(self.out)


# --- taking files apart, to break them -------------------------------------------------------


def active_slot(data: bytes) -> int:
    slots = [
        at
        for at in (64, 512)
        if crc32c(data[at : at + 124]) == struct.unpack_from("<I", data, at + 124)[0]
    ]
    return max(slots, key=lambda at: struct.unpack_from("<Q", data, at)[0])


def sections_of(data: bytes) -> dict[str, tuple[int, int, int]]:
    """Type to (offset of its record in the table, offset, length)."""
    start, _, n = struct.unpack_from("<QQQ", data, active_slot(data) + 24)
    found = {}
    for i in range(n):
        at = start + 40 * i
        kind, _, offset, length = struct.unpack_from("<4sIQQ", data, at)
        found[kind.decode("latin1")] = (at, offset, length)
    return found


def seal(data: bytearray) -> bytes:
    """Put the checksums of sections, section table, slot and preamble right again."""
    slot = active_slot_of(data)
    start, _, n = struct.unpack_from("<QQQ", data, slot + 24)
    for i in range(n):
        at = start + 40 * i
        offset, length = struct.unpack_from("<QQ", data, at + 8)
        struct.pack_into("<I", data, at + 36, crc32c(data[offset : offset + length]))
    struct.pack_into("<I", data, slot + 52, crc32c(data[start : start + 40 * n]))
    struct.pack_into("<I", data, slot + 124, crc32c(data[slot : slot + 124]))
    struct.pack_into("<I", data, 60, crc32c(data[:60]))
    return bytes(data)


def active_slot_of(data: bytes) -> int:
    return max((64, 512), key=lambda at: struct.unpack_from("<Q", data, at)[0])


def patched(data: bytes, offset: int, code: str, *values: object, sealed: bool = True) -> bytes:
    """A copy with a field overwritten and the checksums of header and index put right."""
    out = bytearray(data)
    struct.pack_into("<" + code, out, offset, *values)
    return seal(out) if sealed else bytes(out)


# --- collections -----------------------------------------------------------------------------


def rows(
    rng: np.random.Generator, n_rows: int, n: int, encodings: tuple[int, ...], scale: float = 1.0
) -> list[Row]:
    """n_rows rows whose encodings repeat `encodings`, sorted so that runs form."""
    codes = sorted(encodings[i % len(encodings)] for i in range(n_rows))
    return [random_row(rng, code, n, scale) for code in codes]


def make_part(rng, n, group, rank, p, encodings, *, mean=True, mixing=False) -> Part:
    n_basis = p if mixing else p * rank
    return Part(
        group,
        rank,
        p,
        rows(rng, rank, n, encodings) if mean else None,
        rows(rng, n_basis, n, encodings) if p else None,
        mixing,
    )


def make_factor(rng, part: Part | None, n, rank, encodings, *, residual=False) -> Factor:
    coefficients = None
    if part is not None and part.p:
        width = -(-n // part.group) * (rank if part.mixing else 1)
        coefficients = rows(rng, part.p, width, encodings)
    return Factor(coefficients, rows(rng, rank, n, encodings) if residual else None)


def rich(
    seed: int = 0, encodings: tuple[int, ...] = ALL_ENCODINGS, **options: object
) -> Collection:
    """Every kind of frame, grouping and term, ragged ranks, private tensors, free extents."""
    rng = np.random.default_rng(seed)
    targets = [
        Target("a.position", 70, 33),
        Target("b.factor", 64, 97),
        Target("c.group", 130, 45),
        Target("d.mixing", 61, 40),
        Target("e.alone", 1100, 530),
        Target("f.emb", 300, 16, 1),
        Target("g.conv", 27, 8, 2, 0, (3, 3)),
        Target("h.oned", 12, 12, 0, 1),
        Target("h.oned", 12, 13, 0, 1),
    ]
    frames = [
        Frame(0, make_part(rng, 70, 1, 8, 3, encodings), make_part(rng, 33, 1, 8, 2, encodings)),
        Frame(0, None, make_part(rng, 33, 1, 5, 0, encodings)),
        Frame(
            1,
            make_part(rng, 64, 64, 20, 5, encodings),
            make_part(rng, 97, 97, 20, 2, encodings, mean=False),
        ),
        Frame(
            2,
            make_part(rng, 130, 7, 6, 6, encodings),
            make_part(rng, 45, 44, 6, 1, encodings, mean=False),
        ),
        Frame(
            3,
            make_part(rng, 61, 61, 37, 3, encodings, mixing=True, mean=False),
            make_part(rng, 40, 40, 37, 9, encodings, mixing=True),
        ),
    ]
    tasks = []
    for number, name in enumerate(("alpha", "βeta", "gamma")):
        entries = []
        for frame, cluster in ((0, 1), (2, 1), (3, 1), (4, 1)):
            f = frames[frame]
            n_in, n_out = targets[f.target].n_in, targets[f.target].n_out
            rank = max(1, f.a.rank - 2 * number)
            entries.append(
                Entry(
                    f.target,
                    rank,
                    make_factor(rng, f.a, n_in, rank, encodings, residual=number == 1),
                    make_factor(rng, f.b, n_out, rank, encodings, residual=number != 1),
                    0.5 + number,
                    cluster,
                    (1 + number, 3 - number),
                )
            )
        for target in (4, 5, 6, 7 + number % 2):
            t, rank = targets[target], 16 + 3 * number
            entries.append(
                Entry(
                    target,
                    rank,
                    Factor(None, rows(rng, rank, t.n_in, encodings)),
                    Factor(None, rows(rng, rank, t.n_out, encodings) if number else None),
                )
            )
        privates = [
            Private("head.weight", 1, (4, 3), rng.bytes(48), 1),
            Private(f"only.{number}", 13, (), bytes([number % 2]), 2),
            Private("empty", 4, (0, 5), b"", 0),
            Private("big", 6, (5000,), bytes(5000), 3),
        ]
        tasks.append(Task(name, entries, privates))
    # One task in the second cluster of the first target, and one with nothing.
    tasks.append(
        Task(
            "omega",
            [
                Entry(
                    0,
                    4,
                    Factor(None, rows(rng, 4, 70, encodings)),
                    make_factor(rng, frames[1].b, 33, 4, encodings, residual=True),
                    2.0,
                    2,
                )
            ],
        )
    )
    tasks.append(Task("zeta"))
    tasks.sort(key=lambda task: task.name.encode())
    n_entries = sum(len(task.entries) for task in tasks)
    collection = Collection(
        targets,
        frames,
        tasks,
        [b"\x07" * 5, b"\x01" * 4100],
        b'{"producer":"test"}',
        [float("nan")] + [0.25] * (n_entries - 1),
    )
    return dataclasses.replace(collection, **options)


def tiny(seed: int = 1, **options: object) -> Collection:
    """A file of about two kilobytes with one of most things."""
    rng = np.random.default_rng(seed)
    targets = [Target("t", 5, 3), Target("u", 33, 2)]
    frames = [Frame(0, make_part(rng, 5, 1, 2, 1, (F16,)), None)]
    entries = [
        Entry(
            0,
            2,
            make_factor(rng, frames[0].a, 5, 2, (F16,)),
            Factor(None, rows(rng, 2, 3, (F32, ZERO))),
            2.0,
            1,
        ),
        Entry(1, 1, Factor(None, rows(rng, 1, 33, (QUANTISED[3],))), Factor()),
    ]
    tasks = [
        Task("one", entries, [Private("bias", 1, (2,), rng.bytes(8), 2)]),
        Task("two", entries[:1]),
    ]
    collection = Collection(
        targets, frames, tasks, [b"gone"], b'{"producer":"x"}', [0.5, 0.25, 0.125]
    )
    return dataclasses.replace(collection, **options)


def large(n_tasks: int, n_targets: int, n: int = 8, rank: int = 2) -> bytes:
    """Many tasks and targets, to time opening."""
    rng = np.random.default_rng(0)
    targets = [Target(f"layer.{i:04d}.proj", n, n) for i in range(n_targets)]
    own = rows(rng, rank, n, (QUANTISED[4],))
    entries = [Entry(i, rank, Factor(None, own), Factor(None, own)) for i in range(n_targets)]
    tasks = [Task(f"task-{i:05d}", entries) for i in range(n_tasks)]
    return Collection(targets, [], tasks).build()
