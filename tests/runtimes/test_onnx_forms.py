"""Inputs for factors at every way of multiplying by a weight, on small graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rmmformat.errors import UnsupportedError
from rmmformat.runtimes import onnx as runtime

from .onnx_models import FORMS, Form, Task, W, collection_of, delta, factors, run


def apply(form: Form, x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """What a delta (n_in, n_out) adds to the result, for forms that are products only."""
    if form.kind.name == "EMBEDDING":
        return d[x]
    if form.kind.name == "CONV":
        return np.einsum("bi...,io->bo...", x, d)
    return x @ d


@pytest.fixture(params=FORMS)
def form(request: Any) -> Form:
    return FORMS[request.param]


def test_a_task_adds_its_delta_and_none_changes_no_bit(form: Form, tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    onnx.save(form.build(W), base)
    f = factors()
    task = Task("t", {form.target: f}, {form.target: form.shape})
    collection = collection_of(tmp_path, task)
    report = runtime.prepare(base, tmp_path / "prepared.onnx", collection=collection)
    assert set(report.targets) == {form.target}
    session = runtime.Session(tmp_path / "prepared.onnx", collection)
    feeds = {"x": form.x}
    before = run(base, feeds)
    for fuse in (True, False):
        again = run(tmp_path / "prepared.onnx", feeds, fuse=fuse)
        assert again.tobytes() == run(base, feeds, fuse=fuse).tobytes()
    assert session.run(None, feeds)[0].tobytes() == before.tobytes()
    (got,) = session.run("t", feeds)
    if form.merges:
        want = run(form.build(W + delta(f)), feeds)
    else:
        want = before + apply(form, form.x, delta(f))
    moved = np.abs(want.astype(np.float64) - before).max()
    assert moved > 0.1
    assert np.abs(got.astype(np.float64) - want).max() < form.tolerance
    assert np.abs(got.astype(np.float64) - before).max() > 0.5 * moved


def test_prepared_graphs_pass_the_checker_and_are_the_same_each_time(
    form: Form, tmp_path: Path
) -> None:
    base = tmp_path / "base.onnx"
    onnx.save(form.build(W), base)
    for name in ("a.onnx", "b.onnx"):
        runtime.prepare(base, tmp_path / name, targets=[form.target])
        onnx.checker.check_model(str(tmp_path / name))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    before = onnx.load(base)
    after = onnx.load(tmp_path / "a.onnx")
    assert after.ir_version == max(before.ir_version, 4)  # the first with defaults of inputs
    assert list(after.opset_import) == list(before.opset_import)
    assert [value.name for value in after.graph.output] == ["y"]
    names = [value.name for value in after.graph.input]
    assert set(names) >= {f"{form.target}.lora_{part}" for part in ("A", "B", "scale")}


def test_merging_gives_the_weight_that_the_module_would_have(form: Form, tmp_path: Path) -> None:
    base, out = tmp_path / "base.onnx", tmp_path / "merged.onnx"
    onnx.save(form.build(W), base)
    f = factors()
    collection = collection_of(tmp_path, Task("t", {form.target: f}, {form.target: form.shape}))
    if not form.merges:
        with pytest.raises(UnsupportedError, match="quantised"):
            runtime.merge(base, collection, "t", out)
        assert not out.exists()
        return
    report = runtime.merge(base, collection, "t", out)
    assert set(report.weights) == {form.target}
    onnx.checker.check_model(str(out))
    feeds = {"x": form.x}
    got, want = run(out, feeds), run(form.build(W + delta(f)), feeds)
    assert np.abs(got.astype(np.float64) - want).max() < form.tolerance
    assert np.abs(got.astype(np.float64) - run(base, feeds)).max() > 0.1


def test_values_that_adding_nothing_would_change_stay_as_they_are(tmp_path: Path) -> None:
    """Minus zero plus zero is plus zero; infinities, NaN and subnormal numbers beside it."""
    table = W.copy()
    table[:, :5] = [-0.0, np.inf, -np.inf, np.nan, 1e-42]
    base = tmp_path / "base.onnx"
    onnx.save(FORMS["embedding"].build(table), base)
    runtime.prepare(base, tmp_path / "prepared.onnx", targets=["layer.fc"])
    feeds = {"x": np.array([[0, 31, -1, -32]])}
    got = run(tmp_path / "prepared.onnx", feeds)
    assert got.tobytes() == run(base, feeds).tobytes() == table[feeds["x"]].tobytes()
