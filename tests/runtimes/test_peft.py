"""A task in a model says what PEFT's own loading of its adapter says, after any switches."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from torch import nn
from transformers.pytorch_utils import Conv1D

import rmmformat as rmm
from rmmformat.cache import TaskCache
from rmmformat.collection import Collection
from rmmformat.errors import (
    NotFoundError,
    OptionError,
    RmmError,
    ShapeError,
    UnsupportedError,
)
from rmmformat.runtimes import peft as runtime
from rmmformat.runtimes.peft_live import as_tensor

IDS = torch.tensor([[1, 4, 9, 2], [3, 3, 0, 10]])


class Tiny(nn.Module):
    """One module of every class that PEFT adapts."""

    def __init__(self, n_labels: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.emb = nn.Embedding(11, width)
        self.up = nn.Linear(width, 12)
        self.mix = Conv1D(width, 12)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_labels)
        nn.init.normal_(self.mix.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        x = x + self.mix(torch.relu(self.up(x)))
        x = x + self.attn(x, x, x)[0]
        x = x + self.conv(x[:, None]).mean(1)
        return self.head(self.norm(x))


LINEAR = ["up", "mix"]
BASIC: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR}


def save_adapter(
    folder: Path, seed: int, base: Callable[[], nn.Module] = Tiny, **config: Any
) -> Path:
    """An adapter of random values, saved by PEFT itself."""
    model = get_peft_model(base(), LoraConfig(**(BASIC | config)))
    generator = torch.Generator().manual_seed(seed)
    biases = config.get("bias", "none") != "none"
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
            elif "lora_" in name or "modules_to_save" in name or (biases and "bias" in name):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.4)
    model.save_pretrained(str(folder))
    return folder


def collection_of(tmp_path: Path, *configs: Mapping[str, Any], **how: Any) -> Collection:
    sources = [save_adapter(tmp_path / f"task{n}", n, **config) for n, config in enumerate(configs)]
    rmm.convert(sources, tmp_path / "x.rmm", **(how or {"exact": True}))
    return rmm.open(tmp_path / "x.rmm")


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS)
    return result


def peft_says(tmp_path: Path, task: str, base: Callable[[], nn.Module] = Tiny) -> torch.Tensor:
    return run(PeftModel.from_pretrained(base(), str(tmp_path / task)))


def state(model: nn.Module) -> dict[str, bytes]:
    return {
        key: value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for key, value in model.state_dict().items()
        if value.numel()
    }


CASES: dict[str, list[dict[str, Any]]] = {
    "plain": [{}, {}, {"target_modules": ["up"]}],
    "rank-stabilised": [{"use_rslora": True}, {"use_rslora": True}],
    "scales that differ": [{"lora_alpha": 8}, {"lora_alpha": 3}, {"use_rslora": True, "r": 3}],
    "zero scale": [{"lora_alpha": 0}, {"lora_alpha": 8}],
    "patterns": [
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"mix": 5}},
        {"rank_pattern": {"mix": 7}, "alpha_pattern": {"^up": 0.5}},
    ],
    "mixed ranks": [{"r": 1}, {"r": 8}, {"r": 3, "lora_alpha": 6}],
    "embedding": [{"target_modules": ["emb", "up"]}, {"target_modules": ["emb"], "r": 2}],
    "convolution": [{"target_modules": ["conv", "mix"]}, {"target_modules": ["conv"], "r": 6}],
    "transposed": [{"target_modules": ["mix"], "fan_in_fan_out": True}, {"fan_in_fan_out": True}],
    "attention": [{"target_modules": ["attn"]}, {"target_modules": ["attn", "up"], "r": 2}],
    "head": [{"modules_to_save": ["head"]}, {"modules_to_save": ["head", "norm"]}, {}],
    "biases": [{"bias": "all"}, {"bias": "lora_only"}, {}],
    "bias of B": [{"lora_bias": True}, {"lora_bias": True, "lora_alpha": 2}, {}],
    "bias of some B": [{"lora_bias": True, "target_modules": ["up"]}, {"target_modules": ["mix"]}],
    "dora": [
        {"use_dora": True, "target_modules": ["emb", "up", "mix", "conv"]},
        {"use_dora": True, "target_modules": ["up", "conv"]},
    ],
    "dora, scales that differ": [
        {"use_dora": True},
        {"use_dora": True, "lora_alpha": 5, "modules_to_save": ["head"]},
    ],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_any_task_after_any_switches_is_that_task(case: str, tmp_path: Path) -> None:
    collection = collection_of(tmp_path, *CASES[case])
    plain = run(Tiny())
    fresh, said = {}, {}
    for task in collection.tasks:
        model = Tiny().eval()
        runtime.load(model, collection, task)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        fresh[task], said[task] = state(model), run(model)
        assert torch.allclose(said[task], peft_says(tmp_path, task), rtol=1e-5, atol=1e-6)
        assert (said[task] - plain).abs().max() > 1e-3 or case == "zero scale"
    model = Tiny().eval()
    runtime.load(model, collection, collection.tasks[0])
    parameters = list(model.parameters())
    for n in range(10):
        task = collection.tasks[(n + 1) % len(collection.tasks)]
        runtime.switch(model, collection, task)
        assert runtime.find(model).task == task
        # PEFT adds attention's delta to the base weight and takes it off again in every forward
        # pass, which leaves rounding errors there: see what is the adapter's own.
        drifts = case == "attention"
        got = state(model)
        assert {k: v for k, v in got.items() if not (drifts and "base_layer" in k)} == {
            k: v for k, v in fresh[task].items() if not (drifts and "base_layer" in k)
        }
        assert torch.equal(run(model), said[task]) or (
            drifts and torch.allclose(run(model), said[task], atol=1e-5)
        )
    if drifts:
        return
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    before = state(Tiny())
    runtime.unload(model)
    assert state(model) == before
    assert torch.equal(run(model), plain)
    assert [type(module) for module in model.modules()] == [type(m) for m in Tiny().modules()]


@pytest.mark.parametrize("tasks", [[{}, {}], [{"lora_alpha": 16}, {"lora_alpha": 2}]])
def test_scales_that_are_powers_of_two_give_the_very_bits_of_peft(
    tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    collection = collection_of(tmp_path, *tasks)
    model = Tiny()
    live = runtime.load(model, collection, "task0")
    assert set(live.scales.values()) == ({2.0} if tasks[0] == tasks[1] else {1.0})
    for task in ("task1", "task0"):
        runtime.switch(model, collection, task)
        assert torch.equal(run(model), peft_says(tmp_path, task))


def test_one_task_alone_is_as_small_as_it_is(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {"r": 2, "target_modules": ["up"]}, {"r": 8})
    assert runtime.load(Tiny(), collection, "task0", tasks=["task0"]).ranks == {"up": 2}
    assert runtime.load(Tiny(), collection, "task0").ranks == {"mix": 8, "up": 8}
    assert runtime.load(Tiny(), collection, "task0", max_rank=12).ranks == {"mix": 12, "up": 12}


# --- what models may be ---------------------------------------------------------------------------


def test_an_adapter_beside_others_of_a_peft_model(tmp_path: Path) -> None:
    collection = collection_of(
        tmp_path, {"modules_to_save": ["head"]}, {"modules_to_save": ["head"], "r": 2}
    )
    model = PeftModel.from_pretrained(Tiny(), str(tmp_path / "task0")).eval()
    theirs = run(model)
    runtime.load(model, collection, "task1")
    assert model.active_adapter == "rmm"
    assert torch.allclose(run(model), peft_says(tmp_path, "task1"), atol=1e-6)
    runtime.switch(model, collection, "task0")
    assert torch.allclose(run(model), theirs, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(run(model), theirs)
    runtime.switch(model, collection, "task1")  # of an adapter that is not active
    assert torch.equal(run(model), theirs)
    with model.disable_adapter():
        assert torch.equal(run(model), run(Tiny()))
    runtime.unload(model)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model), theirs)


def test_two_adapters_of_one_model(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {}, {"r": 2, "modules_to_save": ["head"]})
    model = Tiny().eval()
    runtime.load(model, collection, "task0", adapter_name="one")
    runtime.load(model, collection, "task1", adapter_name="two")
    assert torch.allclose(run(model), peft_says(tmp_path, "task1"), atol=1e-6)
    with pytest.raises(NotFoundError, match="one, two"):
        runtime.switch(model, collection, "task0")
    runtime.switch(model, collection, "task0", adapter_name="two")
    assert torch.allclose(run(model), peft_says(tmp_path, "task0"), atol=1e-6)
    runtime.unload(model, "two")
    assert runtime.find(model).name == "one"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_switch_on_their_own(
    how: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    collection = collection_of(tmp_path, {"modules_to_save": ["head"], "bias": "all"}, {})
    model = Tiny().eval()
    runtime.load(model, collection, "task0")
    said = run(model)
    other = how(model)
    runtime.switch(other, collection, "task1")
    assert torch.equal(run(model), said)
    assert torch.allclose(run(other), peft_says(tmp_path, "task1"), atol=1e-6)
    runtime.switch(other, collection, "task0")
    assert torch.equal(run(other), said)


def test_dtypes(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {}, {"lora_alpha": 3})

    def dtypes(base: torch.dtype, **options: Any) -> set[torch.dtype]:
        model = Tiny().to(base)
        live = runtime.load(model, collection, "task0", **options)
        runtime.switch(model, collection, "task1")
        return {parameter.dtype for parameter in live.parameters()}

    assert dtypes(torch.bfloat16) == {torch.float32}  # as PeftModel.from_pretrained
    assert dtypes(torch.bfloat16, dtype="base") == {torch.bfloat16}
    assert dtypes(torch.float32, dtype="f16") == {torch.float16}
    assert dtypes(torch.float32, dtype=torch.bfloat16) == {torch.bfloat16}
    with pytest.raises(OptionError, match="f32, f16, bf16, base"):
        dtypes(torch.float32, dtype="q8")
    with pytest.raises(OptionError, match="int64"):
        dtypes(torch.float32, dtype=torch.int64)


def test_a_model_that_moved_to_another_dtype(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {"modules_to_save": ["head"]}, {})
    model = Tiny()
    runtime.load(model, collection, "task1")
    model.to(torch.bfloat16)
    runtime.switch(model, collection, "task0")
    want = collection.load("task0")["up"].A
    got = model.up.lora_A["rmm"].weight  # type: ignore[union-attr,index]
    assert torch.equal(got, torch.from_numpy(want).to(torch.bfloat16))
    model.to(torch.float32)
    runtime.switch(model, collection, "task0")
    assert torch.equal(model.up.lora_A["rmm"].weight, torch.from_numpy(want))  # type: ignore


@pytest.mark.parametrize("build", [False, True])
def test_inference_mode(build: bool, tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {"bias": "all", "modules_to_save": ["head"]}, {})
    with torch.inference_mode(build):
        model = Tiny().eval()
    with torch.inference_mode():
        runtime.load(model, collection, "task0")
        model(IDS)
        runtime.switch(model, collection, "task1")
        said = model(IDS)
    assert torch.allclose(said.clone(), peft_says(tmp_path, "task1"), atol=1e-6)
    runtime.switch(model, collection, "task0")  # and outside of it
    assert torch.allclose(run(model), peft_says(tmp_path, "task0"), atol=1e-6)


def test_training_goes_on_from_a_task(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {}, {})
    model = Tiny()
    live = runtime.load(model, collection, "task0")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for parameter in live.parameters():
        parameter.requires_grad_(True)
    model(IDS).sum().backward()
    runtime.switch(model, collection, "task1")
    assert all(p.requires_grad and p.grad is not None for p in live.parameters())
    model(IDS).sum().backward()


def test_a_cache_serves_models(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {"modules_to_save": ["head"]}, {"r": 2})
    cache = TaskCache(collection)
    one, two = Tiny(), Tiny()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not writable.*")  # torch warns of read-only memory
        runtime.load(one, cache, "task0")
        runtime.load(two, cache, "task1")
        for _ in range(3):
            runtime.switch(one, cache, "task1")
            runtime.switch(two, cache, "task0")
            runtime.switch(one, collection, "task0")
            runtime.switch(one, cache, "task1")
    assert cache.stats.loads == 2
    assert torch.allclose(run(one), peft_says(tmp_path, "task1"), atol=1e-6)
    assert torch.allclose(run(two), peft_says(tmp_path, "task0"), atol=1e-6)


def test_switches_of_several_threads_come_one_after_the_other(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {}, {"r": 2}, {"target_modules": ["up"]})
    model = Tiny()
    runtime.load(model, collection, "task0")
    whole = {}
    for task in collection.tasks:
        runtime.switch(model, collection, task)
        whole[task] = state(model)
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait(30)
        for task in np.random.default_rng(seed).choice(collection.tasks, 50):
            runtime.switch(model, collection, str(task))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4), timeout=60))
    assert state(model) == whole[runtime.find(model).task]


def test_a_model_a_thread_from_one_collection(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {}, {"r": 2}, {"target_modules": ["up"]})
    said = {task: peft_says(tmp_path, task) for task in collection.tasks}
    model = Tiny().eval()
    runtime.load(model, collection, "task0")
    copies = [copy.deepcopy(model) for _ in range(4)]

    def work(n: int) -> bool:
        own, good = copies[n], True
        for k in range(30):
            task = collection.tasks[(n + k) % 3]
            runtime.switch(own, collection, task)
            with torch.no_grad():
                good &= torch.allclose(own(IDS), said[task], atol=1e-6)
        return good

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4), timeout=60))


def test_magnitudes_belong_to_the_factors(tmp_path: Path) -> None:
    config = {"use_dora": True, "modules_to_save": ["head"]}
    collection = collection_of(tmp_path, config, {"use_dora": True})
    model = Tiny()
    runtime.load(model, collection, "task0", private=False)
    with_head = PeftModel.from_pretrained(Tiny(), str(tmp_path / "task0"))
    with_head.base_model.model.head = Tiny().head
    assert torch.allclose(run(model), run(with_head), atol=1e-6)


def test_another_collection_of_the_same_base(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    first = collection_of(tmp_path / "x", {"r": 8})
    second = collection_of(tmp_path / "y", {"r": 3, "lora_alpha": 5, "target_modules": ["mix"]})
    model = Tiny()
    runtime.load(model, first, "task0")
    runtime.switch(model, second, "task0")
    assert torch.allclose(run(model), peft_says(tmp_path / "y", "task0"), atol=1e-6)
    runtime.switch(model, first, "task0")
    assert torch.equal(run(model), peft_says(tmp_path / "x", "task0"))


def test_components_are_what_the_collection_reconstructs(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {}, {}, {}, components=1, encoding="q8")
    model = Tiny()
    runtime.load(model, collection, "task2")
    for task in collection.tasks:
        runtime.switch(model, collection, task)
        loaded = collection.load(task)
        for target in loaded:
            layer: Any = model.get_submodule(target)
            assert layer.lora_A["rmm"].weight.numpy().tobytes() == loaded[target].A.tobytes()
            assert layer.lora_B["rmm"].weight.numpy().tobytes() == loaded[target].B.tobytes()


# --- what does not fit ----------------------------------------------------------------------------


def refused(model: nn.Module, error: type[RmmError], what: str, act: Callable[[], object]) -> None:
    before, modules = state(model), [type(module) for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=what):
        act()
    assert state(model) == before
    assert [type(module) for module in model.modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients


def test_a_task_that_does_not_fit_leaves_the_old_one_whole(tmp_path: Path) -> None:
    collection = collection_of(
        tmp_path,
        {"target_modules": ["up"], "r": 2},
        {"target_modules": ["up"], "r": 5},
        {"target_modules": ["mix"], "r": 2},
        {"target_modules": ["up"], "r": 2, "use_dora": True},
        {"target_modules": ["up"], "r": 2, "modules_to_save": ["head"]},
    )
    model = Tiny()
    runtime.load(model, collection, "task0", tasks=["task0"])
    for task, error, what in (
        ("task1", ShapeError, r"rank 5 at 'up'.* has 2.*max_rank=5"),
        ("task2", NotFoundError, r"target 'mix'.*no place.*tasks="),
        ("task3", NotFoundError, r"'up.lora_magnitude_vector'.*no place"),
        ("task4", NotFoundError, r"'head.(bias|weight)'.*no place"),
        ("taks0", NotFoundError, "task0"),
    ):
        refused(model, error, what, lambda task=task: runtime.switch(model, collection, task))
        assert runtime.find(model).task == "task0"
    with_dora = Tiny()
    runtime.load(with_dora, collection, "task3")
    refused(
        with_dora,
        UnsupportedError,
        "task0.*plain LoRA.*DoRA.*adapter_name",
        lambda: runtime.switch(with_dora, collection, "task0"),
    )


def test_a_payload_that_cannot_be_decoded_leaves_the_old_task_whole(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {}, {})
    model = Tiny()
    runtime.load(model, collection, "task0")
    said = run(model)

    class Broken(Collection):
        def load(self, task: str, **options: Any) -> Any:
            loaded = super().load(task, **options)
            loaded.arena[:] = 0xFF  # half a reconstruction, then
            raise RmmError("cannot decode")

    broken = Broken(collection._native, collection.path)
    refused(model, RmmError, "decode", lambda: runtime.switch(model, broken, "task1"))
    assert torch.equal(run(model), said)


def test_models_that_do_not_fit_are_left_alone(tmp_path: Path) -> None:
    collection = collection_of(
        tmp_path,
        {"target_modules": ["up"], "modules_to_save": ["head"]},
        {"target_modules": ["emb", "conv"]},
    )

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Tiny()

    def attempt(model: nn.Module, task: str, error: type[RmmError], what: str, **o: Any) -> None:
        refused(model, error, what, lambda: runtime.load(model, collection, task, **o))
        assert not hasattr(model, "peft_config")

    attempt(Outer(), "task0", NotFoundError, r"'up'.*no such module.*body\.up")
    attempt(Tiny(width=4), "task0", ShapeError, "from 8 to 12.*from 4 to 12")
    attempt(Tiny(n_labels=5), "task0", ShapeError, r"head.*\(3,.*\(5,.*num_labels")
    runtime.load(Tiny(n_labels=5), collection, "task0", private=False)
    swapped = Tiny()
    swapped.emb = nn.Linear(11, 8)  # type: ignore[assignment]
    attempt(swapped, "task1", ShapeError, "an embedding from 11 to 8.*a linear map from 11 to 8")
    odd = Tiny()
    odd.up = nn.Bilinear(8, 8, 12)  # type: ignore[assignment]
    attempt(odd, "task0", UnsupportedError, "'up' is a Bilinear")
    attempt(Tiny(), "task0", OptionError, "rank 4.*max_rank=3", max_rank=3)
    attempt(Tiny(), "task0", OptionError, "cannot be the name", adapter_name="a.b")


class Unknown(nn.Module):
    """Looks like a linear module, and PEFT does not know it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 12
        self.weight = nn.Parameter(torch.zeros(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_what_peft_refuses_half_way_is_undone(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {"target_modules": ["emb", "up"]})
    model = Tiny()
    model.up = Unknown()  # type: ignore[assignment]
    refused(
        model, UnsupportedError, "PEFT cannot", lambda: runtime.load(model, collection, "task0")
    )
    assert not hasattr(model, "peft_config")
    with_another = Tiny()
    with_another.up = Unknown()  # type: ignore[assignment]
    with_another = get_peft_model(with_another, LoraConfig(r=2, target_modules=["mix", "emb"]))
    refused(
        with_another,
        UnsupportedError,
        "PEFT cannot",
        lambda: runtime.load(with_another, collection, "task0"),
    )
    assert list(with_another.peft_config) == ["default"]
    assert with_another.active_adapters == ["default"]
    run(with_another)


def test_rows_of_an_embedding_are_refused_by_name(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {"trainable_token_indices": {"emb": [1, 2]}})
    model = Tiny()
    refused(
        model,
        UnsupportedError,
        "emb.*rows.*rmm export",
        lambda: runtime.load(model, collection, "task0"),
    )
    runtime.load(model, collection, "task0", private=False)


def test_biases_have_one_writer(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {"bias": "lora_only"}, {})
    model = Tiny()
    runtime.load(model, collection, "task0")
    refused(
        model,
        UnsupportedError,
        "'rmm' writes to '(mix|up).bias'",
        lambda: runtime.load(model, collection, "task0", adapter_name="other"),
    )


def test_an_adapter_that_is_merged_or_gone(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {}, {})
    model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(NotFoundError, match=r"none.*load first"):
        runtime.switch(model, collection, "task0")
    runtime.load(model, collection, "task0")
    with pytest.raises(OptionError, match="'rmm' already"):
        runtime.load(model, collection, "task1")
    model.merge_adapter()
    refused(model, RmmError, "merged", lambda: runtime.switch(model, collection, "task1"))
    model.unmerge_adapter()
    runtime.switch(model, collection, "task1")
    model.delete_adapter("rmm")
    refused(model, RmmError, "no longer", lambda: runtime.switch(model, collection, "task0"))
    other = Tiny()
    runtime.load(other, collection, "task0")
    other.up = nn.Linear(8, 12)
    other.mix = Conv1D(8, 12)
    with pytest.raises(RmmError, match="no longer"):
        runtime.switch(other, collection, "task1")


def test_norms_that_peft_keeps_for_dora_are_forgotten(tmp_path: Path) -> None:
    collection = collection_of(tmp_path, {"use_dora": True}, {"use_dora": True, "r": 2})
    model = Tiny().eval()
    runtime.load(model, collection, "task0")
    with DoraCaching():
        for task in ("task0", "task1", "task0"):
            runtime.switch(model, collection, task)
            assert torch.allclose(run(model), peft_says(tmp_path, task), atol=1e-6)


def test_without_peft(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import rmmformat as rmm\n"
        "try: rmm.runtimes.peft.load(None, None, 'task')\n"
        "except rmm.RmmError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'rmmformat[peft]'" in done.stdout


def test_an_old_peft_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = collection_of(tmp_path, {})
    monkeypatch.setattr(peft, "__version__", "0.18.0")
    model = Tiny()
    refused(
        model,
        UnsupportedError,
        "PEFT 0.21 or later, and 0.18.0",
        lambda: runtime.load(model, collection, "task0"),
    )


# --- compiled models ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["scales that differ", "mixed ranks", "head"])
def test_switching_does_not_compile_again(case: str, tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    collection = collection_of(tmp_path, *CASES[case])
    model = Tiny().eval()
    live = runtime.load(model, collection, "task0")
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    run(compiled)
    frames = counter.frame_count
    assert frames > 0
    for task in (*collection.tasks, *collection.tasks):
        runtime.switch(compiled, collection, task)
        assert torch.allclose(run(compiled), peft_says(tmp_path, task), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == frames
    # Why the scale goes into B: PEFT's number is a constant of the compiled code.
    layer: Any = model.up
    layer.scaling[live.name] = 0.123
    run(compiled)
    assert counter.frame_count > frames


# --- tensors without copies -----------------------------------------------------------------------


def test_arrays_are_viewed_and_not_copied(tmp_path: Path) -> None:
    import ml_dtypes

    for dtype in (np.float32, np.float16, np.int64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        array = np.arange(12).astype(dtype).reshape(3, 4)
        for readonly in (False, True):
            array.flags.writeable = not readonly
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*not writable.*")
                tensor = as_tensor(array)
            assert tensor.data_ptr() == array.ctypes.data
            assert tensor.shape == (3, 4)
            assert tensor.float().tolist() == array.astype(np.float32).tolist()
