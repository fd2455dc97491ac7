"""ONNX files: adapters, models with data beside them, and the command line that writes both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from rmmformat.cli.main import main
from rmmformat.converters.base import Options
from rmmformat.converters.registry import get_exporter
from rmmformat.errors import (
    LossyConversionError,
    NotFoundError,
    OptionError,
    RmmError,
    SourceError,
)
from rmmformat.runtimes import onnx as runtime

from .onnx_models import (
    N_IN,
    N_OUT,
    W2,
    X2,
    Task,
    W,
    collection_of,
    delta,
    factors,
    head_task,
    network,
    run,
    with_adapter,
)

# --- adapter files --------------------------------------------------------------------------------


def test_an_export_is_checked_against_the_prepared_model(
    base: Path, headed: Path, tmp_path: Path
) -> None:
    task, _ = head_task("five", 5)
    collection = collection_of(tmp_path, task)
    source = collection.source("five")
    exporter = get_exporter("onnx")
    out = tmp_path / "five.onnx_adapter"
    prepared = tmp_path / "prepared.onnx"
    runtime.prepare(headed, prepared, collection=collection)
    half = tmp_path / "half.onnx"
    runtime.prepare(headed, half, collection=collection, dtype="f16")
    elsewhere = tmp_path / "elsewhere.onnx"
    runtime.prepare(base, elsewhere, targets=["second"])
    bare = tmp_path / "bare.onnx"
    runtime.prepare(base, bare, targets=["first"])
    cases = [
        (Options(base=base), OptionError, "no inputs for factors"),
        (Options(base=prepared, dtype="f16"), OptionError, "not what the model takes, 'f32'"),
        (Options(base=elsewhere), NotFoundError, "no inputs for target 'first'"),
        (Options(base=elsewhere, names={"first": "second"}), SourceError, r"sides \(32, 16\)"),
        (Options(base=bare), LossyConversionError, r"takes no module 'head\.bias'"),
        (Options(base=tmp_path / "none.onnx"), SourceError, "No such file"),
        (Options(dtype="f64"), OptionError, "'f64' is not one of"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            exporter.export(source, out, options=options)
        assert not out.exists()
    lines = exporter.export(source, out, options=Options(base=bare, drop_private=True))
    assert [line.item for line in lines if "dropped" in line.detail] == [
        "tensor head.bias",
        "tensor head.weight",
    ]
    with pytest.raises(RmmError, match="exists already"):
        exporter.export(source, out)
    # Each of these is what the runtime would have found only when running, and names.
    exporter.export(source, out, force=True)
    with pytest.raises(Exception, match="head"):
        with_adapter(bare, out, {"x": X2})
    with pytest.raises(Exception, match=r"[Uu]nexpected input data type"):
        with_adapter(half, out, {"x": X2})


def test_adapter_files_are_the_same_each_time_and_hold_what_they_say(
    base: Path, tmp_path: Path
) -> None:
    f = factors(scale=0.75)
    collection = collection_of(tmp_path, Task("t", {"first": f}))
    for dtype, kind in (("f32", np.float32), ("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        paths = [tmp_path / f"{dtype}{i}.onnx_adapter" for i in range(2)]
        for path in paths:
            get_exporter("onnx").export(
                collection.source("t"), path, options=Options(dtype=dtype, names={"first": "n"})
            )
        assert paths[0].read_bytes() == paths[1].read_bytes()
        read = onnxruntime.AdapterFormat.read_adapter(str(paths[0])).get_parameters()
        assert set(read) == {"n.lora_A", "n.lora_B", "n.lora_scale"}
        assert read["n.lora_A"].shape() == [4, N_IN]
        assert read["n.lora_B"].shape() == [N_OUT, 4]
        if dtype != "bf16":
            assert read["n.lora_A"].numpy().tobytes() == f.A.astype(kind).tobytes()
            assert read["n.lora_scale"].numpy().tolist() == [0.75]


# --- external data --------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """The network with its weights in a file beside it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    path = folder / "base.onnx"
    onnx.save(network(head=True), path, save_as_external_data=True, location="base.data",
              size_threshold=256)  # fmt: skip
    assert (folder / "base.data").stat().st_size >= W.nbytes
    return path


def test_external_data_is_shared_in_one_folder_and_copied_to_another(
    outside: Path, tmp_path: Path
) -> None:
    f = factors()
    collection = collection_of(tmp_path, Task("t", {"first": f}))
    before = (outside.parent / "base.data").read_bytes()
    want = run(network(head=True), {"x": X2})
    here, there = outside.parent / "p.onnx", tmp_path / "there" / "p.onnx"
    for out in (here, there):
        runtime.prepare(outside, out, collection=collection)
        assert out.stat().st_size < 8000
        assert run(out, {"x": X2}).tobytes() == want.tobytes()
    assert sorted(p.name for p in outside.parent.iterdir()) == ["base.data", "base.onnx", "p.onnx"]
    assert (there.parent / "base.data").read_bytes() == before
    with pytest.raises(RmmError, match="exists already"):
        runtime.prepare(outside, there.parent / "q.onnx", collection=collection)
    assert sorted(p.name for p in there.parent.iterdir()) == ["base.data", "p.onnx"]
    # Not loaded by us at all: a session in memory finds the file by itself.
    session = runtime.Session(outside, collection)
    assert session.run(None, {"x": X2})[0].tobytes() == want.tobytes()
    assert np.abs(session.run("t", {"x": X2})[0] - want).max() > 0.05


def test_merging_changes_a_copy_of_external_data(outside: Path, tmp_path: Path) -> None:
    f = factors()
    collection = collection_of(tmp_path, Task("t", {"first": f}))
    before = (outside.parent / "base.data").read_bytes()
    out = outside.parent / "merged.onnx"
    runtime.merge(outside, collection, "t", out)
    assert (outside.parent / "base.data").read_bytes() == before
    merged = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert np.abs(merged["first.weight"] - (W + delta(f))).max() < 1e-6
    assert merged["second.weight"].tobytes() == W2.tobytes()
    changed = (outside.parent / "merged.onnx.data").read_bytes()
    assert sum(a != b for a, b in zip(before, changed, strict=True)) <= W.nbytes
    prepared = runtime.Session(outside, collection)
    assert np.abs(run(out, {"x": X2}) - prepared.run("t", {"x": X2})[0]).max() < 1e-5


def test_external_data_that_is_gone_cut_short_or_elsewhere(outside: Path, tmp_path: Path) -> None:
    collection = collection_of(tmp_path, Task("t", {"first": factors()}))
    out = outside.parent / "out.onnx"
    data = outside.parent / "base.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    with pytest.raises(RmmError):
        runtime.merge(outside, collection, "t", out)
    data.unlink()
    with pytest.raises(SourceError, match=r"in 'base\.data', which is not there"):
        runtime.prepare(outside, out, collection=collection)
    (tmp_path / "base.data").write_bytes(whole)
    model = onnx.load(outside, load_external_data=False)
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                item.value = "../base.data"
    outside.write_bytes(model.SerializeToString())
    for act in (
        lambda: runtime.prepare(outside, out, collection=collection),
        lambda: runtime.merge(outside, collection, "t", out),
        lambda: runtime.Session(outside, collection),
    ):
        with pytest.raises(SourceError, match="not in the model's folder"):
            act()
    assert sorted(p.name for p in outside.parent.iterdir()) == ["base.onnx"]


# --- command line ---------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_line(headed: Path, tmp_path: Path) -> None:
    made = [head_task("two", 2), head_task("five", 5)]
    file = Path(collection_of(tmp_path, *(task for task, _ in made)).path)
    prepared, adapter, merged = (tmp_path / name for name in ("p.onnx", "f.onnx_adapter", "m.onnx"))
    result = invoke("onnx", "prepare", headed, "--collection", file, "-o", prepared)
    assert result.exit_code == 0, result.output
    assert "first.weight" in result.output
    result = invoke("export", file, "five", "--to", "onnx", "--base", prepared, "-o", adapter)
    assert result.exit_code == 0, result.output
    result = invoke("onnx", "merge", headed, file, "five", "-o", merged)
    assert result.exit_code == 0, result.output
    for got in (with_adapter(prepared, adapter, {"x": X2}), run(merged, {"x": X2})):
        assert np.abs(got - made[1][1]).max() < 1e-4
    result = invoke("onnx", "prepare", headed, "--targets", "first,second", "-o", prepared,
                    "--force", "--json")  # fmt: skip
    report = json.loads(result.output)
    assert report["targets"]["second"]["weight"] == "second.weight"
    assert report["targets"]["second"]["n_in"] == N_OUT
    result = invoke("onnx", "merge", headed, file, "five", "-o", merged, "--force", "--json")
    assert json.loads(result.output)["weights"] == {"first": "first.weight"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("prepare", "headed.onnx"), 2, "one of the two"),
        (("prepare", "headed.onnx", "--targets", "third"), 1, "nothing in the model matches"),
        (("prepare", "none.onnx", "--targets", "first"), 3, "cannot read the file"),
        (("prepare", "tasks.rmm", "--targets", "first"), 3, "not an ONNX model"),
        (("prepare", "headed.onnx", "--targets", "first", "--map", "first"), 2, "TARGET=NAME"),
        (("merge", "headed.onnx", "tasks.rmm", "six"), 1, "no task is called 'six'"),
        (("merge", "headed.onnx", "tasks.rmm", "five", "--map", "first=third"), 1, "mapped to"),
    ],
)
def test_the_command_line_says_what_is_wrong_and_writes_nothing(
    headed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    code: int, message: str,
) -> None:  # fmt: skip
    collection_of(tmp_path, head_task("five", 5)[0])
    monkeypatch.chdir(tmp_path)
    result = invoke("onnx", *arguments, "-o", "out.onnx")
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["headed.onnx", "tasks.rmm"]


def test_a_full_disk_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(RmmError, match="No space left"):
        runtime.prepare(base, tmp_path / "out.onnx", targets=["first"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.onnx"]
