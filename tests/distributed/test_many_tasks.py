"""A thousand adapters: what is done, read and kept of each does not grow with their number.

Counted, not timed: calls of Python functions (which stand for all work that is not inside one array
operation), bytes of files, and bytes that a load touches.
"""

from __future__ import annotations

import cProfile
import json
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import rmmformat as rmm
from rmmformat import threads
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert, open_sources

from ..product.conftest import MemoryTask, make_tasks

FEW, MANY = 100, 1000
SIDES = ((16, 12), (12, 16), (8, 24))


def n_calls(action: Callable[[], Any]) -> int:
    """Calls of functions during an action."""
    profile = cProfile.Profile()
    profile.enable()
    try:
        action()
    finally:
        profile.disable()
    calls: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return calls


@pytest.fixture(scope="module")
def tasks() -> list[MemoryTask]:
    return make_tasks(MANY, rank=2, sides=SIDES)


@pytest.fixture(scope="module")
def files(tasks: list[MemoryTask], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Collections of few and of many tasks."""
    folder, made = tmp_path_factory.mktemp("many"), {}
    for n in (FEW, MANY):
        made[n] = folder / f"{n}.rmm"
        convert(tasks[:n], made[n], choose_method(components=2))
    return made


@pytest.mark.parametrize("options", [{"components": 2}, {"exact": True}])
def test_converting(
    tasks: list[MemoryTask],
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "n_threads", lambda: 1)  # calls in other threads are not counted
    method, calls, sizes = choose_method(**options), {}, {}
    for n in (FEW, MANY):
        path = tmp_path / f"{n}.rmm"
        calls[n] = n_calls(lambda n=n, path=path: convert(tasks[:n], path, method))
        sizes[n] = path.stat().st_size
    assert calls[MANY] / MANY < 1.1 * calls[FEW] / FEW
    assert sizes[MANY] / MANY < 1.05 * sizes[FEW] / FEW


def test_opening_and_loading(files: dict[int, Path]) -> None:
    opening, loading = {}, {}
    with rmm.open(files[FEW]) as once:  # what is done once in a process is not counted
        once.load("task42")
    for n, path in files.items():
        collection: list[rmm.Collection] = []
        opening[n] = n_calls(lambda c=collection, path=path: c.append(rmm.open(path)))
        names = collection[0].tasks
        assert len(names) == n
        loading[n] = n_calls(lambda c=collection[0]: c.load("task42"))
        collection[0].close()
    assert opening[MANY] == opening[FEW]
    assert loading[MANY] == loading[FEW]


def test_every_task_comes_back(tasks: list[MemoryTask], tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    convert(tasks, path, choose_method(exact=True))
    with rmm.open(path) as collection:
        for task in tasks:
            loaded = collection.load(task.name)
            for name in task.targets:
                want = task.factors(name)
                assert np.array_equal(loaded[name].A, want.A)
                assert np.array_equal(loaded[name].B, want.B)
    assert rmm.validate(path).ok


def test_the_index_takes_a_fixed_part_of_each_task(files: dict[int, Path]) -> None:
    sizes = {}
    for n, path in files.items():
        with rmm.open(path) as collection:
            sizes[n] = int(collection.index.active["index_length"])
            frames = sum(map(int, collection.index.table("FRAM")["length"]))
            payload = collection.index.payload_of(7)
            # A load touches its own entries and the frames, whose size does not depend on n.
            assert sum(extent.length for extent in payload) < frames + 2000
    grown = (sizes[MANY] - sizes[FEW]) / (MANY - FEW)
    assert grown <= sizes[FEW] / FEW


def test_adapter_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny/base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q"],
    }
    few, many = 20, 200
    for number in range(many):
        folder = tmp_path / "adapters" / f"a{number:03}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        pair = {
            "base_model.model.q.lora_A.weight": rng.standard_normal((2, 16)).astype(np.float32),
            "base_model.model.q.lora_B.weight": rng.standard_normal((12, 2)).astype(np.float32),
        }
        save_file(pair, folder / "adapter_model.safetensors")
    paths = sorted((tmp_path / "adapters").iterdir())
    open_sources(paths[:1])  # imports, plug-ins
    calls = {n: n_calls(lambda n=n: open_sources(paths[:n])) for n in (few, many)}
    assert calls[many] / many < 1.1 * calls[few] / few
    out = tmp_path / "x.rmm"
    rmm.convert([tmp_path / "adapters"], out, components=1)
    with rmm.open(out) as collection:
        assert collection.tasks == tuple(path.name for path in paths)
