"""Fine-tunes beside their base: every kind of file and tensor, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import rmmformat as rmm
from rmmformat.converters import Options, collect, detect, get_importer
from rmmformat.converters.checkpoint_layout import base_names, target_of
from rmmformat.converters.checkpoint_store import open_checkpoint
from rmmformat.converters.checkpoint_task import in_order
from rmmformat.errors import (
    NonFiniteError,
    NotFoundError,
    OptionError,
    RmmError,
    SourceError,
    UnsupportedError,
)
from rmmformat.model import Action, Role, TargetKind, TargetShape

Tensors = dict[str, np.ndarray]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def draw(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def model(seed: int = 0, dtype: Any = np.float32) -> Tensors:
    """A small encoder's tensors."""
    return {
        "embeddings.word_embeddings.weight": draw(seed, 40, 12, dtype=dtype),
        "layer.0.q.weight": draw(seed + 1, 12, 12, dtype=dtype),
        "layer.0.q.bias": draw(seed + 2, 12, dtype=dtype),
        "layer.0.up.weight": draw(seed + 3, 30, 12, dtype=dtype),
        "layer.0.norm.weight": draw(seed + 4, 12, dtype=dtype),
        "layer.1.q.weight": draw(seed + 5, 12, 12, dtype=dtype),
    }


def tuned_of(base: Tensors, *names: str, seed: int = 100) -> Tensors:
    """The base with some tensors changed, all of them by default."""
    return {
        name: (value + 0.1 * draw(seed + n, *value.shape)).astype(value.dtype)
        if name in names or not names
        else value
        for n, (name, value) in enumerate(base.items())
    }


class Models:
    """Writes models below one folder, and opens them beside each other."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(self, name: str, tensors: Tensors, config: Mapping[str, Any] | None = None) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    def pair(
        self, base: Tensors, tuned: Tensors, config: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        return self.open(
            self.save("base", base, config), self.save("tuned", tuned, config), **options
        )

    @staticmethod
    def open(base: Path, tuned: Path, **options: Any) -> Any:
        (task,) = collect([(None, tuned)], options=Options(base=base, **options))
        return task


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def weight(task: Any, target: str) -> np.ndarray:
    """What a task adds to the stored weight, float64."""
    factors, shape = task.factors(target), task.targets[target].shape
    delta = factors.B.astype(np.float64) @ factors.A.astype(np.float64)
    turned = shape.transposed or shape.kind is TargetKind.EMBEDDING
    return delta.T if turned else delta


def lines(task: Any, item: str) -> list[str]:
    return [line.detail for line in task.ledger if line.item == item]


# --- what comes out ---------------------------------------------------------------------------


def test_changed_weights_become_factors_and_the_rest_stays_whole(models: Models) -> None:
    base = model()
    tuned = tuned_of(base, "layer.0.q.weight", "layer.0.q.bias", "layer.0.norm.weight")
    tuned["head.weight"] = draw(7, 3, 12)
    task = models.pair(base, tuned, rank=5)
    assert set(task.targets) == {"layer.0.q"}
    assert task.targets["layer.0.q"].rank == 5
    delta = tuned["layer.0.q.weight"].astype(np.float64) - base["layer.0.q.weight"]
    u, s, vt = np.linalg.svd(delta)
    assert np.allclose(weight(task, "layer.0.q"), (u[:, :5] * s[:5]) @ vt[:5], atol=1e-6)
    assert task.factors("layer.0.q").scale == 1.0
    roles = {name: info.role for name, info in task.privates.items()}
    assert roles == {
        "head.weight": Role.MODULE,
        "layer.0.norm.weight": Role.MODULE,
        "layer.0.q.bias": Role.BIAS,
    }
    for name in roles:
        assert task.private_tensor(name).tobytes() == tuned[name].tobytes()
    left = np.sqrt((s[5:] ** 2).sum() / (s**2).sum())
    assert task.extraction()["error"] == pytest.approx(left, rel=1e-5)
    assert task.extraction()["max"] == pytest.approx(left, rel=1e-5)
    assert lines(task, "unchanged tensors") == ["3 of 7: equal to the base's, not stored"]
    assert lines(task, "head.weight") == []
    assert "not in the base" in lines(task, "tensor head.weight")[0]
    assert lines(task, "changed weights")[0].startswith("notice: 1 changed weights")
    assert task.config_text == ""
    assert task.base_model == "base"
    with pytest.raises(NotFoundError):
        task.factors("layer.1.q")
    with pytest.raises(NotFoundError):
        task.private_tensor("layer.1.q.weight")


def test_every_tensor_and_file_is_in_the_ledger(models: Models) -> None:
    base = model()
    tuned = {**tuned_of(base), "position_ids": np.arange(9)}
    tuned_path = models.save("tuned", tuned, {"model_type": "bert"})
    (tuned_path / "notes.txt").write_text("x")
    task = models.open(models.save("base", base), tuned_path)
    items = {line.item: line for line in task.ledger}
    for name in tuned:
        assert f"tensor {name}" in items
    assert items["tensor position_ids"].action is Action.IGNORED
    assert items["file notes.txt"].action is Action.IGNORED
    assert items["file model.safetensors"].action is Action.USED
    assert items["file config.json"].action is Action.STORED
    assert json.loads(task.config_text) == {"model_type": "bert"}
    assert [file.name for file in task.files] == ["config.json", "model.safetensors"]


def test_private_tensors_can_be_left_out(models: Models) -> None:
    base = model()
    task = models.pair(base, {**tuned_of(base), "head.weight": draw(1, 2, 12)}, drop_private=True)
    assert not task.privates
    assert len(task.targets) == 4
    (line,) = lines(task, "tensor head.weight")
    assert line == "notice: left out on request (not in the base)"


def test_nothing_changed(models: Models) -> None:
    task = models.pair(model(), model())
    assert not task.targets
    assert not task.privates
    assert lines(task, "changed weights") == ["notice: no weight has changed"]
    assert task.extraction()["error"] == 0.0


@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype"),
    [(BFLOAT16, BFLOAT16), (np.float16, np.float16), (np.float16, np.float32), (BFLOAT16, "f4")],
)
def test_stored_dtypes_are_subtracted_in_float32(models, base_dtype, tuned_dtype) -> None:
    base = model(dtype=base_dtype)
    tuned = {name: value.astype(tuned_dtype) for name, value in tuned_of(base).items()}
    tuned["layer.1.q.weight"] = base["layer.1.q.weight"].astype(tuned_dtype)
    task = models.pair(base, tuned, rank=12)
    assert "layer.1.q" not in task.targets  # the same values in another dtype
    name = "layer.0.up"
    delta = tuned[f"{name}.weight"].astype(np.float64) - base[f"{name}.weight"].astype(np.float64)
    assert np.allclose(weight(task, name), delta, atol=1e-6)
    assert task.targets[name].dtype_a == task.factors(name).A.dtype == np.float32
    assert task.privates["layer.0.q.bias"].dtype == np.dtype(tuned_dtype)


def test_rank_by_energy_and_by_error(models: Models) -> None:
    base, tuned = model(), tuned_of(model())
    base_path, tuned_path = models.save("base", base), models.save("tuned", tuned)
    spectra = {
        name.removesuffix(".weight"): np.linalg.svd(
            tuned[name].astype(np.float64) - base[name], compute_uv=False
        )
        for name in base
        if base[name].ndim == 2
    }
    by_energy = models.open(base_path, tuned_path, energy=0.7)
    by_error = models.open(base_path, tuned_path, extract_error=0.4)
    capped = models.open(base_path, tuned_path, extract_error=0.01, rank=3)
    assert set(spectra) == set(by_energy.targets) == set(by_error.targets)
    for name, s in spectra.items():
        kept = np.cumsum(s**2) / (s**2).sum()
        assert by_energy.targets[name].rank == np.argmax(kept >= 0.7) + 1
        assert by_error.targets[name].rank == np.argmax(1.0 - kept <= 0.4**2) + 1
        assert capped.targets[name].rank == 3
    assert by_error.extraction()["max"] <= 0.4
    assert by_energy.extraction()["energy"] == 0.7
    assert "rank" not in by_energy.extraction()
    assert capped.extraction()["rank"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"energy": 1.5},
        {"extract_error": 2.0},
        {"energy": 0.5, "extract_error": 0.5},
        {"svd": "quick"},
    ],
)
def test_options_out_of_range(models: Models, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        models.pair(model(), tuned_of(model()), **options)


# --- kinds of weights -------------------------------------------------------------------------


def test_embeddings_convolutions_and_what_has_no_low_rank_form(models: Models) -> None:
    base = {
        "wte.weight": draw(1, 50, 8),
        "layer.0.conv.weight": draw(2, 6, 4, 3, 3),
        "layer.0.conv1.weight": draw(3, 6, 4, 5),
        "layer.0.depthwise.weight": draw(4, 6, 1, 3),
        "layer.0.experts.weight": draw(5, 2, 4, 70),  # stacked, not a kernel of 70
        "class_token": draw(6, 1, 8),
    }
    tuned = tuned_of(base)
    task = models.pair(base, tuned, rank=50)
    shapes = {name: info.shape for name, info in task.targets.items()}
    assert shapes == {
        "wte": TargetShape(50, 8, TargetKind.EMBEDDING),
        "layer.0.conv": TargetShape(36, 6, TargetKind.CONV, kernel=(3, 3)),
        "layer.0.conv1": TargetShape(20, 6, TargetKind.CONV, kernel=(5,)),
    }
    for name in shapes:
        delta = tuned[f"{name}.weight"].astype(np.float64) - base[f"{name}.weight"]
        assert np.allclose(weight(task, name).reshape(delta.shape), delta, atol=1e-6)
    assert set(task.privates) == {
        "layer.0.depthwise.weight",
        "layer.0.experts.weight",
        "class_token",
    }


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        *((name, TargetKind.EMBEDDING) for name in (
            "word_embeddings", "token_type_embeddings", "embed_tokens", "tok_embeddings", "wte",
            "embed_in", "shared", "position_embedding", "embed_positions",
        )),
        *((name, TargetKind.LINEAR) for name in (
            "q_proj", "embed_out", "embedding_hidden_mapping_in", "embeddings_project", "lm_head",
            "0", "dense",
        )),
    ],
)  # fmt: skip
def test_names_of_embeddings(own: str, kind: TargetKind) -> None:
    found = target_of(f"model.{own}.weight", (30, 20), np.dtype(np.float32), {})
    assert found is not None
    assert found[0] == f"model.{own}"
    assert found[1].kind is kind


def test_gpt2_weights_are_transposed_and_the_config_says_so(models: Models) -> None:
    base = {"h.0.attn.c_attn.weight": draw(1, 8, 24), "h.0.mlp.c_proj.weight": draw(2, 8, 8)}
    tuned = tuned_of(base)
    task = models.pair(base, tuned, {"model_type": "gpt2"})
    for name in base:
        target = name.removesuffix(".weight")
        assert task.targets[target].shape.transposed
        assert np.allclose(weight(task, target), tuned[name] - base[name], atol=1e-6)
    plain = models.open(
        models.save("b2", base, {"model_type": "gpt_bigcode"}),
        models.save("t2", tuned, {"model_type": "gpt_bigcode"}),
    )
    assert plain.targets["h.0.attn.c_attn"].shape == TargetShape(24, 8)
    with pytest.raises(UnsupportedError, match=r"config\.json") as caught:
        models.open(models.save("b3", base), models.save("t3", tuned))
    assert "c_attn" in str(caught.value)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["tuned", "base"])
def test_a_prefix_that_only_one_side_has(models: Models, more: str) -> None:
    base, tuned = model(), tuned_of(model())
    longer = base if more == "base" else tuned
    for name in list(longer):
        longer[f"bert.{name}"] = longer.pop(name)
    task = models.pair(base, tuned)
    prefix = "bert." if more == "tuned" else ""
    assert f"{prefix}layer.0.q" in task.targets
    assert len(task.targets) == 4
    assert "bert." in lines(task, "names of tensors")[0]


def test_base_names_prefers_no_prefix() -> None:
    assert base_names(["a.b", "b"], ["a.b", "b"]) == {"a.b": "a.b", "b": "b"}
    assert base_names(["x.a.b", "y"], ["a.b"]) == {"x.a.b": "a.b"}
    assert base_names(["a.b", "y"], ["x.a.b"]) == {"a.b": "x.a.b"}


def test_what_training_wraps_around_a_model_is_taken_off(models: Models) -> None:
    base, tuned = model(), tuned_of(model())
    wrapped = {f"module._orig_mod.{name}": value for name, value in tuned.items()}
    assert set(models.pair(base, wrapped).targets) == {
        "embeddings.word_embeddings", "layer.0.q", "layer.0.up", "layer.1.q",
    }  # fmt: skip


# --- tied and resized -------------------------------------------------------------------------

CAUSAL = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}


def test_a_tied_weight_stored_once_becomes_two_targets(models: Models) -> None:
    base = {"model.embed_tokens.weight": draw(1, 30, 8), "model.layers.0.q.weight": draw(2, 8, 8)}
    tuned = tuned_of(base)
    task = models.pair(base, tuned, CAUSAL, rank=4)
    assert set(task.targets) == {"lm_head", "model.embed_tokens", "model.layers.0.q"}
    assert task.targets["lm_head"].shape == TargetShape(8, 30)
    assert np.allclose(weight(task, "lm_head"), weight(task, "model.embed_tokens"), atol=1e-6)


@pytest.mark.parametrize("twice", ["base", "tuned", "both"])
def test_a_tied_weight_stored_twice(models: Models, twice: str) -> None:
    base = {"model.embed_tokens.weight": draw(1, 30, 8), "model.layers.0.q.weight": draw(2, 8, 8)}
    tuned = tuned_of(base)
    for tensors, names in ((base, ("base", "both")), (tuned, ("tuned", "both"))):
        if twice in names:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    task = models.pair(base, tuned, CAUSAL, rank=8)
    assert set(task.targets) == {"lm_head", "model.embed_tokens", "model.layers.0.q"}
    delta = tuned["model.embed_tokens.weight"] - base["model.embed_tokens.weight"]
    assert np.allclose(weight(task, "lm_head"), delta, atol=1e-6)
    assert not task.privates


def test_untied_by_the_config(models: Models) -> None:
    base = {"model.embed_tokens.weight": draw(1, 30, 8), "model.layers.0.q.weight": draw(2, 8, 8)}
    task = models.pair(base, tuned_of(base), {**CAUSAL, "tie_word_embeddings": False})
    assert "lm_head" not in task.targets


def test_a_tied_weight_whose_other_name_is_not_known(models: Models) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    base = {name: draw(1, 30, 8), "bert.layer.0.q.weight": draw(2, 8, 8)}
    config = {"architectures": ["BertForMaskedLM"]}
    fine = models.open(
        models.save("b", base, config),
        models.save("t", tuned_of(base, "bert.layer.0.q.weight"), config),
    )
    assert set(fine.targets) == {"bert.layer.0.q"}
    looked = []
    task = models.pair(base, tuned_of(base), config)
    with pytest.raises(UnsupportedError, match="tie_word_embeddings") as caught:
        task.prepare(lambda *progress: looked.append(progress))
    assert name in str(caught.value)
    assert not looked  # refused before the work


def test_a_resized_vocabulary_is_kept_whole(models: Models) -> None:
    base, tuned = model(), tuned_of(model())
    name = "embeddings.word_embeddings.weight"
    tuned[name] = draw(9, 44, 12)
    task = models.pair(base, tuned)
    assert name in task.privates
    assert task.private_tensor(name).tobytes() == tuned[name].tobytes()
    (line,) = lines(task, f"tensor {name}")
    assert line.startswith("notice: the vocabulary was resized: of shape (44, 12), (40, 12)")


def test_a_resized_and_tied_vocabulary_is_kept_under_both_names(models: Models) -> None:
    base = {"model.embed_tokens.weight": draw(1, 30, 8), "model.layers.0.q.weight": draw(2, 8, 8)}
    tuned = {**tuned_of(base), "model.embed_tokens.weight": draw(3, 32, 8)}
    task = models.pair(base, tuned, CAUSAL)
    assert set(task.privates) == {"lm_head.weight", "model.embed_tokens.weight"}
    one, other = (task.private_tensor(name) for name in sorted(task.privates))
    assert np.array_equal(one, other)


def test_a_head_of_other_classes_is_kept_whole(models: Models) -> None:
    base = {**model(), "classifier.weight": draw(1, 2, 12)}
    task = models.pair(base, {**tuned_of(model()), "classifier.weight": draw(2, 5, 12)})
    assert "classifier.weight" in task.privates


def test_gpt2_in_peft_is_the_base_plus_the_factors(tmp_path: Path) -> None:
    """Conv1D, tied embeddings, both at once, against transformers and PEFT themselves."""
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from rmmformat.converters import get_exporter

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=12)
    base = transformers.GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path / "base")).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    task = Models.open(tmp_path / "base", tmp_path / "tuned", rank=100)
    assert task.targets["transformer.h.0.attn.c_attn"].shape.transposed
    assert {"lm_head", "transformer.wte", "transformer.wpe"} <= set(task.targets)
    get_exporter("peft").export(task, tmp_path / "adapter")
    again = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()
    tokens = torch.tensor([[1, 7, 22, 39, 5]])
    with torch.inference_mode():
        wanted = tuned(tokens).logits
        assert not torch.allclose(base(tokens).logits, wanted, atol=1e-2)
        assert torch.allclose(adapted(tokens).logits, wanted, atol=1e-4)


# --- files ------------------------------------------------------------------------------------


def same_task(one: Any, other: Any) -> None:
    assert one.targets == other.targets
    assert one.privates == other.privates
    for target in one.targets:
        assert one.factors(target).A.tobytes() == other.factors(target).A.tobytes()
        assert one.factors(target).B.tobytes() == other.factors(target).B.tobytes()


def shard(folder: Path, tensors: Tensors) -> Path:
    """Write a model in two shards with an index."""
    folder.mkdir()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_every_form_of_files_gives_the_same(models: Models) -> None:
    torch = pytest.importorskip("torch")
    base, tuned = model(), tuned_of(model())
    base_path = models.save("base", base)
    wanted = models.open(base_path, models.save("one", tuned))
    sharded = shard(models.root / "sharded", tuned)
    single = models.root / "alone.safetensors"
    save_file(tuned, single)
    pickled = {name: torch.from_numpy(value) for name, value in tuned.items()}
    whole, parts = models.root / "bin", models.root / "bins"
    whole.mkdir()
    torch.save(pickled, whole / "pytorch_model.bin")
    parts.mkdir()
    index = {}
    for number, names in enumerate((sorted(tuned)[:3], sorted(tuned)[3:]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: pickled[name] for name in names}, parts / file)
        index |= dict.fromkeys(names, file)
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for path in (sharded, sharded / "model.safetensors.index.json", single):
        same_task(models.open(base_path, path), wanted)
    for path in (whole, parts):
        with pytest.raises(UnsupportedError, match="pickle"):
            models.open(base_path, path)
        same_task(models.open(base_path, path, allow_pickle=True), wanted)
    assert models.open(base_path, single).name == "alone"
    assert models.open(base_path, sharded / "model.safetensors.index.json").name == "sharded"


def test_a_folder_of_models(models: Models) -> None:
    base = models.save("base", model())
    for name in ("b", "a"):
        models.save(f"many/{name}", tuned_of(model(), seed=ord(name)))
    assert detect(models.root / "many") == "checkpoint"
    tasks = collect([(None, models.root / "many")], options=Options(base=base))
    assert [task.name for task in tasks] == ["a", "b"]
    with pytest.raises(SourceError, match="can name only one"):
        collect([("x", models.root / "many")], options=Options(base=base))


def test_detection_leaves_other_kinds_alone(models: Models, demo: Path) -> None:
    assert detect(demo) == "peft"
    importer = get_importer("checkpoint")
    assert not importer.detect(models.root)
    assert not importer.detect(models.root / "absent")
    assert not importer.detect(demo / "imdb" / "adapter_model.safetensors")


def test_opening_reads_no_tensors(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmmformat.converters import checkpoint_store

    def refuse(*_: Any) -> None:
        raise AssertionError("read a tensor")

    base, tuned = models.save("base", model()), models.save("tuned", tuned_of(model()))
    monkeypatch.setattr(checkpoint_store.Checkpoint, "read", refuse)
    task = models.open(base, tuned)
    with pytest.raises(AssertionError):
        _ = task.targets


def test_each_weight_is_decomposed_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmmformat.converters import checkpoint_task

    calls: list[int] = []
    extract = checkpoint_task.extract

    def counted(*given: Any) -> Any:
        calls.append(1)
        return extract(*given)

    monkeypatch.setattr(checkpoint_task, "extract", counted)
    base = models.save("base", model())
    tuned = [models.save(f"t{n}", tuned_of(model(), seed=n)) for n in range(3)]
    options = Options(base=base)
    rmm.convert(tuned, models.root / "x.rmm", components=1, options=options)  # surveys, then codes
    assert len(calls) == 3 * 4


def test_a_file_that_changes_meanwhile_is_noticed(models: Models) -> None:
    base, tuned = models.save("base", model()), models.save("tuned", tuned_of(model()))
    task = models.open(base, tuned)
    (tuned / "model.safetensors").unlink()
    save_file(tuned_of(model(), seed=5), tuned / "model.safetensors")
    with pytest.raises(SourceError, match="changed since it was opened"):
        task.prepare()


# --- refused ----------------------------------------------------------------------------------


def test_no_base(models: Models) -> None:
    tuned = models.save("tuned", model())
    with pytest.raises(OptionError, match="--base"):
        collect([(None, tuned)])
    with pytest.raises(SourceError, match="no such file"):
        models.open(models.root / "absent", tuned)
    (models.root / "empty").mkdir()
    with pytest.raises(SourceError, match="no model weights"):
        models.open(models.root / "empty", tuned)


def changed(edit: Any) -> Tensors:
    tensors = tuned_of(model())
    edit(tensors)
    return tensors


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("layer.1.q.weight"), "'layer.1.q.weight' of the base .* is missing"),
        (lambda t: t.update({"layer.2.q.weight": draw(1, 12, 12)}), "'layer.2.q.weight' is in a"),
        (lambda t: t.update({"layer.0.up.weight": draw(1, 31, 12)}), r"\(31, 12\), \(30, 12\)"),
        (
            lambda t: t.update({"embeddings.word_embeddings.weight": draw(1, 40, 13)}),
            "word_embeddings",
        ),
        (lambda t: t.update({"layer.0.q.lora_A.weight": draw(1, 2, 12)}), "belongs to an adapter"),
        (lambda t: t.update({"layer.0.q.qweight": draw(1, 2, 12)}), "quantised"),
    ],
)
def test_no_fine_tune_of_this_base(models: Models, edit: Any, words: str) -> None:
    with pytest.raises((SourceError, UnsupportedError), match=words):
        models.pair(model(), changed(edit))


def test_another_model(models: Models) -> None:
    with pytest.raises(SourceError, match="is in the base"):
        models.pair(model(), {"something.else": draw(1, 3, 3)})


def test_quantised_models(models: Models) -> None:
    config = {"quantization_config": {"bits": 4}}
    with pytest.raises(UnsupportedError, match="quantization_config"):
        models.pair(model(), tuned_of(model()), config)
    eight = {"layer.0.q.weight": draw(1, 4, 4).astype(ml_dtypes.float8_e4m3fn)}
    with pytest.raises(UnsupportedError, match="quantised"):
        models.open(models.save("b", model()), models.save("t", eight))


@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.parametrize("name", ["layer.0.q.weight", "layer.0.q.bias"])
def test_values_that_are_not_finite(models: Models, where: str, name: str) -> None:
    base, tuned = model(), tuned_of(model())
    (base if where == "base" else tuned)[name].flat[3] = np.inf
    task = models.pair(base, tuned)
    if where == "base" and name.endswith("bias"):
        assert name in task.privates  # the new value is what counts
        return
    with pytest.raises(NonFiniteError, match=name):
        task.private_tensor(name) if name.endswith("bias") else task.prepare()


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-7]),
        lambda p: p.write_bytes(b"\xff" * 100),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
    ],
)
@pytest.mark.parametrize("whose", ["base", "tuned"])
def test_damaged_files(models: Models, damage: Any, whose: str) -> None:
    base, tuned = models.save("base", model()), models.save("tuned", tuned_of(model()))
    damage((base if whose == "base" else tuned) / "model.safetensors")
    with pytest.raises(SourceError, match="safetensors"):
        models.open(base, tuned)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../secret.safetensors"}},
        {"weight_map": {"a": "missing.safetensors"}},
        {"weight_map": {}},
        {},
        {"weight_map": {"a": 3}},
    ],
)
def test_hostile_indices(models: Models, index: dict[str, Any]) -> None:
    base = models.save("base", model())
    folder = models.root / "tuned"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="index"):
        models.open(base, folder)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"architectures": 3}', '{"architectures": [[]]}', '{"model_type": {}}']
)
@pytest.mark.parametrize("whose", ["base", "tuned"])
def test_hostile_configs(models: Models, text: str, whose: str) -> None:
    base, tuned = models.save("base", model()), models.save("tuned", tuned_of(model()))
    ((base if whose == "base" else tuned) / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        models.open(base, tuned)


def test_pickles_that_run_code(models: Models) -> None:
    pytest.importorskip("torch")

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(models.root / "exploded"),)

    folder = models.root / "tuned"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"layer.0.q.weight": Bomb()}))
    with pytest.raises(SourceError):
        models.open(models.save("base", model()), folder, allow_pickle=True)
    assert not (models.root / "exploded").exists()


# --- work -------------------------------------------------------------------------------------


def test_same_bytes_again_however_many_threads(models: Models) -> None:
    base = models.save("base", model())
    tuned = [models.save(f"t{n}", tuned_of(model(), seed=n)) for n in range(3)]
    contents = []
    for number, threads in enumerate((None, 1, 8)):
        with pytest.MonkeyPatch.context() as patch:
            if threads:
                patch.setattr("os.cpu_count", lambda n=threads: n)
            path = models.root / f"{number}.rmm"
            rmm.convert(tuned, path, exact=True, options=Options(base=base, svd="random"))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_results_come_in_order_and_little_is_under_way() -> None:
    import threading
    import time

    lock, under_way, most = threading.Lock(), [0], [0]

    def work(size: int) -> int:
        with lock:
            under_way[0] += size
            most[0] = max(most[0], under_way[0])
        time.sleep(0.002)
        with lock:
            under_way[0] -= size
        return -size

    sizes = [5, 1, 9, 2, 2, 3, 10, 1, 1, 1, 7]
    assert list(in_order(work, sizes, sizes, workers=4)) == [-size for size in sizes]
    assert most[0] <= 20


def test_progress_counts_tensors(models: Models) -> None:
    task = models.pair(model(), tuned_of(model()))
    seen: list[tuple[str, int, int]] = []
    task.prepare(lambda *given: seen.append(given))
    assert seen == [("extracting tuned", n, 6) for n in range(1, 7)]
    task.prepare(lambda *given: seen.append(given))
    assert len(seen) == 6


def test_memory_is_that_of_a_few_matrices(tmp_path: Path) -> None:
    """Peak resident memory of a process, against the largest matrix and the whole model."""
    pytest.importorskip("resource")
    code = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from safetensors.numpy import save_file
        import rmmformat as rmm

        root = Path(sys.argv[1])
        shape, count = (1024, 2048), 16
        def save(name, seed):
            (root / name).mkdir()
            random = np.random.default_rng(seed)
            # One matrix a file: what is written must not count.
            index = {}
            for n in range(count):
                value = random.standard_normal(shape, dtype=np.float32)
                save_file({f"layer.{n}.q.weight": value}, root / name / f"{n}.safetensors")
                index[f"layer.{n}.q.weight"] = f"{n}.safetensors"
            import json
            text = json.dumps({"weight_map": index})
            (root / name / "model.safetensors.index.json").write_text(text)
        if sys.argv[2] == "make":
            save("base", 1)
            save("tuned", 2)
        else:
            import rmmformat.pipeline, rmmformat.methods
            np.linalg.svd(np.eye(3, dtype=np.float32))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            options = rmm.Options(base=root / "base", rank=4, svd=sys.argv[2])
            rmm.convert(root / "tuned", root / "x.rmm", exact=True, options=options)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print((after - before) * 1024)
        """
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run([*run, "make"], check=True)
    grown = int(subprocess.run([*run, "random"], check=True, capture_output=True).stdout)
    matrix, model_bytes = 8 << 20, 16 * (8 << 20)
    # Two under way, each with both weights, the delta and one block in float64.
    assert grown < 12 * matrix < model_bytes


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", ["SIGINT", "error"])
def test_an_interrupt_or_error_leaves_nothing(models: Models, how: str) -> None:
    models.save("base", model())
    models.save("tuned", tuned_of(model()))
    temporary = models.root / "tmp"
    temporary.mkdir()
    code = textwrap.dedent(
        """
        import os, signal, sys
        from rmmformat.converters import checkpoint_task
        extract, calls = checkpoint_task.extract, []
        def struck(*given):
            calls.append(1)
            if len(calls) == 3 and sys.argv[1] == "SIGINT":
                os.kill(os.getpid(), signal.SIGINT)
            elif len(calls) == 3:
                raise OSError(28, "No space left on device")
            return extract(*given)
        checkpoint_task.extract = struck
        from rmmformat.cli.main import main
        main(sys.argv[2:])
        """
    )
    out = models.root / "out" / "x.rmm"
    out.parent.mkdir()
    words = ["convert", models.root / "tuned", "--base", models.root / "base", "-o", out]
    done = subprocess.run(
        [sys.executable, "-c", code, how, *map(str, words)],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert list(temporary.iterdir()) == []
    assert list(out.parent.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_remedy(models: Models) -> None:
    task = models.pair(model(), tuned_of(model()))

    class Full:
        def seek(self, *_: int) -> int:
            return 0

        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    from rmmformat.converters import spool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool.tempfile, "TemporaryFile", lambda **_: Full())
        with pytest.raises(RmmError, match="TMPDIR"):
            task.prepare()
    task.prepare()  # nothing is half-done
    assert len(task.targets) == 4


def test_checkpoint_reads_parts_as_it_reads_the_whole(models: Models) -> None:
    tensors = {**model(dtype=BFLOAT16), "empty": np.zeros((0, 3), np.float32)}
    checkpoint = open_checkpoint(models.save("x", tensors))
    for name, value in tensors.items():
        assert checkpoint.read(name).tobytes() == value.tobytes()
        raw = value.tobytes()
        parts = [(0, min(7, len(raw))), (len(raw) // 2, len(raw) - len(raw) // 2)]
        joined = b"".join(raw[start : start + length] for start, length in parts)
        assert checkpoint.read_parts(name, parts) == joined
    with pytest.raises(NotFoundError):
        checkpoint.read("absent")
