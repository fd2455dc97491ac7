"""The writer refuses by rule what no reader would take, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat import _native
from rmmformat.errors import UnsupportedError
from rmmformat.format.catalog import TargetKey
from rmmformat.format.parts import EncodedArray, EntryData, FramePart
from rmmformat.format.validate import validate_bytes
from rmmformat.format.writer import Writer
from rmmformat.model import PrivateInfo, Role, TargetShape

METADATA: dict[str, Any] = {
    "base_model": {}, "configs": [], "method": {"name": "test"}, "producer": "test", "tasks": {},
}  # fmt: skip


def zeros(n: int) -> EncodedArray:
    return EncodedArray(((0, n),), (b"",))


def entry(**fields: Any) -> EntryData:
    absent = dict.fromkeys(("coefficients_a", "residual_a", "coefficients_b", "residual_b"))
    given = {"scale": 1.0, "rank": 1, "cluster": 0, "dtype_a": 1, "dtype_b": 1} | fields
    return EntryData(**(absent | given))


def refused(writer: Writer, path: Path) -> str | None:
    with pytest.raises(UnsupportedError) as caught:
        writer.finish(METADATA)
    assert "the format allows" in str(caught.value)
    assert list(path.parent.iterdir()) == []
    return caught.value.rule


def test_too_many_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    with Writer(path) as writer:
        writer.add_task("t")
        writer.add_entry("t", TargetKey("w", TargetShape(2**30, 1)), entry())
        assert refused(writer, path) == "RMM-062"


def test_too_much_work_is_refused(tmp_path: Path) -> None:
    path, p, n = tmp_path / "x.rmm", 2**16, 2**10
    key = TargetKey("w", TargetShape(n, n))
    with Writer(path) as writer:
        writer.add_task("t")
        part = FramePart(n, p, 1, None, zeros(p), row_mixing=True)
        cluster = writer.add_frame(key, part, None)
        writer.add_entry("t", key, entry(cluster=cluster, coefficients_a=zeros(p)))
        assert refused(writer, path) == "RMM-063"


def test_private_tensors_that_unfold_too_far_are_refused(tmp_path: Path) -> None:
    path, values = tmp_path / "x.rmm", np.zeros(2**20, np.uint8)
    info = PrivateInfo(Role.OTHER, values.dtype, values.shape)
    with Writer(path) as writer:
        writer.add_task("t")
        for number in range(1200):
            writer.add_private("t", f"{number:04d}", info, values)
        assert refused(writer, path) == "RMM-064"


def test_metadata_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    for value in (float("inf"), float("nan"), "\ud800"):
        with Writer(tmp_path / "x.rmm") as writer, pytest.raises(UnsupportedError) as caught:
            writer.finish(METADATA | {"x": value})
        assert caught.value.rule == "RMM-090"
    assert list(tmp_path.iterdir()) == []


def test_successive_runs_of_one_encoding_become_one(tmp_path: Path) -> None:
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    array = EncodedArray(
        ((1, 1), (1, 2), (0, 1), (0, 2)), (values[:1].tobytes(), values[1:].tobytes(), b"", b"")
    )
    assert array.layout == ((1, 3), (0, 3))
    path = tmp_path / "x.rmm"
    with Writer(path) as writer:
        writer.add_task("t")
        writer.add_entry("t", TargetKey("w", TargetShape(4, 2)), entry(rank=6, residual_a=array))
        writer.finish(METADATA)
    data = path.read_bytes()
    assert validate_bytes(data).ok
    assert _native.validate_bytes(data) == []
    with rmm.open(path) as collection:
        A = collection.load("t")["w"].A
    assert np.array_equal(A[:3], values)
    assert not A[3:].any()
