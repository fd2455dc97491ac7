"""Write ``example.md``, a complete file byte by byte: ``python make_example.py``.

The file is the vector ``v-tiny``.  Every byte must be described once, or this fails.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "vectors"))

from drafts import Draft, expect, factor  # noqa: E402
from make_vectors import tiny  # noqa: E402

Note = tuple[int, bytes, str]


def payload_notes(draft: Draft, data: bytes) -> list[Note]:
    """Describe frame and entry, part by part (7.2)."""

    def notes(start: int, parts: list[tuple[int, str]]) -> list[Note]:
        out = []
        for n_bytes, text in parts:
            out.append((start, data[start : start + n_bytes], text))
            start += n_bytes
        return out

    frame, entry = draft.tables["FRAM"][0]["offset"], draft.entry_offsets()[0]
    return notes(
        frame,
        [
            (16, "frame 0: mean of A, one row of f16: 0.5, −0.25, 1, 0, 2, −1, 0.125, 3"),
            (2, "frame 0: basis of A, one row of q4_0: d = 0.25"),
            (16, "frame 0: codes 0, 15, 8, 7, 9, 4, 12, 1 in the low halves, then zeros"),
        ],
    ) + notes(
        entry,
        [
            (8, "entry 0: coefficients of A, one row of f32: 1.5 for positions 0–3, −2 for 4–7"),
            (2, "entry 0: residual of A, one row of q1: d = 0.0625"),
            (4, "entry 0: codes 1, 0, 0, 1, 1, 1, 0, 1 from bit 0 up, and zeros behind the row"),
            (12, "entry 0: residual of B, one row of f16: 1, 2, 3, −4, −5, 6"),
        ],
    )


def content_notes(draft: Draft, data: bytes) -> list[Note]:
    """Describe what is not in records: the strings."""
    out, start = [], draft.find("content:STRS")[0]
    for i, text in enumerate(draft.strings):
        raw = data[start : start + len(text) + 1]
        out.append((start, raw, f"STRS: string {i}, {text.decode()!r}, and its NUL"))
        start += len(raw)
    return out


def complete(data: bytes, notes: list[Note]) -> list[Note]:
    """Fill the gaps, which must be zero, and check that nothing is described twice."""
    out, position = [], 0
    for at, raw, text in sorted(notes):
        assert at >= position, f"{at} is described twice"
        if at > position:
            gap = data[position:at]
            assert not any(gap), f"{position} to {at} is not described"
            reserved = "reserved, zero" if position < 640 else "padding, zero"
            out.append((position, gap, reserved))
        out.append((at, raw, text))
        position = at + len(raw)
    assert position == len(data)
    return out


def table(notes: list[Note]) -> str:
    lines = ["| offset | bytes | meaning |", "| --- | --- | --- |"]
    for at, raw, text in notes:
        shown = raw.hex(" ") if any(raw) or len(raw) <= 8 else f"00 × {len(raw)}"
        lines.append(f"| {at} | `{shown}` | {text} |")
    return "\n".join(lines)


def make() -> str:
    collection = tiny()
    draft = Draft(collection)
    notes: list[Note] = []
    data = draft.pack(notes)
    notes = complete(data, notes + payload_notes(draft, data) + content_notes(draft, data))
    index = draft.index_offset
    entry = collection.tasks[0].entries[0]
    assert entry.frame is not None
    row = factor(entry, entry.a, entry.frame.a, 8)[0]
    values = [struct.unpack("<f", raw)[0] for raw in row]
    first = f"0.5 + 1.5 · (0.25 · (0 − 8)) + 0.0625 · (2 · 1 − 1) = {values[0]:g}"
    shapes = expect(collection)["tasks"]["demo"]["entries"][0]
    parts = [
        ("Header", "Preamble, slot 0 in force, slot 1 empty.", [n for n in notes if n[0] < 640]),
        (
            "Extents",
            "The frame of target `q` (a mean and one basis vector for A, nothing for B), and the "
            "run of task `demo`, which is one entry. Each starts at a multiple of 8.",
            [n for n in notes if 640 <= n[0] < index],
        ),
        (
            "Index",
            f"The section table, {len(draft.table)} records of 40 bytes, and the sections. Those "
            "without records (`DIMS`, `PRIV`, `BLOB`, `erro`, `free`, `meta`) are left out.",
            [n for n in notes if n[0] >= index],
        ),
    ]
    text = [
        "# A worked example",
        "",
        f"A complete file of {len(data)} bytes, the vector `v-tiny`: one task, `demo`, with one "
        f"entry at the target `q` (8 in, 6 out), rank 1, scale {entry.scale:g}. This page is made "
        "by `make_example.py`.",
    ]
    for title, words, part in parts:
        text += ["", f"## {title}", "", words, "", table(part)]
    text += [
        "",
        "## Values",
        "",
        f"A is {shapes['A']['shape'][0]} × {shapes['A']['shape'][1]}. Its group is 4, so positions "
        "0–3 take the first coefficient and 4–7 the second:",
        "",
        f"    A[0][0] = {first}",
        f"    A = {', '.join(f'{x:g}' for x in values)}",
        "",
        f"B is {shapes['B']['shape'][0]} × {shapes['B']['shape'][1]}, its residual alone: "
        "1, 2, 3, −4, −5, 6.",
        "",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    (HERE / "example.md").write_text(make(), encoding="utf-8")
