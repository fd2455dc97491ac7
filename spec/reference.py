"""Reader and validator of ``.rmm`` files, written from the text of ``rmm-1.md`` alone.

Slow and short, to be read beside the text; no code is shared with others.  ``open_file`` refuses
a file at the first "open" rule that it breaks, ``validate`` lists that, or what each part breaks.
``python reference.py FILE`` lists the tasks of a file and the rules that it breaks.
"""

from __future__ import annotations

import math
import re
import struct
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from reference_base import (
    ABSENT,
    DTYPES,
    F32,
    FIXED_SIZE,
    NONE,
    SCHEMA,
    SIZES,
    STRUCTS,
    TRELLIS,
    TUPLES,
    Bytes,
    Member,
    Part,
    Refused,
    Run,
    Section,
    Slot,
    ceil_to,
    crc32c,
    need,
)
from reference_metadata import parse_metadata
from reference_rows import Array, decode, factor, q_blocks, row_bytes
from reference_trellis import trellis_run


class Collection:
    """The checked index of a file; payload is decoded by `load`.

    The steps of opening are in the order of section 12, but for extents (7), which come early: once
    they are known not to overlap, all that follows takes time in proportion to the file's length.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        for step in (
            self.preamble, self.slots, self.section_table, self.extents, self.strings, self.targets,
            self.layouts, self.forms, self.frames, self.tiling,
        ):  # fmt: skip
            step()
        self.tasks: dict[str, list[Member]] = {}
        for task, at in self.each("TASK"):
            self.tasks[self.names[task.name]] = self.members(task, at)
            self.check_privates(task, at)

    def zeros(self, rule: int, start: int, end: int) -> None:
        """Check that the bytes of a range are zero."""
        found = re.search(rb"[^\0]", self.data[start:end])
        need(not found, rule, start + found.start() if found else 0)

    def at(self, table: str, i: int) -> int:
        """Return the offset of a record; of the section, where the section is deflated."""
        if table not in self.sections:
            return self.slot.index_offset
        section = self.sections[table]
        return section.offset + (0 if section.coding else i * section.record_size)

    def each(self, table: str) -> Iterator[tuple[Any, int]]:
        """Yield the records of a table, with their offsets."""
        for i, record in enumerate(self.table[table]):
            yield record, self.at(table, i)

    # --- 5 Header ---

    def preamble(self) -> None:
        """5.1, RMM-001 to RMM-005."""
        need(self.data[:8] == b"\x89RMM\r\n\x1a\n", 1, 0)
        need(len(self.data) >= 640, 13, len(self.data))
        major, self.minor, features = struct.unpack_from("<HHI", self.data, 8)
        need(major == 1, 2, 8)
        need(features == 0, 3, 12)
        need(crc32c(self.data[:60]) == struct.unpack_from("<I", self.data, 60)[0], 4, 60)
        self.zeros(5, 16, 60)
        self.zeros(5, 192, 512)

    def slots(self) -> None:
        """5.2, RMM-010 to RMM-017."""
        valid, misplaced, self.slot_faults = [], 0, list[Refused]()
        for base, parity in ((64, 1), (512, 0)):
            raw = self.data[base : base + 128]
            slot = Slot._make(struct.unpack("<6QII68sI", raw))
            right = crc32c(raw[:124]) == slot.crc
            if right and slot.sequence > 0 and slot.sequence % 2 == parity:
                valid.append((slot, base))
                if self.minor == 0 and any(slot.unused):
                    self.slot_faults.append(Refused(15, base + 56))
            elif any(raw):  # "otherwise damaged"
                self.slot_faults.append(Refused(12, base))
                misplaced = misplaced or (base if right else 0)
        need(valid or not misplaced, 11, misplaced)
        need(valid, 10, 64)
        slot, base = max(valid)  # "the valid slot with the larger sequence"
        self.slot, n, size = slot, len(self.data), slot.record_size
        need(slot.file_length <= n, 13, base + 8)
        need(slot.growth_limit >= max(slot.file_length, n), 14, base + 16)
        need(size >= 40 and size % 8 == 0 and (size == 40 or self.minor > 0), 17, base + 48)
        need(slot.index_offset % 8 == 0 and slot.index_offset >= 640, 16, base + 24)
        need(slot.index_offset + slot.index_length <= slot.file_length, 16, base + 32)
        need(slot.n_sections * size <= slot.index_length, 16, base + 40)

    # --- 6 Index ---

    def section_table(self) -> None:
        """6, RMM-020 to RMM-026."""
        self.sections: dict[str, Section] = {}
        self.table: dict[str, list[Any]] = {name: [] for name in TUPLES}
        start, size = self.slot.index_offset, self.slot.record_size
        end, position = start + self.slot.index_length, start + self.slot.n_sections * size
        need(crc32c(self.data[start:position]) == self.slot.table_crc, 20, start)
        for at in range(start, position, size):
            s = Section._make(struct.unpack_from("<4sIQQQII", self.data, at))
            name, n_bytes = s.type.decode("latin-1"), s.count * s.record_size
            need(re.fullmatch("[A-Za-z]{4}", name) and name not in self.sections, 22, at)
            critical, least = name[0].isupper(), SIZES.get(name)
            need(least or not critical, 23, at)
            longer = self.minor > 0 and least and s.record_size > least > 1
            need(least in (None, s.record_size) or longer, 24, at)
            need(s.length == n_bytes or s.coding, 24, at)
            need(s.coding == 0 or (s.coding == 1 and not critical and name != "free"), 26, at)
            need(s.coding == 0 or n_bytes <= 256 * s.length + 65536, 26, at)
            need(s.offset == ceil_to(position, 8) and s.offset + s.length <= end, 21, at)
            self.zeros(21, position, s.offset)
            position = s.offset + s.length
            need(crc32c(self.data[s.offset : position]) == s.crc, 25, s.offset)
            self.sections[name] = s
            if name in TUPLES and not s.coding:
                self.table[name] = self.records(name)
        need(position == end, 21, position)

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
                raise Refused(26, s.offset) from fault
            need(stream.eof and not stream.unused_data and len(raw) == n_bytes, 26, s.offset)
        return raw

    def records(self, name: str) -> list[Any]:
        """6: "a reader steps by record_size and ignores what it does not know"; RMM-037."""
        raw, s = self.raw(name), self.sections.get(name)
        step = f"{STRUCTS[name]}{s.record_size - SIZES[name] if s else 0}x"
        records = [*map(TUPLES[name]._make, struct.iter_unpack(step, raw))]
        reserved = [i for i, x in enumerate(TUPLES[name]._fields) if x.startswith("reserved")]
        for i, record in enumerate(records if reserved else ()):
            zero = all(record[x] in (0, bytes(3), bytes(6)) for x in reserved)
            need(zero, 37, self.at(name, i))
        return records

    def extents(self) -> None:
        """7, RMM-070 to RMM-072, and what is said of those of no bytes."""
        found, self.gaps = [(self.slot.index_offset, self.slot.index_length, "index")], []
        for kind, rule in (("FRAM", 52), ("TASK", 58), ("BLOB", 67), ("free", 71)):
            for x, at in self.each(kind):
                need(x.length > 0 or (x.offset == 0 and kind != "free"), rule, at)
            found += [(x.offset, x.length, kind) for x in self.table[kind] if x.length]
        before, end = 640, self.slot.file_length
        for offset, length, kind in sorted(found):
            need(kind == "free" or offset % (64 if length >= 4096 else 8) == 0, 70, offset)
            need(before <= offset and offset + length <= end, 71, offset)
            need(offset - before < 64, 72, before)
            self.gaps.append((before, offset))
            before = offset + length
        need(before == end, 72, before)

    def strings(self) -> None:
        """6.1 STRS, RMM-030 and RMM-031."""
        self.names, raw, before, position = list[str](), self.raw("STRS"), b"", 0
        for text in raw.split(b"\0")[:-1]:
            at = self.at("STRS", position)
            need(1 <= len(text) <= 1024 and not re.search(rb"[\0-\x1f\x7f]", text), 30, at)
            try:
                self.names.append(text.decode("utf-8"))
            except UnicodeDecodeError as fault:
                raise Refused(30, at) from fault
            need(text > before, 31, at)
            before, position = text, position + len(text) + 1
        need(position == len(raw), 30, self.at("STRS", position))

    def targets(self) -> None:
        """6.1 TARG, RMM-035 and RMM-036."""
        before: tuple[int, ...] = ()
        for t, at in self.each("TARG"):
            kernel = (t.k0, t.k1, t.k2)
            sizes = [k for k in kernel if k]
            need(t.kind <= 2, 36, at, "unsupported")
            need(1 <= t.n_in <= 2**40 and 1 <= t.n_out <= 2**40 and t.flags <= 1, 36, at)
            need((t.kind == 2) == bool(sizes) and kernel == (*sizes, 0, 0, 0)[:3], 36, at)
            need(t.n_in % math.prod(sizes) == 0, 36, at)
            key = (t.name, t.n_in, t.n_out, t.kind, t.flags, *kernel)
            need(t.name < len(self.names) and key > before, 35, at)
            before = key

    def layouts(self) -> None:
        """6.1 RUNS and LAYO, RMM-040 and RMM-041."""
        for run, at in self.each("RUNS"):
            need(run.count > 0, 40, at)
        self.n_rows, self.fixed_size, first = {NONE: 0}, {NONE: True}, 0  # by layout
        for i, (x, at) in enumerate(self.each("LAYO")):
            runs = self.table["RUNS"][first : first + x.n_runs]
            need(x.first_run == first and len(runs) == x.n_runs > 0, 41, at)
            need(sum(run.count for run in runs) == x.n_rows, 41, at)
            fixed = [run.encoding in FIXED_SIZE for run in runs]
            again = [a.encoding == b.encoding for a, b in pairwise(runs)]
            need(not any(a and b for a, b in zip(again, fixed, strict=False)), 41, at)
            self.n_rows[i], self.fixed_size[i] = x.n_rows, all(fixed)
            first += x.n_runs
        need(first == len(self.table["RUNS"]), 41, self.at("RUNS", first))

    def forms(self) -> None:
        """6.1 FORM, RMM-042 and RMM-043."""
        for f, at in self.each("FORM"):
            need(math.isfinite(f.scale) and 1 <= f.rank <= 2**20, 42, at)
            need({f.dtype_a, f.dtype_b} <= {1, 2, 3} and {*f[3:7]} <= self.n_rows.keys(), 42, at)
            for layout in (f.residual_a, f.residual_b):
                need(layout == NONE or self.n_rows[layout] == f.rank, 43, at)

    def parts(self, frame: int | None) -> tuple[Any, Any]:
        """Return the parts of a frame; without a frame it is as if both were absent."""
        if frame is None:
            return ABSENT, ABSENT
        record = self.table["FRAM"][frame]
        return Part._make(record[4:11]), Part._make(record[11:18])

    def frames(self) -> None:
        """6.1 FRAM, RMM-050 to RMM-052."""
        self.clusters: dict[int, list[int | None]] = {}
        self.frame_bytes, before = list[Bytes](), 0
        for i, (f, at) in enumerate(self.each("FRAM")):
            need(before <= f.target < len(self.table["TARG"]), 50, at)
            parts, arrays, before = self.parts(i), [], f.target
            need(parts != (ABSENT, ABSENT), 51, at)
            for part, n in zip(parts, self.table["TARG"][f.target][:2], strict=True):
                if part != ABSENT:
                    self.check_part(part, n, at)
                arrays += [(part.mean, n), (part.basis, n)]  # 7.2
            self.frame_bytes.append(Bytes(at, f.offset, f.length, f.crc, arrays, 52, 81))
            self.check_length(self.frame_bytes[i])
            self.clusters.setdefault(f.target, [None]).append(i)

    def check_part(self, part: Any, length: int, at: int) -> None:
        """6.1 FRAM: "In a part that is not absent (RMM-051)"."""
        p, rank, mixing, arrays = part.n_components, part.rank, part.flags & 1, part[3:5]
        need(1 <= rank <= 2**20 and p <= 2**20 and part.flags <= 1, 51, at)
        need(1 <= part.group <= length and (not mixing or part.group == length), 51, at)
        need({*arrays} <= self.n_rows.keys() and arrays != (NONE, NONE), 51, at)
        need(part.mean == NONE or self.n_rows[part.mean] == rank, 51, at)
        need((part.basis == NONE) == (p == 0), 51, at)
        need(self.n_rows[part.basis] == p * (1 if mixing else rank), 51, at)

    def tiling(self) -> None:
        """6.1 TASK, RMM-055 and RMM-056."""
        entries, privates, before = 0, 0, -1
        for t, at in self.each("TASK"):
            need(before < t.name < len(self.names), 55, at)
            need((t.first_entry, t.first_private) == (entries, privates), 56, at)
            before, entries, privates = t.name, entries + t.n_entries, privates + t.n_privates
        n = len(self.table["ENTR"]), len(self.table["PRIV"])
        need((entries, privates) == n, 56, self.at("TASK", 0))

    def members(self, t: Any, at: int) -> list[Member]:
        """6.1 TASK and ENTR, RMM-057 to RMM-063; 7.1."""
        targets, forms = self.table["TARG"], self.table["FORM"]
        last = t.first_target + t.n_entries
        ids = [x.target for x in self.table["TLST"][t.first_target : last]]
        need(last <= len(self.table["TLST"]) and all(a < b for a, b in pairwise(ids)), 57, at)
        need(max(ids, default=-1) < len(targets), 57, at)
        need(len({targets[x].name for x in ids}) == len(ids), 57, at)
        members, end, n_values, work = list[Member](), 0, 0, 0
        for i, target in enumerate(ids, t.first_entry):
            e, at_entry, arrays = self.table["ENTR"][i], self.at("ENTR", i), []
            need(e.form < len(forms), 60, at_entry)
            form, clusters = forms[e.form], self.clusters.get(target, [None])
            need(form.cluster < len(clusters), 60, at_entry)
            frame, layouts = clusters[form.cluster], [*form[3:7]]
            for part, n in zip(self.parts(frame), targets[target][:2], strict=True):
                coefficients, residual, p = layouts.pop(0), layouts.pop(0), part.n_components
                need(part == ABSENT or form.rank <= part.rank, 60, at_entry)
                need((coefficients == NONE) == (p == 0), 60, at_entry)
                need(self.n_rows[coefficients] == p, 60, at_entry)
                # 7.2: "K · ceil(L / group) values, where K = rank with row mixing"
                width = -(-n // max(part.group, 1)) * (form.rank if part.flags & 1 else 1)
                arrays += [(coefficients, width), (residual, n)]
                n_values += form.rank * n
                work += (1 + p) * form.rank * n
            end = ceil_to(end, 64) if e.length >= 4096 else end
            own = Bytes(at_entry, t.offset + end, e.length, e.crc, arrays, 61, 80)
            members.append(Member(targets[target], form, frame, own))
            end += e.length
        need(end == t.length, 58, at)
        for m in members:
            self.check_length(m.bytes)
        need(n_values <= 1024 * self.slot.file_length, 62, at)
        need(work <= 16384 * self.slot.file_length, 63, at)
        return members

    def check_privates(self, t: Any, at_task: int) -> None:
        """6.1 PRIV, BLOB and DIMS, RMM-064 to RMM-066."""
        blobs, dims, before, total = self.table["BLOB"], self.table["DIMS"], -1, 0
        for i in range(t.first_private, t.first_private + t.n_privates):
            at, p = self.at("PRIV", i), self.table["PRIV"][i]
            need(before < p.name < len(self.names) and p.blob < len(blobs), 65, at)
            need(p.dtype in DTYPES and p.n_dims <= 8, 65, at)
            need(p.first_dim + p.n_dims <= len(dims), 65, at)
            shape = [d.size for d in dims[p.first_dim : p.first_dim + p.n_dims]]
            n_bytes = math.prod(shape) * DTYPES[p.dtype]
            need(max(shape, default=0) <= 2**40 and n_bytes == blobs[p.blob].length, 66, at)
            before, total = p.name, total + n_bytes
        need(total <= 1024 * self.slot.file_length, 64, at_task)

    # --- 7.2 Arrays ---

    def check_length(self, x: Bytes) -> None:
        """RMM-052, RMM-061: what the arrays take, "if all encodings are fixed-size"."""
        if all(self.fixed_size[layout] for layout, _ in x.arrays):
            self.place(x)

    def place(self, x: Bytes) -> list[Run]:
        """7.2: "An array is its runs in order"; find those of an entry or frame."""
        placed, end = list[Run](), 0
        for number, (layout, n) in enumerate(x.arrays):
            _, n_runs, _ = found = (0, 0, 0) if layout == NONE else self.table["LAYO"][layout]
            first = 0
            for i in range(found[0], found[0] + n_runs):
                count, code, start, rows = *self.table["RUNS"][i][:2], end, None
                need(code in FIXED_SIZE or code == TRELLIS, 88, self.at("RUNS", i))
                if code == TRELLIS:
                    try:
                        raw = memoryview(self.data)[x.offset + end : x.offset + x.length]
                        n_bytes, rows = trellis_run(raw, count, n)
                    except ValueError as fault:
                        raise Refused(87, x.offset + end) from fault
                else:
                    n_bytes = count * row_bytes(code, n)
                    start = ceil_to(end, 64) if n_bytes >= 4096 else end
                need(start + n_bytes <= x.length, x.length_rule, x.at)
                placed.append(Run(number, first, count, n, code, x.offset + start, n_bytes, rows))
                first, end = first + count, start + n_bytes
        need(end == x.length, x.length_rule, x.at)
        return placed

    # --- 8 Reconstruction ---

    def arrays(self, x: Bytes) -> list[Array | None]:
        """Return, for each array of an entry or frame, a function that gives its rows by number."""
        runs = [[run for run in self.place(x) if run.array == number] for number in range(4)]
        return [partial(self.row, own) if own else None for own in runs]

    def row(self, runs: list[Run], i: int) -> F32:
        run = runs[bisect_right(runs, i, key=lambda run: run.first) - 1]
        if run.code == TRELLIS:
            return run.rows.get(i - run.first, np.zeros(run.n, np.float32))  # type: ignore[no-any-return]
        size = run.length // run.count
        start = run.offset + (i - run.first) * size
        return decode(run.code, self.data[start : start + size], run.n)

    def load(self, task: str) -> dict[str, tuple[F32, F32, float]]:
        """Return A (rank, n_in), B (n_out, rank) and the scale at each target of a task."""
        out = {}
        for target, form, frame, own_bytes in self.tasks[task]:
            shared = [None] * 4 if frame is None else self.arrays(self.frame_bytes[frame])
            own, (a, b) = self.arrays(own_bytes), self.parts(frame)
            A = factor(form.rank, target.n_in, a, *shared[:2], *own[:2])
            B = factor(form.rank, target.n_out, b, *shared[2:], *own[2:])
            out[self.names[target.name]] = A, np.ascontiguousarray(B.T), form.scale
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
        raw, at = self.raw("meta"), self.at("meta", 0)
        if not raw:
            return None
        try:
            value = parse_metadata(raw)
        except ValueError as fault:
            raise Refused(90, at) from fault
        need(jsonschema.Draft202012Validator(SCHEMA).is_valid(value), 91, at)
        n_configs = len(value["configs"])
        need(all(t.get("config", -1) < n_configs for t in value["tasks"].values()), 91, at)
        return value

    # --- What validators check beyond ---

    def errors(self) -> None:
        """6.1 erro, RMM-092."""
        errors = self.records("erro")
        need(len(errors) in (0, len(self.table["ENTR"])), 92, self.at("erro", 0))
        for i, (error,) in enumerate(errors):
            need(not error < 0, 92, self.at("erro", i))

    def payload(self, x: Bytes) -> None:
        """RMM-080, 081, 085 to 088 for one entry or frame."""
        need(crc32c(self.data[x.offset : x.offset + x.length]) == x.crc, x.crc_rule, x.offset)
        end = x.offset
        for run in self.place(x):
            self.zeros(85, end, run.offset)
            end = run.offset + run.length
            if 0x11 <= run.code <= 0x18:  # "finite", "codes beyond the row's end [...] zero"
                scales, codes = q_blocks(run.code, self.data[run.offset : end])
                spare = codes.reshape(run.count, -1).copy()
                spare[:, : run.n] = 0
                bad = ~np.isfinite(scales) | spare.reshape(-1, 32).any(axis=1)
                block = int(bad.argmax()) * row_bytes(run.code, 32)
                need(not bad.any(), 86, run.offset + block)

    def content(self, rule: int, x: Any) -> None:
        """RMM-082 and RMM-083."""
        need(crc32c(self.data[x.offset : x.offset + x.length]) == x.crc, rule, x.offset)

    def checks(self) -> Iterator[Callable[[], Any]]:
        """Yield the checks of the rules marked "load" and "validate", part by part."""
        yield from (partial(self.zeros, 72, *gap) for gap in self.gaps)
        yield from (self.metadata, self.errors)
        yield from (partial(self.payload, x) for x in self.frame_bytes)
        for task, members in zip(self.table["TASK"], self.tasks.values(), strict=True):
            end = task.offset
            for m in members:
                yield partial(self.zeros, 85, end, m.bytes.offset)
                yield partial(self.payload, m.bytes)
                end = m.bytes.offset + m.bytes.length
        yield from (partial(self.content, 82, x) for x in self.table["BLOB"])
        yield from (partial(self.content, 83, x) for x in self.table["free"])


# --- Doors ---------------------------------------------------------------------------------------

open_file = Collection  # raises `Refused` at the first "open" rule that the file breaks


def validate(data: bytes) -> list[tuple[str, int, str]]:
    """Return rule, offset and text of what the file breaks."""
    found = []
    try:
        collection = open_file(data)
        found += collection.slot_faults
        for check in collection.checks():
            try:
                check()
            except Refused as fault:  # noqa: PERF203
                found.append(fault)
    except Refused as fault:
        found.append(fault)
    return [(fault.rule, fault.offset, fault.message) for fault in found]


def main(path: str) -> int:
    """List the tasks of a file, then the rules that it breaks."""
    data = Path(path).read_bytes()
    found = validate(data)
    if not found:
        for task, members in open_file(data).tasks.items():
            print(f"{task}: {len(members)} targets")
    for rule, offset, message in found:
        print(f"{rule} at {offset}: {message}")
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
