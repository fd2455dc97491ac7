"""What a conversion holds does not grow with the number of adapters, but by what it will write."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rmmformat import threads
from rmmformat.merge import rmm
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert, open_sources

FEW, MANY = 8, 40
SIDE, RANK, TARGETS = 1536, 16, 2
#: Of both factors of one target of all the tasks that come on top, in float32.
MORE = (MANY - FEW) * 2 * RANK * SIDE * 4


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q"]}
    for task in range(MANY):
        path = folder / f"task-{task:02}"
        path.mkdir()
        tensors = {}
        for layer in range(TARGETS):
            key = f"base_model.model.layers.{layer}.q"
            for factor, shape in (("A", (RANK, SIDE)), ("B", (SIDE, RANK))):
                values = rng.standard_normal(shape, np.float32)
                tensors[f"{key}.lora_{factor}.weight"] = values
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
    return sorted(folder.iterdir())


def peak(adapters: list[Path], out: Path, options: dict[str, Any]) -> int:
    """Most bytes of numpy and Python objects at any time of a conversion."""
    sources = open_sources(adapters)
    tracemalloc.start()
    try:
        convert(sources, out, choose_method(**options), overwrite=True)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"components": 2}, (MANY - FEW) * 2 * 2 * SIDE * 4),  # coefficients of both factors
        ({"exact": True}, 0),
        ({"encoding": "f16"}, 0),
    ],
)
def test_memory_does_not_grow_with_the_number_of_adapters(
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    written: int,
) -> None:
    monkeypatch.setattr(threads, "n_threads", lambda: 2)
    # As many blocks as of larger adapters.
    monkeypatch.setattr(rmm, "_STACK_VALUES", 1 << 14)
    monkeypatch.setattr(rmm, "_STACK_POSITIONS", 8)
    out = tmp_path / "x.rmm"
    peak(adapters[:FEW], out, options)  # what is imported and cached at the first time
    few, many = (peak(adapters[:n], out, options) for n in (FEW, MANY))
    # Names, places and reports of a task take some kilobytes.
    assert many - few < written + (MANY - FEW) * 8192 + MORE // 16
    assert written + MORE // 16 < MORE / 4
