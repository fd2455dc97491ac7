"""ONNX Runtime's adapter files, read with ONNX Runtime itself."""

from __future__ import annotations

import numpy as np
import onnxruntime

from rmmformat.converters.contract import Output, Provider


def read(out, task):
    adapter = onnxruntime.AdapterFormat.read_adapter(str(out))
    parameters = {name: value.numpy() for name, value in adapter.get_parameters().items()}
    deltas = {}
    for target in task.targets:
        a, b, scale = (
            parameters[f"{target}.lora_{part}"].astype(np.float64) for part in ("A", "B", "scale")
        )
        deltas[target] = float(scale[0]) * (b @ a)
    return deltas


PROVIDER = Provider(
    "onnx",
    output=Output(
        "task.onnx_adapter", read, frozenset({"peft/plain", "peft/mixed", "peft/layers"})
    ),
)
