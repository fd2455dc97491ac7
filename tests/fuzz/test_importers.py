"""The quick part of fuzzing the importers: some hundred changed sources of each kind."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import mutations
import pytest

N = 300


@pytest.fixture(scope="module")
def importers():  # type: ignore[no-untyped-def]
    arguments, sys.argv = sys.argv, [*sys.argv, "--replay"]  # without atheris
    try:
        return importlib.import_module("importers")
    finally:
        sys.argv = arguments


KINDS = ["config", "safetensors", "index", "pickle", "kohya", "gguf", "checkpoint", "base"]


@pytest.mark.parametrize("name", KINDS)
def test_only_clear_errors_come_out(importers, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    case = importers.CASES[name]
    if case.format not in importers.IMPORTERS:
        pytest.skip(f"{case.format} cannot be read here")
    if name == "pickle":
        pytest.importorskip("torch")
    run = importers.Run(case, tmp_path)
    seeds = case.seeds()
    assert {run.one(data) for data in seeds} >= {"read"}
    source = random.Random(name)  # noqa: S311
    bytewise = mutations.random_bytewise(source)
    for seed in range(N):
        data = source.choice(seeds)
        for depth in range(source.choice((1, 1, 2, 3))):
            data = mutations.mutate(case.shape, data, 8192, 1000 * seed + depth, bytewise)
        run.one(data)
    assert 0 < run.n_read < run.n == N + len(seeds)
    assert run.n_converted > 0
