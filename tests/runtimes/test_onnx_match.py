"""Which weight a target is: names that match, names that do not, and names that may be several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from rmmformat.errors import NotFoundError, OptionError, RmmError, SourceError, UnsupportedError
from rmmformat.model import TargetKind, TargetShape
from rmmformat.runtimes import onnx as runtime

from .onnx_models import (
    N_IN,
    N_OUT,
    X2,
    Task,
    W,
    collection_of,
    delta,
    factors,
    model_of,
    node,
    run,
)

SQUARE = np.random.default_rng(3).standard_normal((N_IN, N_IN)).astype(np.float32) / 6


def chain(*products: tuple[str, str], last: bool = False) -> onnx.ModelProto:
    """Products one after another: (name of the weight, name of the node) of each."""
    nodes, value = [], "x"
    for number, (weight, name) in enumerate(products):
        result = "y" if number == len(products) - 1 else f"m{number}"
        nodes.append(node("MatMul", f"{value} {weight}", result, name))
        value = result
    return model_of(nodes, {weight: SQUARE for weight, _ in products})


def square_task(targets: Sequence[str], name: str = "t") -> Task:
    made = {target: factors(i, n_in=N_IN, n_out=N_IN) for i, target in enumerate(targets)}
    return Task(name, made)


def weights_of(model: onnx.ModelProto, targets: Sequence[str], folder: Path, **options: object
               ) -> dict[str, str]:  # fmt: skip
    onnx.save(model, folder / "base.onnx")
    collection = collection_of(folder, square_task(targets))
    report = runtime.prepare(
        folder / "base.onnx", folder / "out.onnx", collection=collection, force=True,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return {target: place.weight for target, place in report.targets.items()}


def test_equal_names_win_over_prefixed_ones(tmp_path: Path) -> None:
    model = chain(("q.weight", ""), ("a.q.weight", ""), ("a.b.q.weight", ""))
    assert weights_of(model, ["a.q"], tmp_path) == {"a.q": "a.q.weight"}


def test_prefixes_on_either_side(tmp_path: Path) -> None:
    model = chain(("encoder.layer.0.q.weight", ""), ("bert.encoder.layer.1.q.weight", ""))
    targets = ["bert.encoder.layer.0.q", "encoder.layer.1.q"]
    assert weights_of(model, targets, tmp_path) == {
        "bert.encoder.layer.0.q": "encoder.layer.0.q.weight",
        "encoder.layer.1.q": "bert.encoder.layer.1.q.weight",
    }


def test_one_short_name_is_not_taken_for_a_long_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="1 targets have no place"):
        weights_of(chain(("dense.weight", "")), ["encoder.layer.0.output.dense"], tmp_path)


def test_names_that_quantisers_and_exporters_append(tmp_path: Path) -> None:
    model = chain(
        ("model.layers.0.q.MatMul.weight", ""), ("onnx::MatMul_9", "/model/layers.1/q/MatMul"),
        ("model.layers.2.q.weight_transposed", ""), ("model.layers.3.q.weight_Transposed", ""),
        ("model.layers.4.q.weight_Q4", ""),
    )  # fmt: skip
    assert set(weights_of(model, [f"model.layers.{i}.q" for i in range(5)], tmp_path)) == {
        f"model.layers.{i}.q" for i in range(5)
    }


def test_several_candidates_are_an_error_that_lists_them(tmp_path: Path) -> None:
    model = chain(("a.q.weight", ""), ("b.q.weight", ""))
    with pytest.raises(SourceError, match=r"'q' may be any of the weights 'a.q.weight', 'b.q") as e:
        weights_of(model, ["q"], tmp_path)
    assert "--map" in str(e.value)
    assert weights_of(model, ["q"], tmp_path, names={"q": "b.q.weight"}) == {"q": "b.q.weight"}


def test_two_targets_for_one_weight_are_an_error(tmp_path: Path) -> None:
    model = chain(("layer.q.weight", ""), ("other.weight", ""))
    with pytest.raises(SourceError, match="are both MatMul node"):
        weights_of(model, ["a.layer.q", "b.layer.q"], tmp_path)
    names = {"b.layer.q": "other.weight"}
    assert weights_of(model, ["a.layer.q", "b.layer.q"], tmp_path, names=names) == {
        "a.layer.q": "layer.q.weight",
        "b.layer.q": "other.weight",
    }


def test_anonymous_weights_are_mapped_by_weight_or_node(tmp_path: Path) -> None:
    model = chain(("w1", "n1"), ("w2", "n2"))
    with pytest.raises(NotFoundError, match="--map"):
        weights_of(model, ["layer.a", "layer.b"], tmp_path)
    names = {"layer.a": "w2", "layer.b": "n1"}
    assert weights_of(model, ["layer.a", "layer.b"], tmp_path, names=names) == {
        "layer.a": "w2",
        "layer.b": "w1",
    }
    with pytest.raises(NotFoundError, match="'w3', which is no weight"):
        weights_of(model, ["layer.a"], tmp_path, names={"layer.a": "w3"})
    with pytest.raises(NotFoundError, match=r"mapped target 'layer\.z'"):
        weights_of(model, ["layer.a"], tmp_path, names={"layer.z": "w1"})


def test_what_is_left_out_is_listed_and_running_it_is_an_error(tmp_path: Path) -> None:
    model = chain(("layer.a.weight", ""))
    onnx.save(model, tmp_path / "base.onnx")
    collection = collection_of(
        tmp_path, square_task(["layer.a", "layer.b"]), square_task(["layer.a"], "u")
    )
    report = runtime.prepare(
        tmp_path / "base.onnx", tmp_path / "p.onnx", collection=collection, allow_unmatched=True
    )
    assert report.unmatched == ("layer.b",)
    session = runtime.Session(tmp_path / "p.onnx", collection)
    session.run("u", {"x": X2})
    with pytest.raises(NotFoundError, match=r"no inputs for target 'layer\.b'"):
        session.run("t", {"x": X2})
    runtime.Session(tmp_path / "p.onnx", collection, allow_unmatched=True).run("t", {"x": X2})


def test_two_modules_that_share_one_weight_stay_two(tmp_path: Path) -> None:
    """Exporters store equal weights once; the nodes still say which module is meant."""
    model = chain(("onnx::MatMul_1", "/layer.0/q/MatMul"), ("onnx::MatMul_1", "/layer.1/q/MatMul"))
    onnx.save(model, tmp_path / "base.onnx")
    f = factors(n_in=N_IN, n_out=N_IN)
    collection = collection_of(tmp_path, Task("t", {"layer.1.q": f}))
    session = runtime.Session(tmp_path / "base.onnx", collection)
    (got,) = session.run("t", {"x": X2})
    want = X2 @ SQUARE @ (SQUARE + delta(f))
    assert np.abs(got - want).max() < 1e-5
    with pytest.raises(UnsupportedError, match="is also that of the MatMul node"):
        runtime.merge(tmp_path / "base.onnx", collection, "t", tmp_path / "m.onnx")


def test_tied_weights_are_matched_by_kind(tmp_path: Path) -> None:
    """An embedding and a head with one table: a delta of the one is none of the other."""
    nodes = [
        node("Gather", "embed.weight x", "e", "/embed/Gather"),
        node("Transpose", "embed.weight", "t", perm=[1, 0]),
        node("MatMul", "e t", "y", "/head/MatMul"),
    ]
    table = np.random.default_rng(1).standard_normal((N_IN, N_OUT)).astype(np.float32)
    model = model_of(nodes, {"embed.weight": table}, x=(onnx.TensorProto.INT64, ["n"]))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    for side in ("n", "v"):
        model.graph.output[0].type.tensor_type.shape.dim.add(dim_param=side)
    onnx.save(model, tmp_path / "base.onnx")
    e, h = factors(1), factors(2, n_in=N_OUT, n_out=N_IN)
    shapes = {"embed": TargetShape(N_IN, N_OUT, TargetKind.EMBEDDING)}
    collection = collection_of(
        tmp_path, Task("both", {"embed": e, "head": h}, shapes), Task("one", {"embed": e}, shapes)
    )
    session = runtime.Session(tmp_path / "base.onnx", collection)
    ids = np.array([3, 0, 31])
    for task, head in (("both", table.T + delta(h)), ("one", table.T)):
        want = (table + delta(e))[ids] @ head
        assert np.abs(session.run(task, {"x": ids})[0] - want).max() < 1e-4


def test_another_model_is_refused_by_its_shapes(tmp_path: Path) -> None:
    onnx.save(model_of([node("MatMul", "x layer.a.weight", "y")], {"layer.a.weight": W}),
              tmp_path / "base.onnx")  # fmt: skip
    collection = collection_of(tmp_path, square_task(["layer.a"]))
    with pytest.raises(SourceError, match=r"32 inputs and 32 outputs, weight .* has 32 and 16"):
        runtime.prepare(tmp_path / "base.onnx", tmp_path / "p.onnx", collection=collection)
    assert not (tmp_path / "p.onnx").exists()


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"),
    [
        ("Attention", "x layer.a.weight b", {"num_heads": 2}, "Attention node .* no delta"),
        ("QAttention", "x layer.a.weight b s", {"num_heads": 2}, "QAttention node"),
        ("GemmFastGelu", "x layer.a.weight", {}, "GemmFastGelu node"),
        ("FusedMatMul", "x layer.a.weight", {"transBatchB": 1}, "transposes batches"),
    ],
)
def test_nodes_that_no_delta_fits_beside_are_refused_by_name(
    tmp_path: Path, op: str, inputs: str, attributes: dict[str, int], message: str
) -> None:
    made = node(op, inputs, "y", "n", domain="com.microsoft", **attributes)
    model = model_of([made], {"layer.a.weight": SQUARE, "b": SQUARE[0], "s": SQUARE[0, 0]})
    with pytest.raises(UnsupportedError, match=message):
        weights_of(model, ["layer.a"], tmp_path)


def test_targets_that_a_fused_attention_swallowed(tmp_path: Path) -> None:
    made = node("Attention", "x qkv b", "y", "Attention_0", domain="com.microsoft", num_heads=2)
    model = model_of([made], {"qkv": np.hstack([SQUARE] * 3), "b": np.ones(96, np.float32)})
    with pytest.raises(UnsupportedError, match="Attention node 'Attention_0' holds several"):
        weights_of(model, ["layer.0.query"], tmp_path)


def test_a_convolution_with_a_kernel_is_refused_and_merged(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4, 3, 3)).astype(np.float32)
    model = model_of([node("Conv", "x c.weight", "y", pads=[1, 1, 1, 1])], {"c.weight": weight},
                     x=(onnx.TensorProto.FLOAT, ["n", 4, 8, 8]))  # fmt: skip
    onnx.save(model, tmp_path / "base.onnx")
    f = factors(n_in=36, n_out=6)
    shape = TargetShape(36, 6, TargetKind.CONV, False, (3, 3))
    collection = collection_of(tmp_path, Task("t", {"c": f}, {"c": shape}))
    with pytest.raises(UnsupportedError, match="kernel 3 x 3"):
        runtime.prepare(tmp_path / "base.onnx", tmp_path / "p.onnx", collection=collection)
    runtime.merge(tmp_path / "base.onnx", collection, "t", tmp_path / "m.onnx")
    merged = onnx.numpy_helper.to_array(onnx.load(tmp_path / "m.onnx").graph.initializer[0])
    want = weight + (f.scale * f.B @ f.A).reshape(6, 4, 3, 3)
    assert np.abs(merged - want).max() < 1e-6


def test_patterns_name_targets_without_a_collection(tmp_path: Path) -> None:
    model = chain(
        ("onnx::MatMul_1", "/layer.0/q/MatMul"), ("layer.0.k.weight", ""), ("layer.1.q.weight", ""),
        ("layer.1.v.weight", ""),
    )  # fmt: skip
    onnx.save(model, tmp_path / "base.onnx")

    def targets(*patterns: str) -> set[str]:
        out = tmp_path / "p.onnx"
        report = runtime.prepare(tmp_path / "base.onnx", out, targets=patterns, force=True)
        return set(report.targets)

    assert targets("q") == {"layer.0.q", "layer.1.q"}
    assert targets("layer.1.*") == {"layer.1.q", "layer.1.v"}
    assert targets("layer.0.k", "v") == {"layer.0.k", "layer.1.v"}
    with pytest.raises(NotFoundError, match="nothing in the model matches target 'z'"):
        targets("q", "z")
    with pytest.raises(OptionError, match="one of the two"):
        runtime.prepare(tmp_path / "base.onnx", tmp_path / "q.onnx")


def test_files_that_are_no_models_or_prepared_already(tmp_path: Path) -> None:
    onnx.save(chain(("layer.a.weight", "")), tmp_path / "base.onnx")
    collection = collection_of(tmp_path, square_task(["layer.a"]))
    runtime.prepare(tmp_path / "base.onnx", tmp_path / "p.onnx", collection=collection)
    with pytest.raises(RmmError, match="inputs for factors already"):
        runtime.prepare(tmp_path / "p.onnx", tmp_path / "q.onnx", collection=collection)
    with pytest.raises(RmmError, match="exists already"):
        runtime.prepare(tmp_path / "base.onnx", tmp_path / "p.onnx", collection=collection)
    for name, data in (("text", b"# nothing\n" * 9), ("empty", b""), ("cut", None)):
        path = tmp_path / name
        whole = (tmp_path / "base.onnx").read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if data is None else data)
        with pytest.raises(SourceError, match="not an ONNX model"):
            runtime.prepare(path, tmp_path / "q.onnx", collection=collection)
        with pytest.raises(SourceError, match="not an ONNX model"):
            runtime.Session(path, collection)
    with pytest.raises(SourceError, match="No such file"):
        runtime.prepare(tmp_path / "none", tmp_path / "q.onnx", collection=collection)
    onnx.save(model_of([node("MatMul", "x w", "y")], {"w": SQUARE}, opset=6), tmp_path / "old")
    with pytest.raises(UnsupportedError, match="opset 6"):
        runtime.prepare(tmp_path / "old", tmp_path / "q.onnx", targets=["w"])
    assert not (tmp_path / "q.onnx").exists()
    assert run(tmp_path / "p.onnx", {"x": X2}).shape == (3, N_IN)
