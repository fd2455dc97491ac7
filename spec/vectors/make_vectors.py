"""Make the conformance vectors: ``python make_vectors.py [FOLDER]``.

Every file comes from `drafts.py` and a description here; each invalid one is a valid one in which
one thing was broken and all checksums that cover it were made right again.  Nothing is random
between two runs, so the set can be compared byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from drafts import (
    NONE,
    Collection,
    Draft,
    Entry,
    Frame,
    Part,
    Private,
    Row,
    Side,
    Target,
    Task,
    Trellis,
    base128,
    draw,
    expect,
    flat,
    raw_bf16,
    raw_f16,
    raw_f32,
    row_f16,
    row_f32,
    row_q,
    row_unknown,
    runs,
    some,
    zero,
    zlib_fixed,
    zlib_stored,
)

SINCE = "1.0-draft"
QUANTISED = {1: "q1", 2: "q2", 3: "q3", 4: "q4_0", 5: "q5", 6: "q6", 7: "q7", 8: "q8_0"}
META = {
    "base_model": {"id": "example/base"},
    "configs": ['{"r": 2}'],
    "method": {"name": "rmm"},
    "producer": "make_vectors 1",
    "tasks": {"alpha": {"config": 0, "error": {"max": 0.5, "mean": 0.25, "median": 0.25}}},
}
FINGERPRINT = {"algorithm": "example-2", "digest": "0a", "targets": {"a": "0123abcd", "": "f"}}


def with_key(key: str, raw: bytes) -> bytes:
    """The metadata with one key more, last."""
    return canonical(META)[:-1] + b"," + json.dumps(key).encode() + b":" + raw + b"}"


Token = int | tuple[int, int] | str


def seeded(name: str) -> Random:
    """Return a source of numbers that is the same at every run."""
    return Random(name)  # noqa: S311


def canonical(value: Any) -> bytes:
    """9: "keys sorted, no white space beyond what JSON requires"."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


class Set:
    """The vectors under construction."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.entries: list[dict[str, Any]] = []

    def _add(self, entry: dict[str, Any], data: bytes, expected: Any) -> None:
        folder = entry["verdict"]
        entry["file"] = f"{folder}/{entry['id']}.rmm"
        entry["sha256"] = hashlib.sha256(data).hexdigest()
        self.files[entry["file"]] = data
        if expected is not None:
            entry["expect"] = f"{folder}/{entry['id']}.expect.json"
            text = json.dumps(expected, indent=1, ensure_ascii=False) + "\n"
            self.files[entry["expect"]] = text.encode()
        keys = (
            "id",
            "file",
            "sha256",
            "verdict",
            "status",
            "rule",
            "when",
            "offset",
            "within",
            "task",
            "twin",
            "expect",
            "comment",
            "since",
        )
        self.entries.append({key: entry[key] for key in keys if key in entry})

    def valid(
        self,
        name: str,
        collection: Collection,
        comment: str,
        edit: Callable[[Draft], None] | None = None,
        meta: Any = None,
        expected: Any = None,
    ) -> None:
        draft = Draft(collection)
        if edit:
            edit(draft)
        expected = (expected or expect(collection)) | {"metadata": meta}
        entry = {"id": name, "verdict": "valid", "status": "ok", "comment": comment, "since": SINCE}
        self._add(entry, draft.pack(), expected)

    def broken(
        self,
        name: str,
        twin: str,
        source: Collection | bytes,
        comment: str,
        edit: Callable[[Draft], Any] | None = None,
        where: Token | list[Token] | None = None,
        when: str = "open",
        status: str = "malformed",
        task: str | None = None,
        expected: Any = None,
        cut: Callable[[bytes], bytes] = lambda data: data,
    ) -> None:
        """Add a vector that breaks the rule in its name: ``012b-...`` breaks RMM-012."""
        entry: dict[str, Any] = {
            "id": f"R{name}", "verdict": "unsupported" if status == "unsupported" else "invalid",
            "status": status, "rule": f"RMM-{name[:3]}", "when": when, "twin": twin,
            "comment": comment, "since": SINCE,
        }  # fmt: skip
        if isinstance(source, bytes):
            data, find = cut(source), Draft(Collection()).find
        else:
            draft = Draft(source)
            found = edit(draft) if edit else None
            data, find = cut(draft.pack()), draft.find
            where = found if where is None else where
        if where is not None:
            ranges = [find(token) for token in (where if isinstance(where, list) else [where])]
            entry["offset"] = ranges[0][0]
            entry["within"] = [list(r) for r in ranges]
        if task is not None:
            entry["task"] = task
        self._add(entry, data, expected)

    def free(
        self,
        name: str,
        source: Collection,
        comment: str,
        edit: Callable[[Draft], Any] | None = None,
    ) -> None:
        draft = Draft(source)
        if edit:
            edit(draft)
        entry = {
            "id": f"f-{name}", "verdict": "free", "status": "free", "comment": comment,
            "since": SINCE,
        }  # fmt: skip
        self._add(entry, draft.pack(), None)


# --- Collections that many vectors share ---------------------------------------------------------


def rows(random: Random, codes: list[int], n: int) -> list[list[Row]]:
    return runs(*(some(random, code, n) for code in codes))


def alone(name: str, entries: list[tuple[Target, list[list[Row]], list[list[Row]]]]) -> Collection:
    """One task with residuals only."""
    made = [Entry(t, len(flat(a)), Side(residual=a), Side(residual=b)) for t, a, b in entries]
    return Collection(tasks=[Task(name, made)])


def tiny() -> Collection:
    """One task, one target, one frame: also the worked example."""
    target = Target("q", 8, 6)
    mean = runs(row_f16([0.5, -0.25, 1, 0, 2, -1, 0.125, 3]))
    basis = runs(row_q(4, [0.25], [0, 15, 8, 7, 9, 4, 12, 1]))
    frame = Frame(target, Part(4, 1, mean, basis), None)
    entry = Entry(
        target,
        1,
        Side(runs(row_f32([1.5, -2.0])), runs(row_q(1, [0.0625], [1, 0, 0, 1, 1, 1, 0, 1]))),
        Side(residual=runs(row_f16([1, 2, 3, -4, -5, 6]))),
        scale=2.0,
        frame=frame,
        dtypes=(3, 2),
    )
    return Collection(tasks=[Task("demo", [entry])], frames=[frame])


def small() -> Collection:
    """Two tasks, two targets, two frames, a shared private tensor, metadata, errors."""
    r = seeded("small")
    q, v = Target("layers.0.q", 40, 33), Target("layers.0.v", 40, 20)
    one = Frame(
        q,
        Part(16, 2, rows(r, [2, 0x18], 40), rows(r, [0x12, 0x11], 40)),
        Part(33, 2, None, rows(r, [0x14, 0x14, 0x12, 0x12], 33)),
    )
    two = Frame(v, Part(40, 2, rows(r, [0x18, 0x18], 40)), None)
    head = Private("head", 2, (3, 2), bytes(range(12)), role=1)
    alpha = [
        Entry(
            q, 2, Side(rows(r, [2], 3), rows(r, [0x11, 0], 40)), Side(rows(r, [1, 2], 1)), 0.5, one
        ),
        Entry(v, 2, Side(), Side(residual=rows(r, [0x13, 0x13], 20)), 0.5, two),
    ]
    beta = [Entry(q, 1, Side(rows(r, [2], 3)), Side(rows(r, [1, 2], 1)), 1.0, one, (2, 2))]
    return Collection(
        tasks=[Task("alpha", alpha, [head]), Task("beta", beta, [head])],
        frames=[one, two],
        meta=canonical(META),
        errors=[0.25, 0.5, math.nan],
    )


def large() -> Collection:
    """Runs, entries, frames and blobs on both sides of 4,096 bytes."""
    r = seeded("large")
    t, u = Target("big", 1100, 1024), Target("little", 9, 7)
    frame = Frame(t, Part(1100, 1, rows(r, [0x11], 1100), rows(r, [1], 1100)), None)
    one = [
        Entry(t, 1, Side(rows(r, [1], 1), rows(r, [0x12], 1100)), Side(residual=rows(r, [1], 1024)),
              frame=frame),
        Entry(u, 2, Side(residual=rows(r, [0x11, 1], 9)), Side(residual=rows(r, [2, 3], 7))),
    ]  # fmt: skip
    two = [
        Entry(t, 2, Side(residual=rows(r, [0, 2], 1100)), Side(residual=rows(r, [2, 2], 1024))),
        Entry(u, 1, Side(residual=rows(r, [3], 9)), Side(residual=rows(r, [0], 7))),
    ]
    # The small target comes first here, so the large entry has to be aligned within the run.
    a = Target("a-small", 5, 5)
    three = [
        Entry(a, 1, Side(residual=rows(r, [1], 5)), Side(residual=rows(r, [1], 5))),
        Entry(t, 1, Side(residual=rows(r, [1], 1100)), Side(residual=rows(r, [0x11], 1024))),
    ]
    blob = bytes(r.getrandbits(8) for _ in range(4096))
    return Collection(
        tasks=[
            Task("one", one, [Private("small", 6, (5,), b"12345"), Private("z", 6, (4096,), blob)]),
            Task("two", two, [Private("large", 6, (64, 63), blob[:4032])]),
            Task("zwei", three),
        ],
        frames=[frame],
    )


ZERO = runs(zero(1))  # its layout is one row of encoding zero


def spare() -> Collection:
    """A small collection whose tables have records at their ends that nothing uses.

    Layout 0 is one row of zeros, so a frame or form of it takes no bytes; target `zz` is the last.
    """
    r = seeded("spare")
    t, last = Target("t", 12, 10), Target("zz", 36, 10)
    entry = Entry(t, 1, Side(residual=runs(zero(12))), Side(residual=rows(r, [2], 10)))
    return Collection(
        tasks=[Task("task", [entry], [Private("bias", 6, (4, 2), b"12345678", role=2)])],
        targets=[last],
    )


def spare_form(**fields: Any) -> Callable[[Draft], Token]:
    """Append a form that no entry uses."""

    def edit(d: Draft) -> Token:
        form = {
            "scale": 1.0, "rank": 1, "coefficients_a": NONE, "residual_a": 0,
            "coefficients_b": NONE, "residual_b": 0, "dtype_a": 1, "dtype_b": 1,
        }  # fmt: skip
        d.tables["FORM"].append(form | fields)
        return f"FORM[{len(d.tables['FORM']) - 1}]"

    return edit


def spare_target(**fields: Any) -> Callable[[Draft], Token]:
    """Append a target that no task uses."""

    def edit(d: Draft) -> Token:
        d.strings.append(b"zzz")
        name = len(d.strings) - 1
        d.tables["TARG"].append({"n_in": 36, "n_out": 10, "name": name} | fields)
        return f"TARG[{len(d.tables['TARG']) - 1}]"

    return edit


def spare_frame(**fields: Any) -> Callable[[Draft], Token]:
    """Append a frame of target `zz` (36 by 10) that no entry uses: a mean of zeros for A."""

    def edit(d: Draft) -> Token:
        frame = {
            "target": 1, "crc": None, "offset": 0, "length": 0,
            "group_a": 36, "rank_a": 1, "mean_a": 0, "basis_a": NONE,
            "mean_b": NONE, "basis_b": NONE,
        }  # fmt: skip
        d.tables["FRAM"].append(frame | fields)
        return f"FRAM[{len(d.tables['FRAM']) - 1}]"

    return edit


def zero_layout(d: Draft, n_rows: int) -> int:
    """Append a layout of rows of zeros."""
    first = len(d.tables["RUNS"])
    d.tables["RUNS"].append({"count": n_rows, "encoding": 0})
    d.tables["LAYO"].append({"first_run": first, "n_runs": 1, "n_rows": n_rows})
    return len(d.tables["LAYO"]) - 1


def put(table: str, i: int, **fields: Any) -> Callable[[Draft], Token]:
    """Change fields of a record."""

    def edit(d: Draft) -> Token:
        d.tables[table][i].update(fields)
        return f"{table}[{i % len(d.tables[table])}]"

    return edit


def append(table: str, **fields: Any) -> Callable[[Draft], Token]:
    def edit(d: Draft) -> Token:
        d.tables[table].append(fields)
        return f"{table}[{len(d.tables[table]) - 1}]"

    return edit


def section(name: str, **fields: Any) -> Callable[[Draft], Token]:
    """Change the section table's record of a section."""

    def edit(d: Draft) -> Token:
        d.sections[name] = fields
        if name not in d.order:
            d.order.append(name)
        return f"section:{name}"

    return edit


def slot(**fields: Any) -> Callable[[Draft], None]:
    def edit(d: Draft) -> None:
        d.slots[0] = {"sequence": 1} | fields

    return edit


def meta(raw: bytes) -> Callable[[Draft], None]:
    def edit(d: Draft) -> None:
        d.meta = raw

    return edit


def with_strings(*strings: bytes) -> Callable[[Draft], None]:
    def edit(d: Draft) -> None:
        d.strings += strings

    return edit


def patch(offset: int, raw: bytes) -> Callable[[bytes], bytes]:
    """Change bytes of the finished file."""

    def cut(data: bytes) -> bytes:
        at = offset % len(data)
        return data[:at] + raw + data[at + len(raw) :]

    return cut


# --- Valid ---------------------------------------------------------------------------------------


def encodings(s: Set) -> None:
    lengths = [1, 31, 32, 33, 45, 64]
    names = {0: "zero", 1: "f32", 2: "f16", 3: "bf16"} | {
        0x10 + bits: name for bits, name in QUANTISED.items()
    }
    for code, name in names.items():
        r = seeded(name)
        entries = [
            (Target(f"n{n:02d}", n, lengths[-1 - i]), rows(r, [code] * 2, n),
             rows(r, [code] * 2, lengths[-1 - i]))
            for i, n in enumerate(lengths)
        ]  # fmt: skip
        s.valid(
            f"v-encoding-{name}",
            alone("task", entries),
            f"Rows of {name}, whole and partial blocks.",
        )
    r = seeded("mixed")
    codes = [1, 2, 2, 0x11, 0, 0, 0x18, 0x14, 0x13, 0x13, 3, 0x16, 0x17, 0x15, 0x12]
    t = Target("mixed", 45, 20)
    s.valid(
        "v-encodings-mixed",
        alone("task", [(t, rows(r, codes, 45), rows(r, codes[::-1], 20))]),
        "Every row of a factor in another encoding, small runs right behind one another.",
    )
    every = [
        (Target(name, 32 * -(-2**bits // 32), 32),
         runs(row_q(bits, [0.5, -0.5] * 4, [i % 2**bits for i in range(32 * -(-2**bits // 32))])),
         runs(row_q(bits, [-0.0], [2**bits - 1] * 32)))
        for bits, name in QUANTISED.items()
    ]  # fmt: skip
    s.valid(
        "v-codes-all",
        alone("task", every),
        "Every code of every quantised width; negative scales; -0 as scale: d times the level is a "
        "product of two f32, so q8_0's code 0 under a negative scale is -0.",
    )
    extreme = [2.0**-24, -(2.0**-24), 65504.0, -65504.0, 2.0**-14]
    scales = [
        (Target(name, 160, 32), runs(row_q(bits, extreme, [i * 7 % 2**bits for i in range(160)])),
         runs(zero(32)))
        for bits, name in QUANTISED.items()
    ]  # fmt: skip
    s.valid(
        "v-scales-extreme", alone("task", scales), "Smallest and largest scales, subnormal too."
    )


def numerics(s: Set) -> None:
    special = struct.pack(
        "<12I",
        0x80000000,
        0,
        0x7FC00000,
        0xFFC12345,
        0x7F800001,
        0xFFBFFFFF,
        0x7F800000,
        0xFF800000,
        1,
        0x80000001,
        0x007FFFFF,
        0x00800000,
    )
    half = struct.pack("<8H", 0x8000, 0, 0x7E00, 0xFF55, 0x7C00, 0xFC00, 1, 0x83FF)
    brain = struct.pack("<8H", 0x8000, 0, 0x7FC0, 0xFF81, 0x7F80, 0xFF80, 1, 0x807F)
    s.valid(
        "v-bits-kept",
        alone(
            "task",
            [
                (Target("f32", 12, 12), runs(raw_f32(special)), runs(raw_f32(special[::-1]))),
                (Target("f16", 8, 8), runs(raw_f16(half)), runs(raw_f16(half))),
                (Target("bf16", 8, 8), runs(raw_bf16(brain)), runs(raw_bf16(brain))),
            ],
        ),
        "A lone residual comes back bit for bit: negative zeros, NaNs with payload, infinities, "
        "subnormals.",
    )
    t = Target("t", 4, 3)
    plain = Side(residual=runs(row_f32([1, 2, 3])))

    def sums(name: str, comment: str, mean: list[float] | None, basis: list[list[float]],
             c: list[float], residual: list[float] | None, group: int = 4) -> None:  # fmt: skip
        part = Part(
            group,
            1,
            runs(row_f32(mean)) if mean else None,
            runs(*(row_f32(b) for b in basis)) if basis else None,
        )
        frame = Frame(t, part, None)
        side = Side(
            runs(*(row_f32([x]) for x in c)) if c else None,
            runs(row_f32(residual)) if residual else None,
        )
        made = Collection([Task("task", [Entry(t, 1, side, plain, frame=frame)])], [frame])
        s.valid(name, made, comment)

    e = 2.0**-12
    sums(
        "v-sum-no-fma",
        "Products are rounded before they are added: a fused multiply-add gives other bits.",
        [-1.0, -(1 + 2 * e), 1.0, 3.0],
        [[1 + e, 1 + e, 1 - e, 1 / 3]],
        [1 + e],
        None,
    )
    sums(
        "v-sum-order",
        "Mean, components in order, residual: another order gives other bits.",
        [1.0, 1e8, -1e8, 1.0],
        [[1e8, 1.0, 1.0, 2.0**-24], [-1e8, 1.0, 1e8, 2.0**-24], [1.0, -1e8, 1.0, 2.0**-25]],
        [1.0, 1.0, 1.0],
        [2.0**-24, 1.0, -1.0, 1.0],
    )
    sums(
        "v-sum-zeros",
        "Sums of zeros: -0 only where every term present is -0.",
        [-0.0, -0.0, 0.0, -0.0],
        [[0.0, 1.0, 1.0, -1.0]],
        [-0.0],
        [-0.0, -0.0, -0.0, -0.0],
    )
    sums(
        "v-sum-subnormal",
        "Subnormal products and sums are kept.",
        [2.0**-149, 2.0**-127, -(2.0**-126), 0.0],
        [[2.0**-100, 2.0**-80, 2.0**-77, 2.0**-101]],
        [2.0**-49],
        [2.0**-149, -(2.0**-149), 2.0**-149, 2.0**-148],
    )
    sums(
        "v-sum-overflow",
        "Overflow gives infinity.",
        [3e38, -3e38, 1.0, 2.0],
        [[3e38, -3e38, 3e38, 1e-3]],
        [2.0],
        None,
    )
    frameless = Entry(t, 2, Side(), Side())
    s.valid(
        "v-no-terms",
        Collection([Task("task", [frameless])]),
        "An entry without arrays: every value is +0. It and the run take no bytes.",
    )


def frames(s: Set) -> None:
    t = Target("t", 45, 21)

    def shared(name: str, comment: str, ga: int, gb: int, mixing: bool = False, p: int = 2) -> None:
        r = seeded(name)
        each = 1 if mixing else 3
        frame = Frame(
            t,
            Part(ga, 3, rows(r, [2] * 3, 45), rows(r, [0x13] * p * each, 45), mixing),
            Part(gb, 3, None, rows(r, [0x18] * p * each, 21), mixing),
        )
        tasks = []
        for i, rank in enumerate((3, 1, 2)):
            k = rank if mixing else 1
            a = Side(rows(r, [1, 2, 3][:1] * p, k * -(-45 // ga)), rows(r, [0x11] * rank, 45))
            b = Side(rows(r, [2] * p, k * -(-21 // gb)), None)
            tasks.append(Task(f"task{i}", [Entry(t, rank, a, b, 0.5 * (i + 1), frame)]))
        s.valid(name, Collection(tasks, [frame]), comment)

    shared("v-group-1", "group 1: coefficients for each position.", 1, 1)
    shared("v-group-all", "group L: the factor is one position.", 45, 21)
    shared("v-group-between", "A short last group: 45 = 6 · 7 + 3 and 21 = 2 · 10 + 1.", 7, 10)
    shared("v-group-longer", "A group of L − 1 leaves a last group of one.", 44, 20)
    shared(
        "v-row-mixing", "Rows of all tasks are combinations of five shared rows.", 45, 21, True, 5
    )
    r = seeded("clusters")
    u = Target("u", 8, 8)
    made = [
        Frame(t, Part(45, 2, rows(r, [2, 2], 45)), None),
        Frame(t, None, Part(21, 1, rows(r, [1], 21), rows(r, [3], 21))),
        Frame(t, Part(5, 1, None, rows(r, [0x12], 45)), Part(21, 4, rows(r, [0] * 4, 21))),
        Frame(u, Part(8, 1, rows(r, [1], 8)), Part(8, 1, rows(r, [1], 8))),
    ]
    tasks = [
        Task("first", [Entry(t, 2, Side(), Side(residual=rows(r, [2, 2], 21)), frame=made[0])]),
        Task("second", [
            Entry(t, 1, Side(), Side(rows(r, [1], 1)), frame=made[1]),
            Entry(u, 1, Side(), Side(), frame=made[3]),
        ]),
        Task("third", [Entry(t, 1, Side(rows(r, [0x11], 9)), Side(), frame=made[2])]),
        Task("without", [
            Entry(t, 1, Side(residual=rows(r, [1], 45)), Side(residual=rows(r, [1], 21))),
        ]),
    ]  # fmt: skip
    s.valid(
        "v-clusters",
        Collection(tasks, made),
        "Several frames of one target, with absent parts, means alone, basis alone, and a task "
        "without a frame.",
    )
    r = seeded("ragged")
    frame = Frame(t, Part(9, 4, rows(r, [2] * 4, 45), rows(r, [0x14] * 8, 45)), None)
    tasks = [
        Task(f"rank{rank}", [
            Entry(t, rank, Side(rows(r, [2, 2], 5)), Side(residual=rows(r, [0x15] * rank, 21)),
                  [1.0, -0.75, 0.0, 1e-300][i], frame, dtypes),
        ])
        for i, (rank, dtypes) in enumerate([(1, (1, 1)), (2, (2, 3)), (3, (3, 2)), (4, (2, 2))])
    ]  # fmt: skip
    s.valid("v-ragged", Collection(tasks, [frame]), "Ranks 1 to 4 share one frame; odd scales.")


def targets_and_names(s: Set) -> None:
    r = seeded("targets")
    old, new = Target("embed", 10, 6, kind=1), Target("embed", 12, 6, kind=1)
    a = Entry(old, 1, Side(residual=rows(r, [1], 10)), Side(residual=rows(r, [1], 6)))
    b = Entry(new, 1, Side(residual=rows(r, [1], 12)), Side(residual=rows(r, [1], 6)))
    s.valid(
        "v-same-name",
        Collection([Task("a", [a]), Task("b", [b])]),
        "Two targets of one name and different shapes, in different tasks.",
    )
    plain, other = Target("q", 4, 5), Target("q", 4, 5, flags=1)
    a = Entry(plain, 1, Side(residual=rows(r, [1], 4)), Side(residual=rows(r, [1], 5)))
    b = Entry(other, 1, Side(residual=rows(r, [1], 4)), Side(residual=rows(r, [1], 5)))
    s.valid(
        "v-same-shape",
        Collection([Task("a", [a]), Task("b", [b])]),
        "Two targets of one name and shape that differ in a flag, in different tasks.",
    )
    kinds = [
        Target("conv1", 12, 4, 2, 0, (3,)), Target("conv2", 18, 4, 2, 0, (3, 3)),
        Target("conv3", 8, 4, 2, 0, (2, 1, 2)), Target("embedding", 11, 5, 1),
        Target("linear", 7, 3), Target("transposed", 7, 3, 0, 1),
    ]  # fmt: skip
    s.valid(
        "v-kinds",
        alone("task", [(t, rows(r, [2], t.n_in), rows(r, [2], t.n_out)) for t in kinds]),
        "Convolutions with one to three kernel axes, an embedding, a transposed base.",
    )
    names = [
        "../../etc/passwd",
        "C:\\x",
        "a b",
        "é",
        "日本",
        "\U0001f600",
        "x" * 1024,
        "~",
        "\u202eabc",
    ]
    s.valid(
        "v-names",
        Collection([Task(name, [], [Private(name, 6, (1,), b"x")]) for name in names]),
        "Names are data: paths, spaces, letters beyond ASCII, 1,024 bytes, marks of direction.",
    )
    s.valid("v-task-empty", Collection([Task("nothing")]), "A task with nothing in it.")
    r = seeded("unused")

    def unused(d: Draft) -> None:
        spare_form()(d)
        spare_frame()(d)
        d.tables["BLOB"] += [{"crc": None} | d.place(b"nobody's"), {"offset": 0, "crc": 0}]
        d.tables["TLST"] += [{"target": 1}, {"target": 99}]
        d.tables["DIMS"].append({"size": 2**64 - 1})
        spare_target(n_in=2**40, n_out=2**40)(d)
        d.strings.append(b"zzzz")
        zero_layout(d, 2**32 - 1)

    s.valid(
        "v-unused",
        spare(),
        "Strings, targets, forms, frames, blobs, dimensions and layouts that nothing uses; an item "
        "of TLST that names no target; the largest sides; a frame that takes no bytes.",
        unused,
    )

    def overlapping(d: Draft) -> None:
        d.tables["TLST"] = [{"target": i} for i in (0, 1, 2)]
        for task, first in zip(d.tables["TASK"], (0, 1, 0, 2), strict=True):
            task["first_target"] = first

    three = [Target(name, 4, 4) for name in ("x", "y", "z")]

    def at(*targets: Target) -> list[Entry]:
        return [
            Entry(t, 1, Side(residual=rows(r, [1], 4)), Side(residual=rows(r, [1], 4)))
            for t in targets
        ]

    s.valid(
        "v-lists-overlap",
        Collection(
            [
                Task("a", at(*three[:2])),
                Task("b", at(*three[1:])),
                Task("c", at(*three)),
                Task("d", at(three[2])),
            ]
        ),
        "Lists of targets that share items of TLST.",
        overlapping,
    )


def privates(s: Set) -> None:
    r = seeded("privates")
    sizes = [4, 2, 2, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 1, 8]
    each = [
        Private(f"dtype{code:02d}", code, (2, 3), r.randbytes(6 * size), role=code % 6)
        for code, size in enumerate(sizes, 1)
    ]
    shared = Private("shared", 1, (2,), b"8 bytes.")
    shapes = [
        Private("scalar", 4, (), r.randbytes(8)),
        Private("empty", 1, (0,), b""),
        Private("empty too", 2, (3, 0, 2**40), b""),
        Private("eight", 6, (1, 2, 1, 2, 1, 2, 1, 1), r.randbytes(8)),
        Private("role 200 is as 0", 6, (1,), b"r", role=200),
        shared,
    ]
    s.valid(
        "v-privates",
        Collection(
            [
                Task("a", [], each),
                Task("b", [], shapes),
                Task("c", [], [shared]),
                Task("d", [], [Private("other name", 2, (4,), shared.content)]),
            ]
        ),
        "Private tensors of every dtype, without dimensions, empty, with eight dimensions, with an "
        "unknown role, sharing one blob under other names and dtypes.",
    )

    content = r.randbytes(100)
    each = [Private(f"name{i:02d}", 6, (100,), content) for i in range(40)]
    s.valid(
        "v-privates-shared",
        Collection([Task("task", [], each)]),
        "A task of more private bytes than the file has: its private tensors share one blob.",
    )

    def product(d: Draft) -> None:
        d.tables["DIMS"] = [{"size": n} for n in (2**40, 2**40, 0)]

    s.valid(
        "v-privates-none",
        Collection([Task("task", [], [Private("none", 6, (2**40, 2**40, 0), b"")])]),
        "A product that is 0, though it overflows on the way.",
        product,
    )


def containers(s: Set) -> None:
    s.valid("v-header-only", Collection(), "The smallest file: a header and an index of no bytes.")

    def keep(d: Draft) -> None:
        d.keep_empty = True

    s.valid("v-empty", Collection(), "Every section is there and has no records.", keep)
    s.valid("v-tiny", tiny(), "One task, one target, one frame: the worked example.")
    s.valid("v-small", small(), "Two tasks with a bit of everything.", meta=META)
    about = META | {
        "base_model": {"id": "example/base", "fingerprint": FINGERPRINT},
        "tasks": {"alpha": {"extraction": {"error": 0.5, "max": 1, "rank": 2}}},
    }
    s.valid(
        "v-fingerprint",
        small(),
        "A fingerprint of the base, of an algorithm that nobody knows, and an extraction.",
        meta(canonical(about)),
        about,
    )
    s.valid("v-spare", spare(), "The twin of vectors that append a record.")
    s.valid("v-large", large(), "Runs, entries, frames and blobs of 4,096 bytes and more.")

    def frees(d: Draft) -> None:
        for n in (8, 13, 7, 5000):
            d.tables["free"].append({"crc": None} | d.place(bytes(range(1, 251)) * 20, None))
            d.tables["free"][-1] |= {"length": n}
            del d.payload[d.tables["free"][-1]["offset"] - 640 + n :]
        at = 640 + len(d.payload)  # exempt from alignment
        d.tables["free"].append({"crc": None} | d.place(b"behind it", at))

    s.valid("v-free", small(), "Extents no longer in use, not all of them aligned.", frees, META)

    def second(d: Draft) -> None:
        d.slots = [{"sequence": 7, "file_length": 640, "growth_limit": 640, "index_offset": 640,
                    "index_length": 0, "n_sections": 0, "section_table_crc": 0},
                   {"sequence": 8}]  # fmt: skip

    s.valid(
        "v-slot-1", small(), "Slot 1 is the active one; slot 0 has an older state.", second, META
    )

    def first(d: Draft) -> None:
        d.slots = [{"sequence": 2**63 + 1}, {"sequence": 2, "file_length": 640, "growth_limit": 640,
                   "index_offset": 640, "index_length": 0, "n_sections": 0}]  # fmt: skip

    s.valid(
        "v-slot-0", small(), "Slot 0 is the active one, with a sequence above 2^63.", first, META
    )

    def stale(d: Draft) -> None:
        fields = ("file_length", "growth_limit", "index_offset", "index_length", "n_sections",
                  "section_record_size", "section_table_crc")  # fmt: skip
        d.slots[1] = {"sequence": 4} | dict.fromkeys(fields, 0xFFFFFFFF)
        d.slots[0] = {"sequence": 5}

    s.valid(
        "v-slot-stale",
        small(),
        "Nothing is asked of what a valid slot says that is not active.",
        stale,
        META,
    )

    def scratch(d: Draft) -> None:
        d.tail = b"half of something"
        slot(growth_limit=2**40)(d)

    s.valid(
        "v-scratch", small(), "Scratch bytes behind file_length, below growth_limit.", scratch, META
    )
    s.valid(
        "v-growing",
        small(),
        "A growth_limit far behind the end.",
        slot(growth_limit=2**64 - 1),
        META,
    )

    def optional(d: Draft) -> None:
        section("xExt", raw=b"anything", record_size=4, count=2)(d)
        section("aaaa", raw=b"", record_size=0, count=0)(d)
        plain = bytes(1000)
        section("xZip", raw=zlib_fixed(plain), coding=1, count=1000)(d)
        d.order = [*d.order[-3:], *d.order[:-3]]

    s.valid(
        "v-optional",
        small(),
        "Unknown optional sections, one deflated, are skipped.",
        optional,
        META,
    )
    s.valid(
        "v-optional-stream",
        small(),
        "Nobody decodes an unknown optional section: one that does not inflate, of records of "
        "three bytes.",
        section("xZip", raw=b"not a stream", coding=1, count=4, record_size=3),
        META,
    )

    some_errors = small()
    some_errors.errors = [-0.0, math.inf, 1.0]
    s.valid("v-errors", some_errors, "Measured errors of -0 and infinity.", meta=META)

    def no_errors(d: Draft) -> None:
        d.tables["erro"] = []
        section("erro")(d)

    s.valid("v-errors-none", small(), "A section erro without records.", no_errors, META)

    def order(d: Draft) -> None:
        d.order.reverse()

    s.valid("v-section-order", small(), "Sections in another order.", order, META)

    def minor(d: Draft) -> None:
        d.preamble["minor"] = 1
        d.table_extra = b"\xffmore..."
        slot(unused=b"later" + bytes(63))(d)
        spare_form()(d)
        for i, name in enumerate(d.tables):
            if d.tables[name]:
                d.sections[name] = {"record_extra": bytes([255 - i] * (4 * (i % 3) + 4))}

    s.valid(
        "v-minor-1",
        spare(),
        "A later minor version: longer records, and a value in an unused field.",
        minor,
    )

    def deflated(d: Draft) -> None:
        text = canonical(META)
        section("meta", stored=zlib_fixed(text), coding=1)(d)
        raw = struct.pack("<3f", 0.25, 0.5, math.nan)
        section("erro", stored=zlib_stored(raw), coding=1)(d)

    s.valid(
        "v-deflated",
        small(),
        "Deflated sections, by fixed codes and as stored blocks.",
        deflated,
        META,
    )
    numbers = with_key("x", b'[1.7976931348623157e308,1e-999,-0,"\\ud83d\\ude00"]')
    numbers = numbers.replace(b'"config":0', b'"config":0.0,"factor_bytes":1e3')
    s.valid(
        "v-meta-numbers",
        small(),
        "The largest number, integers written as fractions, a surrogate pair.",
        meta(numbers),
        json.loads(numbers),
    )
    deep = with_key("x", b"[" * 15 + b"]" * 15)
    s.valid("v-meta-deep", small(), "Metadata nested 16 deep.", meta(deep), json.loads(deep))
    loose = (
        b' {"xNote" : "\\u00e9 \\" [{", "tasks":{},"base_model":{},\r\n"producer":"",'
        b'"n":-12.5e-3,\t"configs":[],"method":{"name":"","name ":[true,false,null]}} '
    )
    s.valid(
        "v-meta-loose",
        small(),
        "Metadata that is not written canonically.",
        meta(loose),
        json.loads(loose),
    )
    r = seeded("index")

    def many(d: Draft) -> None:
        d.strings += [b"zzz%04d" % i for i in range(500)]

    s.valid(
        "v-index-large",
        spare(),
        "An index of 4,096 bytes or more starts at a multiple of 64.",
        many,
    )
    rank = 4
    wide = Target("wide", 700, 1)
    s.valid(
        "v-values-many",
        alone("task", [(wide, runs(*[zero(700)] * rank), rows(r, [1] * rank, 1))]),
        "Many values in few bytes, below the limit.",
    )

    def tall(d: Draft) -> None:
        d.tables["TARG"][0]["n_in"] = 2**20
        layout = zero_layout(d, 2**20)
        d.tables["FRAM"][0] |= {"group_a": 2**20, "rank_a": 2**20, "mean_a": layout}

    t = Target("t", 8, 8)
    mean = Frame(t, Part(8, 1, runs(zero(8))), None)
    s.valid(
        "v-frame-tall",
        Collection([Task("task", [Entry(t, 1, Side(), Side(), frame=mean)])], [mean]),
        "A mean of 2^20 rows of 2^20 zeros, of which a task of rank 1 uses the first.",
        tall,
        expected=zeros_only(2**20, 8),
    )
    collection, edit, expected = limits()
    s.valid(
        "v-limits",
        collection,
        "1,024 values and 16,384 products and sums for each byte of the file.",
        edit,
        expected=expected,
    )
    many_terms, edit, expected = work()
    s.valid(
        "v-work-many",
        many_terms,
        "Few values, and 16,384 products and sums for each byte of the file.",
        edit,
        expected=expected,
    )


def zeros_only(n_in: int, n_out: int) -> dict[str, Any]:
    """What a task gives whose one entry, of rank 1, is zero."""

    def factor(rows: int, columns: int) -> dict[str, Any]:
        digest = hashlib.sha256(bytes(4 * rows * columns)).hexdigest()
        return {"shape": [rows, columns], "sha256": digest, "first": [(0.0).hex()] * 4}

    entry = {
        "target": "t", "n_in": n_in, "n_out": n_out, "kind": 0, "transposed": False, "kernel": [],
        "rank": 1, "scale": 1.0.hex(), "dtypes": [1, 1],
        "A": factor(1, n_in), "B": factor(n_out, 1),
    }  # fmt: skip
    return {"tasks": {"task": {"entries": [entry], "privates": []}}}


def one_frame(p: int, mixing: bool = True) -> Collection:
    """One entry of rank 1 with p components of zeros in either factor; no payload at all."""
    t = Target("t", 8, 8)
    part = Part(8, 1, None, runs(*[zero(8)] * p), mixing)
    frame = Frame(t, part, part)
    side = Side(runs(*[zero(1)] * p))
    return Collection([Task("task", [Entry(t, 1, side, side, frame=frame)])], [frame])


def resized(n_in: int, n_out: int, **frame: Any) -> Callable[[Draft], Token]:
    """Give the target of `one_frame` other sides: its arrays are zeros and take no bytes."""

    def edit(d: Draft) -> Token:
        d.tables["TARG"][0] |= {"n_in": n_in, "n_out": n_out}
        d.tables["FRAM"][0] |= {"group_a": n_in, "group_b": n_out} | frame
        return "TASK[0]"

    return edit


def limits(more: int = 0) -> tuple[Collection, Callable[[Draft], Token], dict[str, Any]]:
    """RMM-062 and RMM-063 at their limits, or `more` values than that."""
    c = one_frame(15)
    total = 1024 * len(Draft(c).pack())
    n_in = total - 77
    return c, resized(n_in + more, 77), zeros_only(n_in, 77)


def work() -> tuple[Collection, Callable[[Draft], Token], dict[str, Any]]:
    """RMM-063 at its limit with few values."""
    c = one_frame(2**12 - 1)
    half = 2 * len(Draft(c).pack())
    return c, resized(half, half), zeros_only(half, half)


def trellis_task(run: Trellis, other: list[list[Row]] | None = None) -> Collection:
    """One entry whose A is a run of the trellis encoding."""
    t = Target("t", run.n, 2)
    rank = len(run.rows)
    b = other or runs(*[row_f16([1.0, -1.0])] * rank)
    return Collection(
        [Task("task", [Entry(t, rank, Side(residual=[run.run()]), Side(residual=b))])]
    )


def few(name: str, numbers: list[int], n: int, base: int = 0x3F80, **options: Any) -> Trellis:
    r = seeded(name)
    rows = [(number, draw(r, number, n)) if number else None for number in numbers]
    return Trellis(rows, n, base, **options)


def trellis(s: Set) -> None:
    mixed = [12, 0, 1, 140, 33, 0, 112, 240, 129, 72]
    for name, base, comment in (
        (
            "v-encoding-trellis",
            0x3F80,
            "Rows of trellis in tables of both families, and zero rows.",
        ),
        ("v-trellis-mode-1", 0xBDA3, "Mode 1: steps follow the tables."),
    ):
        made = trellis_task(few("mixed", mixed, 45, base))
        made.tasks[0].entries[0].b = Side(residual=[few("b", mixed, 2, base).run()])
        s.valid(name, made, comment)
    one = few("one", [20], 1)
    s.valid("v-trellis-one", trellis_task(one), "A run of one value.")
    numbers = [*range(1, 113), *range(129, 241)]
    s.valid("v-trellis-tables", trellis_task(few("tables", numbers, 6)), "Every table.")
    steps = trellis_task(few("steps", numbers, 2, 0x8000 | 15 << 7 | 0x55))
    s.valid("v-trellis-steps", steps, "Every step of mode 1, from the least base step.")
    for name, numbers, n, comment in (
        ("v-trellis-lane", [1, 0], 2**14 - 1, "2^14 − 1 symbols: one lane."),
        ("v-trellis-lanes-4", [2, 0, 2], 2**13 + 1, "2^14 + 2 symbols: four lanes."),
        ("v-trellis-lanes-15", [129, 1, 1], (2**16 - 1) // 3, "2^16 − 1 symbols: four lanes."),
        ("v-trellis-lanes-16", [130, 0, 1], 2**15, "2^16 symbols: 16 lanes."),
    ):
        s.valid(name, trellis_task(few(name, numbers, n)), comment)
    top = 2**23 - 1
    for name, base, comment in (
        ("v-trellis-least", 1 << 7, "The least base step, the largest and smallest values."),
        ("v-trellis-largest", 230 << 7 | 0x7F, "The largest base step, the largest values."),
    ):
        run = Trellis(
            [(112, [0, top, 0, 1, top, top - 1]), (1, [0, 65535, 3, 65537, 1, 0])], 6, base
        )
        s.valid(name, trellis_task(run), comment)
    r = seeded("trellis large")
    wide = Target("wide", 1100, 1100)
    long_run = few("long", [112, 111, 240], 1100)
    assert len(long_run.raw()) >= 4096
    a = [few("short", [5], 1100).run(), long_run.run()]
    entry = Entry(wide, 4, Side(residual=a), Side(residual=rows(r, [0x11, 1, 0x11, 0x11], 1100)))
    s.valid(
        "v-trellis-large",
        Collection([Task("task", [entry])]),
        "A run of more than 4,096 bytes starts right behind its predecessor.",
    )
    r = seeded("trellis frame")
    t = Target("t", 1030, 40)
    frame = Frame(
        t,
        Part(
            1030,
            2,
            [few("mean", [20, 21], 1030).run()],
            [
                few("basis", [30], 1030).run(),
                *rows(r, [1, 1], 1030),
                few("c", [0, 140], 1030).run(),
                few("d", [9], 1030).run(),
            ],
            True,
        ),
        Part(8, 2, None, [few("e", [5, 0], 40).run()]),
    )
    tasks = [
        Task(
            f"task{i}",
            [
                Entry(
                    t,
                    rank,
                    Side(
                        [few("f", [15, 0, 160, 12, 18, 31], rank).run()],
                        [few("g", [100] * rank, 1030).run()],
                    ),
                    Side([few("h", [17], 5).run()], rows(r, [0x11, 2], 40)[:rank]),
                    frame=frame,
                )
            ],
        )
        for i, rank in enumerate((1, 2))
    ]
    s.valid(
        "v-trellis-frame",
        Collection(tasks, [frame]),
        "Runs of trellis among others in a frame: never aligned, whatever their length.",
    )


def trellis_rules(s: Set) -> None:
    twin = "v-encoding-trellis"

    def broken(
        name: str,
        comment: str,
        run: Trellis,
        length: bytes | None = None,
        rule: str = "087",
        keep: int | None = None,
        more: bytes = b"",
    ) -> None:
        made = trellis_task(run)
        array = run.run(length)
        array[0].raw = array[0].raw[:keep] + more
        made.tasks[0].entries[0].a = Side(residual=[array])
        s.broken(
            f"{rule}{name}", twin, made, comment, where=[640, "entry:0"], when="load", task="task"
        )

    def run(**fields: Any) -> Trellis:
        made = few("broken", [12, 0, 40], 200)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    good = run()
    length = len(good.raw()) - 2
    assert length >= 128
    padded = bytes([length % 128 | 128, length // 128 | 128, 0])
    broken("a-long-form", "The length is not in shortest form.", run(), padded)
    # B's rows follow, so a length is too large for the entry only if it is far too large.
    broken("b-past", "The run ends behind its entry.", run(), base128(2**20))
    broken("c-huge", "A length of 2^32 and more.", run(), b"\xff\xff\xff\xff\x1f")
    broken("d-no-end", "A length of more than five bytes.", run(), b"\x80" * 5 + b"\1")
    broken("e-short", "No room for the states.", run(), base128(8))
    broken("f-odd", "Half a word.", run(), base128(length - 1))
    words = good.words
    broken("g-word-missing", "A word is read behind the last.", run(words=words[:-1]))
    broken("h-word-left", "A word is left.", run(words=[*words, 0]))
    broken("i-state", "A state ends at another value.", run(states=[good.states[0] ^ 1]))
    broken("j-state-low", "An initial state below 2^16.", run(states=[2**16 - 1]))
    for letter, number in (("k", 113), ("l", 128), ("m", 241)):
        broken(
            f"{letter}-table-{number}", f"Row byte {number}.", run(numbers=bytes([12, 0, number]))
        )
    broken("n-all-zero", "No row is coded.", Trellis([None, None], 45))
    broken("o-step-low", "A base step whose exponent field is 0.", run(base=0x7F))
    broken("p-step-high", "A base step whose exponent field is 231.", run(base=231 << 7))
    broken(
        "q-step-mode-1", "Mode 1: the step of a row would be subnormal.", run(base=0x8000 | 5 << 7)
    )
    over = Trellis([(112, [2**23])], 1)
    broken("r-value", "An index of 2^23.", over)
    broken("s-no-bytes", "A length of 0.", run(), b"\0")
    # Decoded last, an escape takes the last word, since its symbol leaves the state far from low.
    escape = Trellis([(12, [0, 3, 0, 900])], 4)
    escape.words = escape.words[:-1]
    broken("t-escape-missing", "An escape behind the last word.", escape)
    # Likely symbols with ten raw bits each: the last word is taken when those of the second go.
    bits = Trellis([(112, [5, 900, 900])], 3)
    bits.words = bits.words[:-1]
    broken("u-raw-missing", "Raw bits take a word behind the last.", bits)
    lane = few("v-trellis-lanes-4", [2, 0, 2], 2**13 + 1)
    lane.states[3] ^= 1 << 20
    broken("v-lane", "The last of four lanes ends at another value.", lane)
    more = few("more", [12], 4)
    made = trellis_task(more)
    made.tasks[0].entries[0].b = Side(residual=[[Row(0x20, more.raw() + b"\0\0", [0.0, 0.0])]])
    made.targets = []
    one = few("one value", [12], 2)
    made.tasks[0].entries[0].b = Side(residual=[[Row(0x20, one.raw() + b"\0\0", [0.0, 0.0])]])
    s.broken(
        "061c-trellis",
        twin,
        made,
        "Bytes behind the last run of an entry.",
        where=["ENTR[0]", 640, "entry:0"],
        when="load",
        task="task",
    )
    longer = [Row(0x20, more.raw() + b"\0\0", [0.0] * 4)]
    frame = Frame(Target("t", 4, 2), Part(4, 1, [longer]), None)
    own = Side(residual=rows(seeded("framed"), [1], 4))
    side = Side(residual=rows(seeded("framed"), [1], 2))
    s.broken(
        "052d-trellis",
        "v-trellis-frame",
        Collection([Task("task", [Entry(frame.target, 1, own, side, frame=frame)])], [frame]),
        "Bytes behind the last run of a frame.",
        where=["FRAM[0]", "extent-FRAM[0]"],
        when="load",
        task="task",
    )


# --- Invalid and unsupported ---------------------------------------------------------------------


def header_rules(s: Set) -> None:
    x, twin = small(), "v-small"
    data = Draft(small()).pack()
    s.broken(
        "001a-signature", twin, data, "Another first byte.", None, "preamble", cut=patch(0, b"\x88")
    )
    s.broken("001b-no-bytes", "v-header-only", b"", "A file of no bytes.", where=0)
    s.broken(
        "001c-cut-signature", twin, data, "Seven bytes.", where="preamble", cut=lambda b: b[:7]
    )
    s.broken(
        "001d-text-mode",
        twin,
        data,
        "CR LF became LF.",
        where="preamble",
        cut=lambda b: b.replace(b"\r\n", b"\n"),
    )

    def preamble(**fields: Any) -> Callable[[Draft], None]:
        return lambda d: d.preamble.update(fields)

    s.broken(
        "002-major",
        twin,
        x,
        "Major version 2.",
        preamble(major=2),
        ["preamble.major", "preamble"],
        status="unsupported",
    )
    s.broken(
        "003-features",
        twin,
        x,
        "A feature bit.",
        preamble(features=1 << 31),
        ["preamble.features", "preamble"],
        status="unsupported",
    )
    s.broken("004-crc", twin, x, "Wrong crc.", preamble(crc=1), ["preamble.crc", "preamble"])
    s.broken(
        "005a-reserved",
        twin,
        x,
        "A reserved byte of the preamble.",
        preamble(reserved=bytes(43) + b"\1"),
        [59, "preamble"],
    )
    s.broken(
        "005b-between",
        twin,
        data,
        "A byte between the slots.",
        where=[511, (192, 320)],
        cut=patch(511, b"\x80"),
    )
    s.broken("010a-crc", twin, x, "The only slot's crc is wrong.", slot(crc=1), ["slot0", "slot1"])

    def none(d: Draft) -> None:
        d.slots = [{"sequence": 1}, None]

    s.broken(
        "010b-empty",
        twin,
        x,
        "Both slots are empty.",
        none,
        ["slot0", "slot1"],
        cut=patch(64, bytes(128)),
    )
    s.broken("011a-even", twin, x, "An even sequence in slot 0.", slot(sequence=2), "slot0")

    def odd(d: Draft) -> None:
        d.slots = [None, {"sequence": 3}]

    def nought(d: Draft) -> None:
        d.slots = [None, {"sequence": 0}]

    s.broken("011b-odd", "v-slot-1", x, "An odd sequence in slot 1.", odd, "slot1")
    s.broken("011c-nought", "v-slot-1", x, "Sequence 0 in slot 1.", nought, "slot1")

    def both(d: Draft) -> None:
        d.slots = [{"sequence": 1, "crc": 1}, {"sequence": 3}]

    s.broken(
        "011d-both",
        "v-slot-1",
        x,
        "Slot 0 has a wrong crc, slot 1 a right one and an odd sequence.",
        both,
        "slot1",
    )

    def neither(d: Draft) -> None:
        d.slots = [{"sequence": 2, "crc": 1}, {"sequence": 3, "crc": 1}]

    s.broken(
        "010c-neither",
        twin,
        x,
        "Both slots have a wrong crc and a wrong sequence.",
        neither,
        ["slot0", "slot1"],
    )
    expected = expect(small()) | {"metadata": META}

    def parity(d: Draft) -> None:
        d.slots[1] = {"sequence": 3}

    s.broken(
        "012b-parity",
        twin,
        x,
        "A slot with a right crc and the other slot's parity beside a valid one: opens.",
        parity,
        "slot1",
        "validate",
        expected=expected,
    )

    def damaged(d: Draft) -> None:
        d.slots[1] = {"sequence": 2, "crc": 0x12345678}

    s.broken(
        "012a-damaged",
        twin,
        x,
        "A damaged slot beside a valid one: opens.",
        damaged,
        "slot1",
        "validate",
        expected=expected,
    )
    s.broken(
        "013a-cut",
        twin,
        data,
        "The last byte is missing.",
        where=["slot0.file_length", "slot0", (len(data) - 1, 1)],
        cut=lambda b: b[:-1],
    )
    s.broken(
        "013b-cut-header",
        "v-header-only",
        data,
        "Cut within the header.",
        where=[(639, 1), "slot0", "slot1"],
        cut=lambda b: b[:639],
    )
    s.broken(
        "013d-signature",
        "v-header-only",
        data,
        "A signature and nothing more.",
        where=[(8, 1)],
        cut=lambda b: b[:8],
    )
    s.broken(
        "013c-length",
        twin,
        x,
        "file_length is 2^64 − 1.",
        slot(file_length=2**64 - 1, growth_limit=2**64 - 1),
        ["slot0.file_length", "slot0"],
    )
    s.broken(
        "014a-limit",
        twin,
        x,
        "growth_limit below file_length.",
        slot(growth_limit=len(data) - 1),
        ["slot0.growth_limit", "slot0"],
    )
    s.broken(
        "014b-tail",
        "v-scratch",
        data,
        "Bytes behind growth_limit.",
        where=["slot0.growth_limit", "slot0", (len(data), 64)],
        cut=lambda b: b + b"PK\3\4",
    )
    s.broken(
        "015a-unused",
        twin,
        x,
        "An unused byte of a slot in minor version 0: opens.",
        slot(unused=bytes(67) + b"\1"),
        ["slot0.unused", "slot0"],
        "validate",
        expected=expected,
    )

    def inactive(d: Draft) -> None:
        d.slots = [{"sequence": 3}, {"sequence": 2, "unused": b"\1"}]

    s.broken(
        "015b-inactive",
        "v-slot-stale",
        x,
        "An unused byte of the slot that is not active: opens.",
        inactive,
        ["slot1.unused", "slot1"],
        "validate",
        expected=expected,
    )
    at = Draft(small())
    at.pack()
    length = len(data) - at.index_offset

    def index(name: str, comment: str, **fields: Any) -> None:
        field = next(iter(fields))
        s.broken(name, twin, x, comment, slot(**fields), [f"slot0.{field}", "slot0"])

    index(
        "016a-odd",
        "The index is not at a multiple of 8.",
        index_offset=at.index_offset + 4,
        index_length=length - 4,
    )
    index(
        "016b-early", "The index begins within the header.", index_offset=632, index_length=length
    )
    index("016c-past", "The index ends behind file_length.", index_length=length + 8)
    index(
        "016d-wrap",
        "index_offset + index_length is 8 in 64 bits.",
        index_length=2**64 - at.index_offset + 8,
    )
    index("016e-sections", "n_sections · 40 is 0 in 64 bits.", n_sections=2**61)
    index("016f-table", "One section record too many for the index.", n_sections=length // 40 + 1)
    index("017a-short", "Section records of 32 bytes.", section_record_size=32)

    def longer(extra: bytes, minor: int) -> Callable[[Draft], None]:
        def edit(d: Draft) -> None:
            d.table_extra = extra
            d.preamble["minor"] = minor

        return edit

    where = ["slot0.section_record_size", "slot0"]
    s.broken(
        "017b-long",
        "v-minor-1",
        x,
        "Section records of 48 bytes in minor version 0.",
        longer(bytes(8), 0),
        where,
    )
    s.broken("017c-odd", "v-minor-1", x, "Section records of 44 bytes.", longer(bytes(4), 1), where)
    s.broken(
        "017d-none", twin, x, "Section records of no bytes.", slot(section_record_size=0), where
    )


def index_rules(s: Set) -> None:
    x, twin = small(), "v-small"
    s.broken(
        "020-crc",
        twin,
        x,
        "Wrong crc of the section table.",
        slot(section_table_crc=1),
        [(0, 0), "slot0"],
    )
    s.entries[-1]["offset"] = s.entries[-1]["within"][0][0] = _index_offset(x)
    s.entries[-1]["within"][0][1] = 40 * 15

    def broken(name: str, comment: str, edit: Callable[[Draft], Any], *more: Token,
               twin: str = twin, status: str = "malformed") -> None:  # fmt: skip
        probe = Draft(small())
        first = edit(probe)
        s.broken(
            name, twin, small(), comment, edit, [*([first] if first else []), *more], status=status
        )

    broken(
        "021a-gap",
        "Eight zero bytes more between two sections.",
        section("TLST", pad=bytes(8)),
        "content:TLST",
    )

    def padding(d: Draft) -> Token:
        d.strings.append(b"zzz")
        n = sum(len(string) + 1 for string in d.strings)
        section("TARG", pad=bytes(-n % 8 - 1) + b"\1")(d)
        return "section:TARG"

    probe = Draft(small())
    padding(probe)
    probe.pack()
    at = probe.find("content:TARG")[0] - 1
    s.broken(
        "021b-padding",
        twin,
        x,
        "Padding between sections is not zero.",
        padding,
        [at, "section:TARG", (at - 7, 8)],
    )

    def trailing(d: Draft) -> None:
        p = Draft(small())
        p.pack()
        end = sum(p.find("content:meta"))
        d.tail = bytes(-end % 8 + 8)
        n = end - p.index_offset + len(d.tail)
        slot(index_length=n, file_length=end + len(d.tail))(d)

    end = Draft(small())
    end.pack()
    s.broken(
        "021c-end",
        twin,
        x,
        "The index ends eight bytes behind its last section.",
        trailing,
        [sum(end.find("content:meta")), (end.index_offset, 600)],
    )
    s.entries[-1]["within"].append([64, 128])
    broken("021d-odd", "A section at an odd offset.", section("TARG", pad=b"\0"), "content:TARG")
    broken(
        "021e-wrap",
        "offset + length is small in 64 bits.",
        section("meta", length=2**64 - 8, count=2**64 - 8),
    )
    broken(
        "021f-overlap",
        "Two sections share bytes.",
        section("PRIV", offset=end.find("content:PRIV")[0] - 8),
    )
    broken("022a-digit", "A digit in a type.", section("xa1b", raw=b"1234"))

    def twice(d: Draft) -> Token:
        d.order.append("mmmm")
        d.sections["mmmm"] = {"raw": canonical(META), "type": b"meta"}
        return "section:meta"

    broken("022b-twice", "A type twice.", twice)
    broken("022c-latin", "A letter beyond ASCII.", section("x\xe4bc", raw=b"1234"))
    broken(
        "023-critical",
        "An unknown critical section.",
        section("NEWS", raw=b"1234"),
        twin="v-optional",
        status="unsupported",
    )
    broken(
        "024a-long",
        "Longer records in minor version 0.",
        section("RUNS", record_extra=bytes(4)),
        twin="v-minor-1",
    )

    def short(d: Draft) -> Token:
        d.preamble["minor"] = 1
        n = len(d.tables["RUNS"])
        return section("RUNS", record_size=4, count=2 * n)(d)

    broken(
        "024b-short",
        "Records shorter than the type's, in minor version 1.",
        short,
        twin="v-minor-1",
    )
    n_tasks = len(end.tables["RUNS"])
    broken("024c-count", "One record more than the length has.", section("RUNS", count=n_tasks + 1))
    broken(
        "024d-wrap",
        "count · record_size is the length in 64 bits.",
        section("RUNS", count=2**61 + n_tasks),
    )
    broken(
        "024e-optional",
        "count · record_size is not the length of an unknown section.",
        section("xExt", raw=b"12345678", record_size=3, count=3),
        twin="v-optional",
    )

    def text_records(name: str) -> Callable[[Draft], Token]:
        def edit(d: Draft) -> Token:
            d.preamble["minor"] = 1
            n = len(canonical(META)) if name == "meta" else sum(len(x) + 1 for x in d.strings)
            if n % 2:
                d.strings.append(b"zz")
                d.meta += b" "
                n += 1 if name == "meta" else 3
            return section(name, record_size=2, count=n // 2)(d)

        return edit

    for letter, name in (("f", "meta"), ("g", "STRS")):
        broken(
            f"024{letter}-text",
            f"Records of two bytes in {name}, in minor version 1.",
            text_records(name),
            twin="v-minor-1",
        )
    broken("025-crc", "Wrong crc of a section.", section("FORM", crc=1))
    s.entries[-1]["within"].insert(0, list(end.find("content:FORM")))
    s.entries[-1]["offset"] = end.find("content:FORM")[0]
    text = canonical(META)
    broken("026a-coding", "An unknown coding.", section("meta", coding=2), twin="v-deflated")
    broken("026j-coding", "Another coding.", section("xZip", raw=b"1234", coding=2))
    broken(
        "026k-limit",
        "An unknown optional section's decoded size is above the limit, too.",
        section("xZip", raw=b"1234", coding=1, count=4 * 256 + 65537),
    )

    def free(d: Draft) -> Token:
        record = {"crc": None} | d.place(b"\0" * 8)
        d.tables["free"].append(record)
        d._checksums()
        raw = struct.pack("<QQII", record["offset"], 8, record["crc"], 0)
        return section("free", stored=zlib_stored(raw), coding=1)(d)

    broken("026l-free", "Deflated free extents: opening needs them.", free, twin="v-free")
    strings = b"".join(string + b"\0" for string in end.strings)
    broken(
        "026b-critical",
        "A deflated critical section.",
        section("STRS", stored=zlib_stored(strings), coding=1),
        twin="v-deflated",
    )
    stored = zlib_fixed(b" " * 70000)
    limit = 256 * len(stored) + 65536
    broken(
        "026c-limit",
        "One byte more than the decoded size may have.",
        section("meta", stored=stored, coding=1, count=limit + 1),
        twin="v-deflated",
    )
    for letter, what, comment in (
        ("d", {"stored": zlib_fixed(text + b" ")}, "The stream has one byte more than count says."),
        ("e", {"stored": zlib_fixed(text[:-1])}, "The stream has one byte less than count says."),
        ("f", {"stored": zlib_fixed(text) + b"\0"}, "A byte behind the stream."),
        ("g", {"stored": zlib_fixed(text)[:-1]}, "The stream is cut short."),
        ("h", {"stored": zlib_fixed(text)[:-1] + b"!"}, "The stream's own checksum is wrong."),
        ("i", {"stored": zlib_fixed(text), "count": 2**63}, "A count of 2^63."),
    ):
        content: tuple[Token, ...] = ("section:meta",) if letter != "i" else ()
        edit = section("meta", coding=1, **what)
        first = "content:meta" if letter != "i" else "section:meta"
        s.broken(
            f"026{letter}-stream",
            "v-deflated",
            small(),
            comment,
            edit,
            [first, *content],
            when="open" if letter == "i" else "validate",
        )


def _index_offset(c: Collection) -> int:
    draft = Draft(c)
    draft.pack()
    return draft.index_offset


def table_rules(s: Set) -> None:
    x, twin = spare(), "v-spare"
    start = sum(len(string) + 1 for string in Draft(spare()).strings)
    for name, strings, comment, at in (
        ("030a-utf8", [b"zzz\xff"], "A string that is not UTF-8.", 0),
        ("030b-empty", [b""], "An empty string.", 0),
        ("030c-control", [b"zzz\n"], "A control character.", 0),
        ("030d-delete", [b"zzz\x7f"], "U+007F.", 0),
        ("030e-long", [b"z" * 1025], "1,025 bytes.", 0),
        ("030f-overlong", [b"\xc0\xaf"], "An overlong form.", 0),
        ("030g-surrogate", [b"\xed\xa0\x80"], "A surrogate.", 0),
        ("030h-beyond", [b"\xf4\x90\x80\x80"], "A code point beyond U+10FFFF.", 0),
        ("031a-order", [b"zzzz", b"zzz"], "Descending strings.", 5),
        ("031b-twice", [b"zzz", b"zzz"], "A string twice.", 4),
    ):  # fmt: skip
        probe = Draft(spare())
        probe.strings += strings
        probe.pack()
        base = probe.find("content:STRS")[0]
        s.broken(
            name,
            twin,
            x,
            comment,
            with_strings(*strings),
            [base + start + at, (base + start, len(strings[-1]) + at + 1)],
        )

    def no_end(d: Draft) -> None:
        raw = b"".join(string + b"\0" for string in d.strings) + b"zzz"
        section("STRS", raw=raw)(d)

    probe = Draft(spare())
    no_end(probe)
    probe.pack()
    base = probe.find("content:STRS")[0]
    s.broken(
        "030i-no-end",
        twin,
        x,
        "The last string has no NUL.",
        no_end,
        [base + start, (base, start + 3)],
    )

    s.broken("035a-name", twin, x, "A target without a name.", spare_target(name=99))
    s.broken("035b-twice", twin, x, "A target twice.", append("TARG", n_in=36, n_out=10, name=3))
    s.broken(
        "035c-order",
        twin,
        x,
        "Targets of one name in descending order of n_in.",
        append("TARG", n_in=35, n_out=11, name=3),
    )
    s.broken("036a-kind", twin, x, "An unknown kind.", spare_target(kind=3), status="unsupported")
    for letter, comment, fields in (
        ("b", "n_in is 0.", {"n_in": 0}),
        ("c", "n_out is 2^40 + 1.", {"n_out": 2**40 + 1}),
        ("d", "An unknown flag.", {"flags": 2}),
        ("e", "A linear target with a kernel.", {"kernel0": 3}),
        ("f", "A convolution without a kernel.", {"kind": 2}),
        ("g", "n_in is no multiple of the kernel.", {"kind": 2, "kernel0": 5}),
        ("h", "A kernel size behind a zero.", {"kind": 2, "kernel0": 3, "kernel2": 3}),
        ("i", "n_in is 2^64 − 1.", {"n_in": 2**64 - 1}),
    ):
        s.broken(f"036{letter}-target", "v-kinds", x, comment, spare_target(**fields))
    s.broken("037a-task", twin, x, "A reserved field of a task.", put("TASK", 0, reserved=1))
    s.broken(
        "037b-target", twin, x, "A reserved field of a target.", spare_target(reserved=1 << 31)
    )
    s.broken("037c-run", twin, x, "A reserved byte of a run.", put("RUNS", 0, reserved=b"\0\0\1"))
    s.broken(
        "037d-form", twin, x, "A reserved byte of a form.", spare_form(reserved=b"\0\0\0\0\0\1")
    )
    s.broken("037e-frame", "v-unused", x, "A reserved field of a part.", spare_frame(reserved_a=1))
    s.broken(
        "037f-private",
        twin,
        x,
        "A reserved field of a private tensor.",
        put("PRIV", 0, reserved2=1),
    )
    s.broken("037g-blob", twin, x, "A reserved field of a blob.", put("BLOB", 0, reserved=1))

    def free(d: Draft) -> Token:
        return append("free", crc=None, reserved=1, **d.place(b"12345678"))(d)

    s.broken("037h-free", "v-free", x, "A reserved field of a free extent.", free)

    def layout(
        counts: list[int], encodings: tuple[int, ...] = (0, 1, 2), **fields: Any
    ) -> Callable[[Draft], Token]:
        def edit(d: Draft) -> Token:
            first = len(d.tables["RUNS"])
            d.tables["RUNS"] += [
                {"count": n, "encoding": code} for n, code in zip(counts, encodings, strict=False)
            ]
            d.tables["LAYO"].append(
                {"first_run": first, "n_runs": len(counts), "n_rows": sum(counts) % 2**32} | fields
            )
            return f"LAYO[{len(d.tables['LAYO']) - 1}]"

        return edit

    def run(d: Draft) -> Token:
        layout([1, 0])(d)
        return f"RUNS[{len(d.tables['RUNS']) - 1}]"

    s.broken("040-run", "v-unused", x, "A run of no rows.", run)
    s.broken("041a-rows", "v-unused", x, "n_rows is not the sum.", layout([1, 2], n_rows=4))
    s.broken("041b-tile", "v-unused", x, "A layout uses runs of another.", layout([1], first_run=0))
    s.broken("041c-empty", "v-unused", x, "A layout without runs.", layout([]))

    def left(d: Draft) -> list[Token]:
        d.tables["RUNS"].append({"count": 1})
        return [f"RUNS[{len(d.tables['RUNS']) - 1}]", "content:RUNS", "content:LAYO"]

    s.broken("041d-left", "v-unused", x, "A run in no layout.", left)
    s.broken("041e-past", "v-unused", x, "A layout runs past the runs.", layout([1], n_runs=2))
    s.broken(
        "041f-wrap",
        "v-unused",
        x,
        "The sum of the counts is 1 in 32 bits.",
        layout([2**31, 2**31, 1]),
    )
    s.broken(
        "041g-first", "v-unused", x, "first_run is 2^64 − 1.", layout([1], first_run=2**64 - 1)
    )

    def adjacent(*encodings: int) -> Callable[[Draft], list[Token]]:
        def edit(d: Draft) -> list[Token]:
            record = layout([1] * len(encodings), encodings)(d)
            n = len(d.tables["RUNS"])
            return [record, f"RUNS[{n - 2}]", f"RUNS[{n - 1}]"]

        return edit

    s.broken("041h-adjacent", "v-unused", x, "Two runs of zeros side by side.", adjacent(0, 0))
    s.broken("041i-adjacent", "v-unused", x, "Two runs of f16.", adjacent(1, 0x20, 2, 2))
    r = seeded("adjacent")
    one, two = rows(r, [2], 9), rows(r, [2, 2], 9)
    s.broken(
        "041j-adjacent",
        "v-encodings-mixed",
        alone("task", [(Target("t", 9, 9), one + two, two + one)]),
        "An entry whose rows are in two runs of f16.",
        where=["LAYO[0]", "LAYO[1]", "content:RUNS"],
    )
    for letter, comment, fields in (
        ("a", "The scale is NaN.", {"scale": math.nan}),
        ("b", "The scale is infinite.", {"scale": -math.inf}),
        ("c", "Rank 0.", {"rank": 0, "residual_a": NONE, "residual_b": NONE}),
        ("d", "Rank 2^20 + 1.", {"rank": 2**20 + 1, "residual_a": NONE, "residual_b": NONE}),
        ("e", "A layout that does not exist.", {"coefficients_b": 99}),
        ("f", "Dtype 0.", {"dtype_a": 0}),
        ("g", "Dtype f64.", {"dtype_b": 4}),
        ("h", "A residual's layout that does not exist.", {"residual_a": NONE - 1}),
    ):
        s.broken(f"042{letter}-form", "v-unused", x, comment, spare_form(**fields))
    s.broken(
        "043-rows",
        "v-unused",
        x,
        "A residual of one row in a form of rank 2.",
        spare_form(rank=2, residual_b=NONE),
    )


def frame_rules(s: Set) -> None:
    x, twin = spare(), "v-unused"
    s.broken("050a-target", twin, x, "A frame without a target.", spare_frame(target=2))

    def swapped(d: Draft) -> Token:
        d.tables["FRAM"].reverse()
        return "FRAM[1]"

    s.broken("050b-order", "v-small", small(), "Frames in descending order.", swapped)

    def big(d: Draft) -> Token:
        n = zero_layout(d, 2**20 + 1)
        return spare_frame(n_components_a=2**20 + 1, basis_a=n)(d)

    for letter, comment, fields in (
        ("a", "R is 0.", {"rank_a": 0}),
        ("b", "group is 0.", {"group_a": 0}),
        ("c", "group is above L.", {"group_a": 37}),
        ("d", "p is 1 without a basis.", {"n_components_a": 1}),
        ("e", "A basis and p is 0.", {"basis_a": 0}),
        ("f", "The mean has not R rows.", {"rank_a": 2}),
        ("g", "The basis has not p · R rows.", {"n_components_a": 2, "basis_a": 0}),
        ("h", "Neither mean nor basis.", {"mean_a": NONE}),
        ("i", "Row mixing with a group below L.", {"flags_a": 1, "group_a": 35}),
        ("j", "An unknown flag.", {"flags_a": 2}),
        ("k", "A mean that does not exist.", {"mean_a": 99}),
        ("l", "Both parts are absent.", {"group_a": 0, "rank_a": 0, "mean_a": NONE}),
        ("m", "R is 2^20 + 1.", {"rank_a": 2**20 + 1, "mean_a": NONE}),
        ("n", "Part B: group is above L.", {"group_b": 11, "rank_b": 1, "mean_b": 0}),
        (
            "o",
            "p · R is 1 in 32 bits.",
            {"n_components_a": 2**20 - 1, "rank_a": 2**20, "basis_a": 0},
        ),
    ):
        s.broken(f"051{letter}-part", twin, x, comment, spare_frame(**fields))
    s.broken("051p-components", twin, x, "p is 2^20 + 1.", big)

    def longer(d: Draft) -> Token:
        return spare_frame(**d.place(bytes(8)))(d)

    s.broken("052a-length", twin, x, "A frame of eight bytes whose arrays take none.", longer)
    s.broken("052b-offset", twin, x, "An empty frame at an offset.", spare_frame(offset=640))
    s.broken(
        "052c-short",
        "v-small",
        small(),
        "A frame shorter than its arrays.",
        lambda d: put("FRAM", 0, length=d.tables["FRAM"][0]["length"] - 8)(d),
    )


def task_rules(s: Set) -> None:
    x, twin = spare(), "v-spare"

    def more(**fields: Any) -> Callable[[Draft], Token]:
        """Append a task with nothing in it."""

        def edit(d: Draft) -> Token:
            d.strings.append(b"zzz")
            record = {"first_entry": 1, "first_private": 1, "name": 4}
            return append("TASK", **(record | fields))(d)

        return edit

    s.broken("055a-name", "v-task-empty", x, "A task without a name.", more(name=5))
    s.broken("055b-twice", "v-task-empty", x, "Two tasks of one name.", more(name=2))
    s.broken("055c-order", "v-task-empty", x, "Tasks in descending order.", more(name=0))
    s.broken(
        "056a-entries", "v-task-empty", x, "A task's first entry is another's.", more(first_entry=0)
    )
    s.broken(
        "056b-privates", "v-task-empty", x, "A task skips private tensors.", more(first_private=2)
    )

    def owned(table: str, **fields: Any) -> Callable[[Draft], list[Token]]:
        return lambda d: ["TASK[0]", append(table, **fields)(d)]

    s.broken("056c-left", twin, x, "An entry of no task.", owned("ENTR", form=0, crc=0))
    s.broken(
        "056d-left",
        twin,
        x,
        "A private tensor of no task.",
        owned("PRIV", name=0, dtype=6, n_dims=2),
    )
    s.broken("056e-huge", twin, x, "A task with 2^63 entries.", put("TASK", 0, n_entries=2**63))

    def pair(n: int) -> Collection:
        r = seeded("pair")
        t = [Target("a", 4, 4), Target("b", 4, 4), Target("b", 4, 5)]
        made = [
            Entry(x, 1, Side(residual=rows(r, [1], 4)), Side(residual=rows(r, [1], x.n_out)))
            for x in (t[1:] if n == 3 else t[:2])
        ]
        return Collection([Task("task", made)], targets=t)

    s.valid("v-pair", pair(2), "The twin of vectors about lists of targets.")
    s.broken(
        "057a-target",
        "v-pair",
        pair(2),
        "A target that does not exist.",
        put("TLST", 1, target=3),
        ["TASK[0]", "TLST[1]"],
    )

    def targets(*ids: int) -> Callable[[Draft], None]:
        def edit(d: Draft) -> None:
            d.tables["TLST"] = [{"target": i} for i in ids]

        return edit

    s.broken(
        "057b-order",
        "v-pair",
        pair(2),
        "Descending targets.",
        targets(1, 0),
        ["TASK[0]", "TLST[0]", "TLST[1]"],
    )
    s.broken(
        "057c-twice",
        "v-pair",
        pair(2),
        "A target twice.",
        targets(0, 0),
        ["TASK[0]", "TLST[0]", "TLST[1]"],
    )
    s.broken(
        "057d-name",
        "v-pair",
        pair(3),
        "Two targets of one name in one task.",
        where=["TASK[0]", "TLST[0]", "TLST[1]"],
    )
    s.broken(
        "057e-past",
        "v-pair",
        pair(2),
        "A list that ends behind TLST.",
        put("TASK", 0, first_target=1),
    )
    s.broken(
        "057f-wrap",
        "v-pair",
        pair(2),
        "first_target + n_entries is 1 in 64 bits.",
        put("TASK", 0, first_target=2**64 - 1),
    )
    s.broken(
        "057g-empty",
        "v-task-empty",
        x,
        "An empty list that starts behind TLST.",
        more(first_target=2**32),
    )

    def grown(d: Draft) -> Token:
        d.payload += bytes(8)
        return put("TASK", -1, length=d.tables["TASK"][-1]["length"] + 8)(d)

    s.broken("058a-length", "v-pair", pair(2), "A run longer than its entries.", grown)
    s.broken("058b-offset", "v-task-empty", x, "An empty run at an offset.", more(offset=640))
    s.broken(
        "058c-short",
        "v-pair",
        pair(2),
        "A run shorter than its entries.",
        put("TASK", 0, length=60),
    )


def entry_rules(s: Set) -> None:
    s.broken(
        "060a-form", "v-small", small(), "A form that does not exist.", put("ENTR", 1, form=99)
    )
    s.broken(
        "060b-cluster",
        "v-small",
        small(),
        "A cluster that does not exist.",
        put("FORM", 0, cluster=2),
        ["ENTR[0]", "FORM[0]"],
    )
    r = seeded("fit")
    t = Target("t", 6, 6)

    def one(rank: int, coefficients: Any, with_frame: bool = True) -> Collection:
        frame = Frame(t, Part(6, 2, None, rows(r, [1] * 4, 6)), None)
        entry = Entry(
            t,
            rank,
            Side(coefficients),
            Side(residual=rows(r, [1] * rank, 6)),
            frame=frame if with_frame else None,
        )
        return Collection([Task("task", [entry])], [frame])

    two = rows(r, [1, 1], 1)
    s.valid("v-fit", one(2, two), "The twin of vectors about an entry that does not fit its frame.")
    where: list[Token] = ["ENTR[0]", "FORM[0]"]
    s.broken("060c-rank", "v-fit", one(3, two), "A rank above R.", where=where)
    s.broken(
        "060d-alone", "v-fit", one(2, two, False), "Coefficients without a frame.", where=where
    )
    s.broken("060e-none", "v-fit", one(2, None), "No coefficients and p is 2.", where=where)
    s.broken(
        "060f-rows",
        "v-fit",
        one(2, rows(r, [1, 1, 1], 1)),
        "Three rows of coefficients and p is 2.",
        where=where,
    )
    absent = one(2, two)
    absent.tasks[0].entries[0].b = Side(two, rows(r, [1, 1], 6))
    s.broken("060g-absent", "v-fit", absent, "Coefficients for an absent part.", where=where)

    def grown(d: Draft) -> Token:
        d.payload += bytes(8)
        d.tables["TASK"][0]["length"] += 8
        return put("ENTR", 0, length=d.tables["ENTR"][0]["length"] + 8)(d)

    def shrunk(d: Draft) -> Token:
        length = d.tables["ENTR"][0]["length"] - 8
        del d.payload[-8:]
        d.tables["TASK"][0]["length"] = length
        return put("ENTR", 0, length=length)(d)

    s.broken("061a-long", "v-fit", one(2, two), "An entry longer than its arrays.", grown)
    s.broken("061b-short", "v-fit", one(2, two), "An entry shorter than its arrays.", shrunk)
    wide = Target("wide", 2**30, 1)
    # The values are never made: expectations are for valid vectors only.
    zeros = [[Row(0, b"", [])]]
    many = Collection([Task("task", [Entry(wide, 1, Side(residual=zeros), Side())])])
    s.broken("062a-values", "v-values-many", many, "2^30 values in a small file.", where="TASK[0]")
    huge = [Target(f"t{i}", 2**40, 2**40) for i in range(8)]
    task = Task("task", [Entry(t, 2**20, Side(), Side()) for t in huge])
    s.broken(
        "062b-wrap",
        "v-values-many",
        Collection([task]),
        "The number of values is 0 in 64 bits.",
        where="TASK[0]",
    )
    # Factor B has no part, so that the work stays below its limit.
    over, edit, _ = limits(1)
    over.frames[0].b = None
    over.tasks[0].entries[0].b = Side()
    shift = len(Draft(one_frame(15)).pack()) - len(Draft(over).pack())

    def one_more(d: Draft) -> Token:
        edit(d)
        d.tables["TARG"][0]["n_in"] -= 1024 * shift
        d.tables["FRAM"][0] |= {"group_a": d.tables["TARG"][0]["n_in"], "group_b": 0}
        return "TASK[0]"

    s.broken("062c-one", "v-limits", over, "One value more than 1,024 a byte.", one_more)
    many, _, _ = work()
    half = 2 * len(Draft(many).pack())
    s.broken(
        "063a-work",
        "v-work-many",
        many,
        "A little more than 16,384 products and sums a byte, in factor A.",
        resized(half + 1, half),
    )
    s.broken(
        "063b-work",
        "v-work-many",
        many,
        "A little more than 16,384 products and sums a byte, in factor B.",
        resized(half, half + 1),
    )


def private_rules(s: Set) -> None:
    x, twin = spare(), "v-spare"
    for letter, comment, fields in (
        ("a", "A name that does not exist.", {"name": 99}),
        ("b", "A blob that does not exist.", {"blob": 1}),
        ("c", "Dtype 0.", {"dtype": 0}),
        ("d", "Dtype 17.", {"dtype": 17}),
        ("e", "Dimensions behind the end of DIMS.", {"first_dim": 1}),
        ("f", "first_dim + n_dims is 1 in 64 bits.", {"first_dim": 2**64 - 1}),
    ):
        s.broken(f"065{letter}-private", twin, x, comment, put("PRIV", 0, **fields))

    def nine(d: Draft) -> Token:
        d.tables["DIMS"] += [{"size": 1}] * 7
        return put("PRIV", 0, n_dims=9)(d)

    s.broken("065g-dims", "v-privates", x, "Nine dimensions.", nine)

    def twice(d: Draft) -> Token:
        d.tables["PRIV"].append(dict(d.tables["PRIV"][0]))
        d.tables["TASK"][0]["n_privates"] = 2
        return "PRIV[1]"

    s.broken("065h-twice", twin, x, "Two private tensors of one name in one task.", twice)
    s.broken(
        "066a-shape",
        twin,
        x,
        "A shape of ten bytes, a blob of eight.",
        put("DIMS", 0, size=5),
        "PRIV[0]",
    )
    s.broken("066b-dtype", twin, x, "A dtype of two bytes.", put("PRIV", 0, dtype=7))

    def shape(*dims: int) -> Callable[[Draft], Token]:
        """Give the private tensor an empty blob and dimensions whose product wraps."""

        def edit(d: Draft) -> Token:
            d.tables["DIMS"] = [{"size": n} for n in dims]
            d.tables["BLOB"].append({"offset": 0, "length": 0, "crc": 0})
            return put("PRIV", 0, n_dims=len(dims), blob=1)(d)

        return edit

    s.broken(
        "066c-wrap",
        "v-privates",
        x,
        "The product of the dimensions is 0 in 64 bits.",
        shape(2**40, 2**24),
    )
    s.broken(
        "066d-limit", "v-privates", x, "A dimension of 2^40 + 1 beside a 0.", shape(2**40 + 1, 0)
    )
    # A file has to be this long before names alone, at 27 bytes each, can ask for so much.
    letters = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    short = [*letters, *(a + b for a in letters for b in letters)][:2100]
    raw = bytes(57000)

    def unfolding(n: int) -> Collection:
        tensors = [Private(name, 6, (len(raw),), raw) for name in short[:n]]
        return Collection([Task("task", [], tensors)])

    def one_dimension(d: Draft) -> Token:
        d.tables["DIMS"] = d.tables["DIMS"][:1]
        for record in d.tables["PRIV"]:
            record["first_dim"] = 0
        return "TASK[0]"

    s.broken(
        "064-private",
        "v-privates-shared",
        unfolding(2100),
        "2,100 private tensors that share one blob: more than 1,024 bytes a byte of the file.",
        one_dimension,
    )
    s.broken(
        "067-offset",
        "v-unused",
        x,
        "An empty blob at an offset.",
        append("BLOB", offset=640, length=0, crc=0),
    )


def extent_rules(s: Set) -> None:
    x, twin = spare(), "v-spare"
    empty = append("free", offset=0, length=0, crc=0)
    s.broken("071f-empty", "v-free", x, "A free extent of no bytes.", empty)

    def blob(raw: bytes, shift: int, large: bool = False) -> Callable[[Draft], list[Token]]:
        def edit(d: Draft) -> list[Token]:
            at = 640 + len(d.payload)
            at = -(-at // 64) * 64 + shift if large else -(-at // 8) * 8 + shift
            record = append("BLOB", crc=None, **d.place(raw, at))(d)
            return [at, (at, len(raw)), record]

        return edit

    s.broken(
        "070a-small",
        "v-unused",
        x,
        "A blob at an offset that is no multiple of 8.",
        blob(b"unaligned", 4),
    )
    s.broken(
        "070b-large",
        "v-large",
        x,
        "A blob of 4,096 bytes at a multiple of 8.",
        blob(bytes(4096), 8, True),
    )

    def index(d: Draft) -> list[Token]:
        d.strings += [b"zzz%04d" % i for i in range(500)]
        d.align_index = False
        at = -(-(640 + len(d.payload)) // 64) * 64 + 8
        d.payload += bytes(at - 640 - len(d.payload))
        return [at, "slot0"]

    s.broken(
        "070c-index",
        "v-index-large",
        x,
        "An index of 4,096 bytes or more at a multiple of 8.",
        index,
    )

    def same(d: Draft) -> list[Token]:
        record = append("BLOB", **dict(d.tables["BLOB"][0]))(d)
        return [d.tables["BLOB"][0]["offset"], "BLOB[0]", record]

    s.broken("071a-same", twin, x, "Two blobs of one range.", same)

    def at(offset: int, length: int) -> Callable[[Draft], list[Token]]:
        def edit(d: Draft) -> list[Token]:
            return [offset, append("BLOB", offset=offset, length=length, crc=0)(d)]

        return edit

    s.broken("071b-header", "v-unused", x, "A blob in the header.", at(512, 128))
    s.broken("071c-past", "v-unused", x, "A blob that ends behind file_length.", at(2**40, 8))
    s.broken("071d-wrap", "v-unused", x, "offset + length is 640 in 64 bits.", at(2**64 - 64, 704))

    def overlap(d: Draft) -> list[Token]:
        record = d.tables["BLOB"][0]
        return [
            record["offset"],
            append("free", offset=record["offset"] + 4, length=4, crc=0)(d),
            "BLOB[0]",
        ]

    s.broken("071e-overlap", "v-free", x, "A free extent within a blob.", overlap)
    probe = Draft(spare())
    overlap(probe)
    s.entries[-1]["offset"] = probe.tables["free"][0]["offset"]
    s.entries[-1]["within"][0] = [probe.tables["free"][0]["offset"], 4]

    def gap(n: int, raw: bytes = b"") -> Callable[[Draft], list[Token]]:
        def edit(d: Draft) -> list[Token]:
            at = 640 + len(d.payload)
            d.payload += bytes(n - len(raw)) + raw
            after = append("free", crc=None, **d.place(b"free", at + n))(d)
            return [at + n - len(raw) if raw else at, (at, n + 1), after]

        return edit

    s.broken("072a-gap", "v-free", x, "64 zero bytes in no extent.", gap(64))
    s.broken(
        "072b-byte",
        "v-free",
        x,
        "A byte that is not zero between extents: opens.",
        gap(20, b"\1"),
        when="validate",
        expected=expect(spare()) | {"metadata": None},
    )
    data = Draft(spare()).pack()

    def end(d: Draft) -> list[Token]:
        d.tail = bytes(8)
        slot(file_length=len(data) + 8)(d)
        return [len(data), "slot0"]

    s.broken("072c-end", twin, x, "The last extent does not end the file.", end)


def payload_rules(s: Set) -> None:
    def crc(
        name: str, comment: str, table: str, i: int, token: str, x: Collection, twin: str
    ) -> None:
        s.broken(name, twin, x, comment, put(table, i, crc=1), [token, f"{table}[{i}]"], "validate")

    crc("080-entry", "Wrong crc of an entry: opens.", "ENTR", 1, "entry:1", small(), "v-small")
    crc(
        "081-frame", "Wrong crc of a frame: opens.", "FRAM", 1, "extent-FRAM[1]", small(), "v-small"
    )
    crc("082-blob", "Wrong crc of a blob: opens.", "BLOB", 0, "extent-BLOB[0]", small(), "v-small")

    def free(d: Draft) -> list[Token]:
        record = append("free", **d.place(b"12345678"), crc=1)(d)
        return ["extent-free[0]", record]

    s.broken(
        "083-free", "v-free", small(), "Wrong crc of a free extent: opens.", free, when="validate"
    )

    def pad_run(d: Draft) -> Token:
        at = d.entry_offsets()[-1] - 1
        d.payload[at - 640] = 1
        return at

    expected = expect(large()) | {"metadata": None}
    s.broken(
        "085a-run",
        "v-large",
        large(),
        "Padding between entries is not zero: opens.",
        pad_run,
        when="validate",
        expected=expected,
    )

    def pad_entry(d: Draft) -> Token:
        # Factor B's run of 4,096 bytes is aligned behind 4 + 350 bytes.
        at = d.entry_offsets()[0] + 383
        assert not any(d.payload[at - 640 - 29 : at - 640 + 1])
        d.payload[at - 640] = 1
        return at

    s.broken(
        "085b-entry",
        "v-large",
        large(),
        "Padding between runs is not zero: opens.",
        pad_entry,
        when="validate",
        expected=expected,
    )

    def pad_frame(d: Draft) -> Token:
        at = d.tables["FRAM"][0]["offset"] + 210
        d.payload[at - 640] = 0x80
        return at

    s.broken(
        "085c-frame",
        "v-large",
        large(),
        "Padding between runs of a frame is not zero: opens.",
        pad_frame,
        when="validate",
        expected=expected,
    )
    for bits, name in QUANTISED.items():
        r = seeded(name)
        rows_a = rows(r, [0x10 + bits] * 2, 45)
        made = alone("task", [(Target("t", 45, 3), rows_a, rows(r, [1, 1], 3))])
        block = 2 + 4 * bits
        # The last code of the second row's last block.
        last = 4 * block - 1

        def code(d: Draft, last: int = last, block: int = block) -> list[Token]:
            d.payload[last] |= 0x80
            return [640 + last + 1 - block, (640, 4 * block)]

        s.broken(
            f"086-{name}-code",
            f"v-encoding-{name}",
            made,
            f"{name}: a code behind the row's end is not zero.",
            code,
            when="validate",
        )

        def scale(d: Draft, block: int = block, bits: int = bits) -> list[Token]:
            d.payload[block : block + 2] = b"\0\x7c" if bits % 2 else b"\1\xfe"
            return [640 + block, (640, 4 * block)]

        s.broken(
            f"086-{name}-scale",
            f"v-encoding-{name}",
            made,
            f"{name}: a scale is {'infinite' if bits % 2 else 'NaN'}.",
            scale,
            when="validate",
        )
    r = seeded("unknown")
    t = Target("t", 6, 6)
    plain = Entry(t, 1, Side(residual=rows(r, [1], 6)), Side(residual=rows(r, [1], 6)))
    odd = Entry(t, 1, Side(residual=runs(row_unknown(0xEE, b"0123456789", 6))), Side())
    both = Collection([Task("known", [plain]), Task("unknown", [odd])])
    expected = expect(Collection([Task("known", [plain])])) | {"metadata": None}
    s.broken(
        "088a-entry",
        "v-encoding-f32",
        both,
        "An encoding that nobody knows; the other task loads.",
        where=["RUNS[1]", "ENTR[1]", "entry:1"],
        when="load",
        status="unsupported",
        task="unknown",
        expected=expected,
    )
    pair = [[row_unknown(0xEE, b"0123", 6)], [row_unknown(0xEE, b"456789", 6)]]
    odd = Entry(t, 2, Side(residual=pair), Side())
    s.broken(
        "088c-adjacent",
        "v-encoding-f32",
        Collection([Task("known", [plain]), Task("unknown", [odd])]),
        "Two runs side by side of an encoding that nobody knows.",
        where=["RUNS[1]", "RUNS[2]", "ENTR[1]", "entry:1"],
        when="load",
        status="unsupported",
        task="unknown",
        expected=expected,
    )
    frame = Frame(t, Part(6, 1, runs(row_unknown(0xEF, b"0123456789", 6))), None)
    side = Side(residual=rows(r, [1], 6))
    both = Collection(
        [Task("known", [plain]), Task("unknown", [Entry(t, 1, Side(), side, frame=frame)])], [frame]
    )
    s.broken(
        "088b-frame",
        "v-clusters",
        both,
        "A frame in an encoding that nobody knows.",
        where=["RUNS[0]", "FRAM[0]", "extent-FRAM[0]"],
        when="load",
        status="unsupported",
        task="unknown",
        expected=expected,
    )


def optional_rules(s: Set) -> None:
    text = canonical(META)
    for letter, raw, comment in (
        ("a-array", b"[" + text + b"]", "An array."),
        ("b-twice", with_key("x", b'{"c":2,"c":2}'), "A key twice."),
        ("c-nan", with_key("x", b"NaN"), "NaN."),
        ("d-infinity", with_key("x", b"-Infinity"), "Infinity."),
        ("e-mark", b"\xef\xbb\xbf" + text, "A byte order mark."),
        ("f-deep", with_key("x", b"[" * 16 + b"]" * 16), "Nested 17 deep."),
        ("g-utf8", with_key("x", b'"\xff"'), "Not UTF-8."),
        ("h-two", text * 2, "Two objects."),
        ("i-cut", text[:-1], "Half an object."),
        ("j-deepest", text[:-1] + b',"x":' + b"[" * 20000, "20,000 brackets."),
        ("k-nul", text + b"\0", "A NUL behind the object."),
        ("l-twice", with_key("method", b'{"name":"rmm"}'), "A key of the object itself twice."),
        ("m-number", with_key("x", b"1e999"), "A number that binary64 rounds to infinity."),
        ("n-number", with_key("x", b"-" + b"1" * 400), "An integer of 400 digits."),
        ("o-surrogate", with_key("x", b'"\\ud800"'), "Half of a surrogate pair."),
        ("p-surrogate", with_key("x", b'{"\\udc00\\ud800":0}'), "A pair the wrong way round."),
    ):
        s.broken(
            f"090{letter}",
            "v-small",
            small(),
            comment,
            meta(raw),
            ["content:meta", "section:meta"],
            "validate",
        )
    file = {"name": "a", "n_bytes": 1, "sha256": "0" * 64}
    for letter, value, comment in (
        ("a-producer", {"producer": {}}, "A producer that is no string."),
        ("b-configs", {"configs": {}}, "Configs that are no array."),
        ("c-index", {"tasks": {"alpha": {"config": -1}}}, "A negative index."),
        (
            "d-sha256",
            {"tasks": {"alpha": {"files": [file | {"sha256": "0"}]}}},
            "A sha256 of one digit.",
        ),
        ("e-bool", {"tasks": {"alpha": {"factor_bytes": True}}}, "true for a number."),
        ("f-error", {"tasks": {"alpha": {"error": {"mean": "0"}}}}, "A string for a number."),
        ("g-method", {"method": {}}, "A method without a name."),
        ("j-config", {"tasks": {"alpha": {"config": 1}}}, "An index as large as their number."),
        ("h-fraction", {"tasks": {"alpha": {"files": [file | {"n_bytes": 1.5}]}}}, "Half a byte."),
        ("k-fingerprint", {"base_model": {"fingerprint": "0a"}}, "A fingerprint that is a string."),
        (
            "l-digest",
            {"base_model": {"fingerprint": FINGERPRINT | {"digest": "0A"}}},
            "A digest in capitals.",
        ),
        (
            "m-target",
            {"base_model": {"fingerprint": FINGERPRINT | {"targets": {"a": ""}}}},
            "A target's digest of no digits.",
        ),
        (
            "p-line",
            {"base_model": {"fingerprint": FINGERPRINT | {"digest": "0a\n"}}},
            "A digest with a line feed behind it.",
        ),
        (
            "q-line",
            {"tasks": {"alpha": {"files": [file | {"sha256": "0" * 64 + "\n"}]}}},
            "A sha256 with a line feed behind it.",
        ),
        (
            "n-algorithm",
            {"base_model": {"fingerprint": {"digest": "0a", "targets": {}}}},
            "A fingerprint of no algorithm.",
        ),
        ("o-extraction", {"tasks": {"alpha": {"extraction": {"error": -1}}}}, "A negative error."),
    ):
        s.broken(
            f"091{letter}",
            "v-small",
            small(),
            comment,
            meta(canonical(META | value)),
            ["content:meta", "section:meta"],
            "validate",
        )
    rest = {key: value for key, value in META.items() if key != "tasks"}
    s.broken(
        "091i-missing",
        "v-small",
        small(),
        "No tasks.",
        meta(canonical(rest)),
        ["content:meta", "section:meta"],
        "validate",
    )

    def errors(*values: float) -> Callable[[Draft], None]:
        def edit(d: Draft) -> None:
            d.tables["erro"] = [{"error": value} for value in values]

        return edit

    s.broken(
        "092a-count",
        "v-small",
        small(),
        "Two errors and three entries.",
        errors(0.5, 0.5),
        ["content:erro", "section:erro"],
        "validate",
    )
    s.broken(
        "092b-negative",
        "v-small",
        small(),
        "A negative error.",
        errors(0.5, 0.5, -0.5),
        ["erro[2]", "content:erro"],
        "validate",
    )


def free_verdicts(s: Set) -> None:
    def several(d: Draft) -> None:
        section("STRS", crc=1)(d)
        section("FORM", crc=1)(d)
        slot(growth_limit=1)(d)

    s.free(
        "several", small(), "Three rules are broken: which one is named first is not said.", several
    )

    s.free(
        "major-2",
        small(),
        "Another major version and a wrong crc: unsupported or malformed.",
        lambda d: d.preamble.update(major=2, crc=1),
    )


def make() -> dict[str, bytes]:
    """Return every file of the set by its path."""
    s = Set()
    for part in (
        containers, encodings, numerics, frames, trellis, targets_and_names, privates, header_rules,
        index_rules, table_rules, frame_rules, task_rules, entry_rules, private_rules,
        extent_rules, payload_rules, trellis_rules, optional_rules, free_verdicts,
    ):  # fmt: skip
        part(s)
    order = ["valid", "invalid", "unsupported", "free"]
    entries = sorted(s.entries, key=lambda entry: (order.index(entry["verdict"]), entry["id"]))
    manifest = {"format": "1.0-draft", "vectors": entries}
    s.files["manifest.json"] = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    return s.files


def main(argv: list[str]) -> None:
    folder = Path(argv[1]) if len(argv) > 1 else Path(__file__).parent
    files = make()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for path in folder.glob("*/*"):
        if path.suffix in (".rmm", ".json") and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    n_bytes = sum(map(len, files.values()))
    print(f"{len(files)} files, {n_bytes} bytes")


if __name__ == "__main__":
    main(sys.argv)
