"""The figures that eight real adapters give, trained apart on eight tasks (rank 16, 12 targets)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from rmmformat.merge import (
    Summary,
    align,
    merge,
    reconstruct,
    relative_error,
    storage_fraction,
    summarize,
    truncate_rank,
)
from rmmformat.merge.gauge import Method
from rmmformat.merge.rmm import Grouping

ADAPTERS = Path(__file__).parents[1] / "data" / "demo-adapters"

Array = npt.NDArray[np.generic]
Delta = tuple[Array, Array, float]
Targets = dict[str, list[Delta]]


@pytest.fixture(scope="module")
def targets() -> Targets:
    """Target name to the eight tasks' (A, B, scale)."""
    found: Targets = {}
    for folder in sorted(path.parent for path in ADAPTERS.glob("*/adapter_config.json")):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in sorted(tensors):
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                delta = tensors[name], tensors[f"{stem}.lora_B.weight"]
                found.setdefault(stem, []).append((*delta, config["lora_alpha"] / config["r"]))
    assert [len(deltas) for deltas in found.values()] == [8] * 12
    return found


def measure(targets: Targets, p: int, grouping: Grouping, method: Method = "none") -> Summary:
    """Relative error in per cent over 8 tasks x 12 targets, after merging both factors."""
    errors = []
    for deltas in targets.values():
        aligned = align([(A, B) for A, B, _ in deltas], method)
        down, coefs_a = merge(np.stack([A for A, _ in aligned]), p, grouping)
        up, coefs_b = merge(np.stack([B.T for _, B in aligned]), p, grouping)
        for (A, B, scale), a, b in zip(deltas, coefs_a, coefs_b, strict=True):
            rebuilt = reconstruct(down, a), reconstruct(up, b).T
            errors.append(100 * relative_error(A, B, scale, *rebuilt, scale))
    return summarize(errors)


@pytest.mark.parametrize(
    ("p", "mean", "median", "largest"),
    [
        (1, 82.55, 81.64, 97.65),
        (3, 48.78, 44.71, 80.36),
        (5, 23.30, 20.80, 48.80),
    ],
)
def test_published_method(
    targets: Targets, p: int, mean: float, median: float, largest: float
) -> None:
    got = measure(targets, p, "position")
    assert (got.mean, got.median, got.max) == pytest.approx((mean, median, largest), abs=0.05)


@pytest.mark.parametrize("grouping", ["position", "factor", 37])
def test_seven_components_give_eight_tasks_back(targets: Targets, grouping: Grouping) -> None:
    assert measure(targets, 7, grouping).max < 2e-5  # per cent


def test_error_falls_with_every_component(targets: Targets) -> None:
    means = [measure(targets, p, "position").mean for p in range(8)]
    assert means == sorted(means, reverse=True)
    assert storage_fraction(8, 16, 3) == 0.6875


@pytest.mark.parametrize(
    ("method", "mean"),
    [
        ("svd", 22.5),
        ("procrustes", 25.9),
    ],
)
def test_a_common_gauge_helps(targets: Targets, method: Method, mean: float) -> None:
    assert measure(targets, 3, "position", method).mean == pytest.approx(mean, abs=0.2)


def test_factor_grouping(targets: Targets) -> None:
    assert measure(targets, 3, "factor").mean == pytest.approx(68.20, abs=0.05)


def test_rank_truncation(targets: Targets) -> None:
    errors = [
        100 * relative_error(A, B, scale, *truncate_rank(A, B, 8), scale)
        for deltas in targets.values()
        for A, B, scale in deltas
    ]
    assert summarize(errors).mean == pytest.approx(11.31, abs=0.05)
