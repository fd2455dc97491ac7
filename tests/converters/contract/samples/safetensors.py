"""One plain safetensors file, read with the safetensors library and nothing of ours."""

from __future__ import annotations

import json

import ml_dtypes  # noqa: F401  # lets numpy read bfloat16
import numpy as np
from safetensors import safe_open

from rmmformat.converters.contract import Output, Provider


def read(out, task):
    with safe_open(out, framework="numpy") as file:
        about = json.loads(file.metadata()["rmmformat"])
        return {
            name: target["scale"]
            * (
                file.get_tensor(f"{name}.lora_B").astype(np.float64)
                @ file.get_tensor(f"{name}.lora_A").astype(np.float64)
            )
            for name, target in about["targets"].items()
        }


PROVIDER = Provider(
    "safetensors",
    output=Output("task.safetensors", read, frozenset({"peft/mixed", "peft/layers", "peft/plain"})),
)
