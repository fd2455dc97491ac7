"""Small adapters for the tests of the converters, built anew for each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rmmformat.converters import Options, get_importer
from rmmformat.model import LedgerLine, SourceTask

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PREFIX = "base_model.model."
DEMO = Path(__file__).parents[1] / "data" / "demo-adapters"


class Kit:
    """Builds adapter folders below one temporary folder, and reads them back."""

    prefix = PREFIX
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def pair(
        module: str,
        *,
        rank: int = 2,
        n_in: int = 3,
        n_out: int = 5,
        dtype: Any = np.float32,
        prefix: str = PREFIX,
        adapter: str = "",
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Factors of one linear module, as PEFT names them."""
        random = np.random.default_rng([seed, *module.encode()])
        middle = f".{adapter}" if adapter else ""
        return {
            f"{prefix}{module}.lora_A{middle}.weight": random.standard_normal((rank, n_in)).astype(
                dtype
            ),
            f"{prefix}{module}.lora_B{middle}.weight": random.standard_normal((n_out, rank)).astype(
                dtype
            ),
        }

    def adapter(
        self,
        tensors: Mapping[str, np.ndarray],
        config: dict[str, Any] | None = None,
        *,
        name: str = "task",
        **fields: Any,
    ) -> Path:
        """Write an adapter folder; ``fields`` change a plain config of rank 2 and alpha 4."""
        folder = self.root / name
        folder.mkdir(parents=True)
        if config is None:
            config = {
                "peft_type": "LORA",
                "base_model_name_or_path": "org/base",
                "r": 2,
                "lora_alpha": 4,
                "target_modules": ["q"],
            }
        (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        return folder

    @staticmethod
    def open(folder: Path, **options: Any) -> SourceTask:
        """Open a folder that holds one adapter."""
        (task,) = get_importer("peft").open(folder, options=Options(**options))
        return task

    @staticmethod
    def delta(task: SourceTask, target: str) -> np.ndarray:
        """The delta of a target in float64, (n_out, n_in)."""
        factors = task.factors(target)
        return factors.scale * (factors.B.astype(np.float64) @ factors.A.astype(np.float64))

    @staticmethod
    def notices(task: SourceTask) -> list[LedgerLine]:
        """The ledger lines that a person should see."""
        return [line for line in task.ledger if line.detail.startswith("notice:")]


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


@pytest.fixture
def demo() -> Path:
    assert DEMO.is_dir(), "the demo adapters are part of the repository"
    return DEMO
