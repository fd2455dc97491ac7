"""The eight real adapters that the repository carries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rmmformat.converters import collect, get_exporter

NAMES = ["amazon", "bbc", "brands", "imdb", "movies", "spam", "tweets", "yelp"]


@pytest.fixture(scope="module")
def tasks():
    demo = Path(__file__).parents[1] / "data" / "demo-adapters"
    return {task.name: task for task in collect([(None, demo)])}


def test_all_eight_are_there(tasks):
    assert list(tasks) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_they_hold(tasks, name, kit):
    task = tasks[name]
    assert task.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert set(task.targets) == {
        f"bert.encoder.layer.{n}.attention.self.{part}"
        for n in range(6)
        for part in ("query", "value")
    }
    for info in task.targets.values():
        assert (info.rank, info.scale, info.dtype_a) == (16, 2.0, np.float16)
        assert (info.shape.n_in, info.shape.n_out) == (384, 384)
    classes = {"bbc": 5, "brands": 3}.get(name, 2)
    assert {n: i.shape for n, i in task.privates.items()} == {
        "classifier.weight": (classes, 384),
        "classifier.bias": (classes,),
    }
    assert not kit.notices(task)


@pytest.mark.parametrize("name", NAMES)
def test_going_round_gives_the_same_files(tasks, name, kit, demo):
    get_exporter("peft").export(tasks[name], kit.root / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (kit.root / name / file).read_bytes() == (demo / name / file).read_bytes()


def test_factors_are_the_files_own(tasks, demo):
    tensors = load_file(demo / "yelp" / "adapter_model.safetensors")
    target = "bert.encoder.layer.3.attention.self.value"
    factors = tasks["yelp"].factors(target)
    for letter, array in (("A", factors.A), ("B", factors.B)):
        np.testing.assert_array_equal(
            array, tensors[f"base_model.model.{target}.lora_{letter}.weight"]
        )
    assert tasks["yelp"].targets[target].n_bytes == 2 * 16 * (384 + 384)
