"""What inputs for factors cost an ONNX graph, and which way round they should lie.

    python benchmarks/onnx_graph.py [--rounds 200] [--width 768] [--targets 24] [--rank 16]

A chain of products of BERT-base width, every one a target, run on one row (a token being generated)
and on 128 (a text), on one thread.  "as stored" are the factors as a collection reconstructs them,
A (rank, n_in) and B (n_out, rank), transposed in the graph; "turned" is the same graph without the
transpositions, for A (n_in, rank) and B (rank, n_out), which somebody would have to turn at each
switch.  Medians of the processor's time, all contenders in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from rmmformat.runtimes.onnx import prepare


def chain(path: Path, width: int, n: int) -> Path:
    """A base model of `n` products of (width, width)."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(n):
        value = (rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(value, f"l{i}.weight"))
        nodes.append(helper.make_node("MatMul", [last, f"l{i}.weight"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]))
        last = f"t{i}"
    sides = ["batch", "words", width]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, sides)],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def turned(prepared: Path, path: Path) -> Path:
    """The prepared graph for factors that are transposed already."""
    model = onnx.load(prepared)
    gone = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Transpose"}
    kept = [n for n in model.graph.node if n.op_type != "Transpose"]
    for node in kept:
        node.input[:] = [gone.get(name, name) for name in node.input]
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for value in (*model.graph.input, *model.graph.initializer):
        if value.name.endswith((".lora_A", ".lora_B")):
            if isinstance(value, TensorProto):
                value.dims[:] = value.dims[::-1]
            else:
                sides = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
                value.CopyFrom(helper.make_tensor_value_info(value.name, 1, sides[::-1]))
    onnx.save(model, path)
    return path


def bound(path: Path, feeds: dict[str, np.ndarray], basic: bool = False) -> Callable[[], object]:
    """A run with everything bound."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if basic:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)

    def run() -> object:
        assert values  # which have to outlive the binding
        binding.bind_output(session.get_outputs()[0].name)
        session.run_with_iobinding(binding)
        result = binding.copy_outputs_to_cpu()
        binding.clear_binding_outputs()
        return result

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--targets", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    factors: dict[str, np.ndarray] = {}
    for i in range(options.targets):
        factors[f"l{i}.lora_A"] = rng.standard_normal((options.rank, options.width)) / 30
        factors[f"l{i}.lora_B"] = rng.standard_normal((options.width, options.rank)) / 30
        factors[f"l{i}.lora_scale"] = np.array([2.0])
    factors = {name: value.astype(np.float32) for name, value in factors.items()}
    other = {name: np.ascontiguousarray(value.T) for name, value in factors.items()}
    print(f"onnxruntime {ort.__version__}, {options.targets} products of {options.width}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = chain(root / "base.onnx", options.width, options.targets)
        prepare(base, root / "prepared.onnx", targets=["l*"])
        turn = turned(root / "prepared.onnx", root / "turned.onnx")
        for words in (1, 128):
            x = {"x": rng.standard_normal((1, words, options.width)).astype(np.float32)}
            runs = {
                "base model": bound(base, x),
                "prepared, no task": bound(root / "prepared.onnx", x),
                "prepared, a task, as stored": bound(root / "prepared.onnx", {**x, **factors}),
                "the same, not fused": bound(root / "prepared.onnx", {**x, **factors}, basic=True),
                "prepared, a task, turned": bound(turn, {**x, **other}),
            }
            want = runs["prepared, a task, as stored"]()[0]  # type: ignore[index]
            assert np.allclose(runs["prepared, a task, turned"]()[0], want, atol=1e-4)  # type: ignore[index]
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds if words == 1 else options.rounds // 4):
                for name, run in runs.items():
                    start = time.process_time()
                    run()
                    times[name].append(time.process_time() - start)
            first = statistics.median(times["base model"])
            print(f"\n{words} rows{'':26}CPU ms    of the base")
            for name, found in times.items():
                median = statistics.median(found)
                print(f"  {name:30}{1e3 * median:8.3f}{100 * median / first:12.1f} %")
        start = time.process_time()
        for _ in range(20):
            for value in factors.values():
                np.ascontiguousarray(value.T)
        print(f"\nturning all factors: {1e3 * (time.process_time() - start) / 20:.3f} ms a switch")


if __name__ == "__main__":
    main()
