"""PEFT itself as the judge: its deltas against ours, and what it loads of what we write.

Adapters are made by PEFT on tiny models with a layer of every kind, filled with random numbers,
and saved by PEFT.  Then every delta must be PEFT's, and PEFT must load our export to the same
parameters, with none missing and none left over.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from rmmformat.converters import get_exporter
from rmmformat.model import Role, TargetKind

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

from torch import nn  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 10)
        self.k = nn.Linear(6, 6, bias=False)
        self.gpt = Conv1D(6, 4)  # weight (4, 6)
        self.square = Conv1D(4, 4)


class Tiny(nn.Module):
    """A layer of every kind that LoRA adapts; it is never run."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.conv1 = nn.Conv1d(3, 5, 3)
        self.conv2 = nn.Conv2d(3, 5, (3, 2), padding=1)
        self.point = nn.Conv2d(3, 5, 1)
        self.conv3 = nn.Conv3d(2, 4, (1, 2, 3))
        self.attn = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))

    def forward(self, x):
        raise NotImplementedError


def tiny():
    torch.manual_seed(7)
    return Tiny()


def make(folder, model=None, dtype=torch.float32, **settings):
    """Let PEFT make and save an adapter of random numbers; returns the model with it."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **settings})
    model = peft.get_peft_model(tiny() if model is None else model, config)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn_like(parameter).abs() + 0.1)
                parameter.data = parameter.data.to(dtype)
            elif name.endswith(".bias") and "original_module" not in name:
                bias = settings.get("bias", "none")
                if bias == "all" or (bias == "lora_only" and "base_layer" in name):
                    parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


def check_deltas(kit, model, task):
    """Compare every delta with PEFT's own, oriented as the base weight is."""
    seen = set()
    for path, module in model.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight") or "default" not in getattr(module, "r", {}):
            continue
        name = path.replace(".base_layer.", ".")
        delta = kit.delta(task, name)
        shape = task.targets[name].shape
        if shape.transposed or shape.kind is TargetKind.EMBEDDING:
            delta = delta.T
        theirs = module.get_delta_weight("default").detach().double().numpy()
        np.testing.assert_allclose(delta.reshape(theirs.shape), theirs, rtol=2e-6, atol=1e-6)
        assert task.targets[name].scale == module.scaling["default"]
        seen.add(name)
    assert seen == set(task.targets)


def adapter_state(model):
    """Every parameter that is not the untouched base's, by PEFT's full name."""
    state = model.state_dict()
    return {
        k: v for k, v in state.items() if "lora_" in k or "to_save." in k or "tokens_delta" in k
    }


def check_loads(model, out, base=tiny):
    """Let PEFT load an export; every parameter must be the model's, and no warning given."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|unused).*")
        loaded = peft.PeftModel.from_pretrained(
            base(), str(out), torch_device="cpu", autocast_adapter_dtype=False
        )
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    for (path, one), (_, other) in zip(model.named_modules(), loaded.named_modules(), strict=True):
        if hasattr(one, "scaling"):
            assert other.scaling["default"] == pytest.approx(one.scaling["default"], rel=1e-12), (
                path
            )


CASES = {
    "linear": {"target_modules": ["q", "k"]},
    "regex": {"target_modules": r"layers\.[01]\.(q|k)"},
    "fan_in_fan_out": {"target_modules": ["gpt", "square"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed", "q"]},
    "embedding_fan": {"target_modules": ["embed", "gpt"], "fan_in_fan_out": True},
    "conv": {"target_modules": ["conv1", "conv2", "point", "conv3"]},
    "attention": {"target_modules": ["attn"]},
    "rslora": {"target_modules": ["q"], "use_rslora": True, "r": 3, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q", "k"],
        "rank_pattern": {"layers.0.q": 4, "^layers.1.k": 3, "k": 1},
        "alpha_pattern": {r"layers\.[12]\.q": 10, "q": 7, "nothing": 1},
    },
    "patterns_rslora": {
        "target_modules": ["q", "k"],
        "use_rslora": True,
        "rank_pattern": {"q": 4},
        "alpha_pattern": {"1.q": 0.5},
    },
    "layers": {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded": {"target_modules": ["q", "k"], "exclude_modules": ["layers.1.q"]},
    "head": {"target_modules": ["q"], "modules_to_save": ["head", "norm"]},
    "dora": {"target_modules": ["q", "k"], "use_dora": True},
    "dora_conv": {"target_modules": ["conv2", "embed"], "use_dora": True},
    "lora_bias": {"target_modules": ["q", "conv2"], "lora_bias": True},
    "bias_lora_only": {"target_modules": ["q", "attn"], "bias": "lora_only"},
    "bias_all": {"target_modules": ["q"], "bias": "all", "modules_to_save": ["head"]},
    "tokens": {"target_modules": ["q"], "trainable_token_indices": {"embed": [1, 5]}},
    "alpha_zero": {"target_modules": ["q"], "lora_alpha": 0},
    "alpha_negative": {"target_modules": ["q"], "lora_alpha": -1.7},
    "velora": {"target_modules": ["q"], "velora_config": {"num_groups": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_deltas_are_pefts_and_peft_loads_the_export(kit, case):
    folder = kit.root / case
    model = make(folder, **CASES[case])
    task = kit.open(folder)
    check_deltas(kit, model, task)
    get_exporter("peft").export(task, kit.root / "out")
    check_loads(model, kit.root / "out")
    # Going round changes nothing: neither values nor config.
    again = kit.open(kit.root / "out")
    assert again.targets == task.targets
    assert again.privates == task.privates
    assert again.config_text == task.config_text


class Bare:
    """A task as another format gives it: without PEFT's config."""

    def __init__(self, task, **changes):
        self._task = task
        self.config_text = ""
        self.__dict__.update(changes)

    def __getattr__(self, name):
        return getattr(self._task, name)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("tokens", "velora")])
def test_peft_loads_an_export_with_a_config_written_anew(kit, case):
    folder = kit.root / case
    model = make(folder, **CASES[case])
    task = kit.open(folder)
    get_exporter("peft").export(Bare(task), kit.root / "out")
    out = json.loads((kit.root / "out" / "adapter_config.json").read_text())
    assert not out.get("use_rslora")
    loaded = peft.PeftModel.from_pretrained(
        tiny(), str(kit.root / "out"), torch_device="cpu", autocast_adapter_dtype=False
    )
    theirs = adapter_state(model)
    ours = adapter_state(loaded)
    for name, value in theirs.items():
        if "modules_to_save" not in name:
            assert torch.equal(ours[name], value), name
    check_deltas(kit, loaded, task)
    saved = {n for n, i in task.privates.items() if i.role is Role.MODULE}
    for name in saved:
        owner, _, leaf = name.rpartition(".")
        wrapper = loaded.base_model.model.get_submodule(owner)
        value = wrapper.modules_to_save["default"].state_dict()[leaf]
        np.testing.assert_array_equal(value.numpy(), task.private_tensor(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_travels_bit_for_bit(kit, dtype):
    model = make(kit.root / "a", dtype=dtype, target_modules=["q", "conv2", "embed"])
    task = kit.open(kit.root / "a")
    assert task.targets["layers.0.q"].dtype_a.name == str(dtype).removeprefix("torch.")
    get_exporter("peft").export(task, kit.root / "out")
    check_loads(model, kit.root / "out")


def test_pickled_adapter_equals_the_safetensors_one(kit):
    model = make(kit.root / "a", target_modules=["q", "embed", "conv2"])
    model.save_pretrained(str(kit.root / "b"), safe_serialization=False)
    assert (kit.root / "b" / "adapter_model.bin").exists()
    one, other = kit.open(kit.root / "a"), kit.open(kit.root / "b", allow_pickle=True)
    assert other.targets == one.targets
    check_deltas(kit, model, other)
    get_exporter("peft").export(other, kit.root / "out")
    check_loads(model, kit.root / "out")


def test_vocabulary_that_was_resized(kit):
    def larger():
        model = tiny()
        model.embed = nn.Embedding(15, 6)
        return model

    model = make(kit.root / "a", model=larger(), target_modules=["embed", "q"])
    tasks = [kit.open(kit.root / "a")]
    make(kit.root / "b", target_modules=["embed", "q"])
    tasks.append(kit.open(kit.root / "b"))
    assert [task.targets["embed"].shape.n_in for task in tasks] == [15, 11]
    check_deltas(kit, model, tasks[0])


def test_embedding_saved_beside_its_adapter_comes_back(kit):
    model = make(kit.root / "a", target_modules=["embed", "q"])
    key = "base_model.model.embed.base_layer.weight"
    with torch.no_grad():
        model.state_dict()[key].fill_(3.5)
    from safetensors.torch import load_file, save_file

    weights = kit.root / "a" / "adapter_model.safetensors"
    save_file({**load_file(weights), key: model.state_dict()[key]}, weights)
    task = kit.open(kit.root / "a")
    assert task.privates["embed.weight"].role is Role.MODULE
    get_exporter("peft").export(task, kit.root / "out")
    check_loads(model, kit.root / "out")


def test_stacked_wrappers_load_under_one_prefix(kit):
    from safetensors.torch import load_file, save_file

    model = make(kit.root / "a", target_modules=["q"])
    weights = kit.root / "a" / "adapter_model.safetensors"
    save_file({f"base_model.model.{k}": v for k, v in load_file(weights).items()}, weights)
    get_exporter("peft").export(kit.open(kit.root / "a"), kit.root / "out")
    check_loads(model, kit.root / "out")


def test_merged_weights_are_the_base_plus_our_delta(kit):
    model = make(
        kit.root / "a", target_modules=["q", "gpt", "square", "embed"], fan_in_fan_out=True
    )
    task = kit.open(kit.root / "a")
    base, merged = tiny(), model.merge_and_unload()
    for name, info in task.targets.items():
        delta = kit.delta(task, name)
        if info.shape.transposed != (info.shape.kind is TargetKind.EMBEDDING):
            delta = delta.T
        if isinstance(base.get_submodule(name), nn.Linear):
            delta = kit.delta(task, name)  # PEFT overrules the config where it is a Linear
        weight = base.get_submodule(name).weight.detach().double().numpy()
        result = merged.get_submodule(name).weight.detach().double().numpy()
        np.testing.assert_allclose(weight + delta, result, rtol=2e-6, atol=2e-6)


def test_real_adapter_in_a_real_model(kit, demo):
    transformers = pytest.importorskip("transformers")

    def bert():
        torch.manual_seed(3)
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=30,
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=64,
                num_labels=5,
            )
        ).eval()

    theirs = peft.PeftModel.from_pretrained(bert(), str(demo / "bbc"), torch_device="cpu").eval()
    task = kit.open(demo / "bbc")
    get_exporter("peft").export(task, kit.root / "out")
    ours = peft.PeftModel.from_pretrained(bert(), str(kit.root / "out"), torch_device="cpu").eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected, got, plain = theirs(ids).logits, ours(ids).logits, bert()(ids).logits
    assert torch.equal(got, expected)
    assert not torch.allclose(plain, expected, atol=1e-2)
    for name, info in list(task.targets.items())[:2]:
        module = theirs.base_model.model.get_submodule(name)
        delta = module.get_delta_weight("default").detach().double().numpy()
        np.testing.assert_allclose(kit.delta(task, name), delta, rtol=1e-5, atol=1e-7)
        assert info.scale == 2.0


def test_dropping_the_head_leaves_an_adapter_that_peft_loads(kit, demo):
    from rmmformat.converters import Options

    task = kit.open(demo / "imdb")
    get_exporter("peft").export(task, kit.root / "out", options=Options(drop_private=True))
    config = json.loads((kit.root / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    transformers = pytest.importorskip("transformers")
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=30,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=64,
        )
    )
    model = peft.PeftModel.from_pretrained(base, str(kit.root / "out"), torch_device="cpu")
    module = model.base_model.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    expected = task.factors("bert.encoder.layer.0.attention.self.query").A.astype(np.float32)
    np.testing.assert_array_equal(module.lora_A["default"].weight.detach().numpy(), expected)
