"""A model with a place for every target of the demo adapters and a head: not a real encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write(path: Path) -> None:
    """Twelve projections of 384 x 384 in a chain, called as in the encoder, and a classifier."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer in range(6):
        for part in ("query", "value"):
            name = f"bert.encoder.layer.{layer}.attention.self.{part}"
            values = (rng.standard_normal((384, 384)) / 20).astype(np.float32)
            weights.append(numpy_helper.from_array(values, f"{name}.weight"))
            nodes.append(
                helper.make_node("Gemm", [last, f"{name}.weight"], [f"{name}.out"], transB=1)
            )
            last = f"{name}.out"
    weights.append(numpy_helper.from_array(np.zeros((2, 384), np.float32), "classifier.weight"))
    weights.append(numpy_helper.from_array(np.zeros(2, np.float32), "classifier.bias"))
    nodes.append(
        helper.make_node(
            "Gemm", [last, "classifier.weight", "classifier.bias"], ["logits"], transB=1
        )
    )
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 384])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        weights,
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
