"""Hostile collections as what is to grow: bounded memory, one clear error, nothing changed."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat.errors import UnsupportedError
from rmmformat.format.reader import read_index
from rmmformat.format.restore import entry_factors
from rmmformat.model import Factors

from ..product.conftest import MemoryTask

sys.path.insert(0, str(Path(__file__).parents[2] / "spec" / "vectors"))

import drafts
from drafts import Collection, Draft, Entry, Frame, Part, Side, Target, Task, Trellis, runs, zero

MIB = 1 << 20
META = {
    "producer": "test",
    "base_model": {"id": "tiny/base"},
    "configs": [],
    "tasks": {"first": {"factor_bytes": 1}},
}


def merged(n_in: int, basis_rows: int) -> bytes:
    """A collection that says it was merged, on a basis of rows of zeros."""
    target = Target("query", 8, 4)
    frame = Frame(
        target, Part(8, 1, runs(zero(8)), runs(zero(8))), Part(4, 1, runs(zero(4)), runs(zero(4)))
    )
    a, b = (Side(coefficients=runs(drafts.row_f32([1.0]))) for _ in range(2))
    method = {"name": "rmm", "components": 1, "grouping": "factor", "align": "none"}
    meta = json.dumps(META | {"method": method}).encode()
    entry = Entry(target, 1, a, b, frame=frame)
    draft = Draft(Collection([Task("first", [entry])], [frame], meta=meta))
    draft.tables["TARG"][0]["n_in"] = n_in
    part = draft.tables["FRAM"][0]
    part |= {"group_a": n_in}
    if basis_rows > 1:
        first = len(draft.tables["RUNS"])
        draft.tables["RUNS"].append({"count": basis_rows, "encoding": 0})
        draft.tables["LAYO"].append({"first_run": first, "n_runs": 1, "n_rows": basis_rows})
        layout = len(draft.tables["LAYO"]) - 1
        part |= {"rank_a": basis_rows, "mean_a": layout, "basis_a": layout}
    return draft.pack()


def joining(n_in: int) -> MemoryTask:
    generator = np.random.default_rng(0)
    A = generator.standard_normal((1, n_in)).astype(np.float32)
    B = generator.standard_normal((4, 1)).astype(np.float32)
    return MemoryTask("second", {"query": Factors(A, B, 1.0)})


def test_a_frame_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    path.write_bytes(merged(2**17, 2**20))
    before = path.read_bytes()
    assert rmm.validate(path).ok
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedError, match=r"frame of 'query' has .* values"):
            rmm.add(path, [joining(2**17)])
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert path.read_bytes() == before


def test_its_twin_grows(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    path.write_bytes(merged(4096, 1))
    assert rmm.add(path, [joining(4096)]).projected
    assert rmm.validate(path).ok


def test_rows_of_zeros_of_a_trellis_run_take_no_memory() -> None:
    n, rows = 4096, 20_000
    target = Target("query", n, 4)
    run = Trellis([(1, [0] * n), *[None] * rows], n)
    mean = drafts.Row(0x20, run.raw(), run.values()[0])
    part = Part(n, 1 + rows, [[mean, *[zero(n)] * rows]], None)
    frame = Frame(target, part, None)
    entry = Entry(target, 1, Side(), Side(), frame=frame)
    data = Draft(Collection([Task("task", [entry])], [frame])).pack()
    assert len(data) < 24_000
    tracemalloc.start()
    try:
        A, _ = entry_factors(read_index(data), 0, 0)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    with rmm.open(data) as collection:
        assert np.array_equal(collection.load("task")["query"].A, A)
    assert np.array_equal(A[0], np.array(run.values()[0], np.float32))
