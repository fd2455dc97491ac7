"""PEFT adapter folders."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from rmmformat.converters.contract import UNKNOWN, Flaw, Output, Provider, Sample

P = "base_model.model."
F64 = np.float64


def values(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write(folder, flaw, tensors, config, name="adapter"):
    tensors = {key: array.copy() for key, array in tensors.items()}
    if flaw is Flaw.EXTRA:
        tensors[P + UNKNOWN] = values(9, 2, 2)
    if flaw is Flaw.NAN:
        tensors[min(key for key in tensors if "lora_" in key and "vector" not in key)].flat[0] = (
            np.nan
        )
    adapter = folder / name
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, adapter / "adapter_model.safetensors")
    return adapter


def sample(name, tensors, config, deltas):
    items = {f"tensor {key}" for key in tensors} | {f"field {key}" for key in config}
    return Sample(
        name, lambda folder, flaw: write(folder, flaw, tensors, config), deltas, frozenset(items)
    )


def product(scale, b, a):
    return scale * (b.astype(F64) @ a.astype(F64))


def mixed():
    """Two targets, each with a rank, an alpha and dtypes of its own; rsLoRA; a head."""
    q = (values(1, 4, 12, dtype=np.float16), values(2, 8, 4))
    v = (values(3, 2, 12, dtype=ml_dtypes.bfloat16), values(4, 6, 2, dtype=ml_dtypes.bfloat16))
    tensors = {
        P + "layers.0.q.lora_A.weight": q[0],
        P + "layers.0.q.lora_B.weight": q[1],
        P + "layers.0.v.lora_A.weight": v[0],
        P + "layers.0.v.lora_B.weight": v[1],
        P + "score.weight": values(5, 3, 6),
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"v": 2},
        "alpha_pattern": {"v": 0.5},
        "target_modules": ["q", "v"],
        "modules_to_save": ["score"],
        "from_the_future": {"x": 1},
    }
    deltas = {
        "layers.0.q": product(6 / math.sqrt(4), q[1], q[0]),
        "layers.0.v": product(0.5 / math.sqrt(2), v[1], v[0]),
    }
    return sample("mixed", tensors, config, deltas)


def layers():
    """A convolution, an embedding, and a target whose scale is nought."""
    conv = (values(1, 2, 3, 3, 3), values(2, 5, 2, 1, 1))
    embed = (values(3, 2, 20), values(4, 6, 2))
    tensors = {
        P + "conv.lora_A.weight": conv[0],
        P + "conv.lora_B.weight": conv[1],
        P + "embed.lora_embedding_A": embed[0],
        P + "embed.lora_embedding_B": embed[1],
        P + "off.lora_A.weight": values(5, 2, 4),
        P + "off.lora_B.weight": values(6, 4, 2),
    }
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": -3.5,
        "alpha_pattern": {"off": 0},
        "target_modules": ["conv", "embed", "off"],
    }
    deltas = {
        "conv": product(-1.75, conv[1].reshape(5, 2), conv[0].reshape(2, 27)),
        "embed": product(-1.75, embed[1], embed[0]),
        "off": np.zeros((4, 4)),
    }
    return sample("layers", tensors, config, deltas)


def plain():
    """Linear targets alone, float16, no private tensor: what every runtime can take."""
    pairs = {
        f"model.layers.{n}.self_attn.{m}_proj": (
            values(n + 1, 4, 32, dtype=np.float16),
            values(n + 11, 32, 4, dtype=np.float16),
        )
        for n in range(2)
        for m in "qv"
    }
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"{P}{name}.lora_A.weight"] = a
        tensors[f"{P}{name}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    deltas = {name: product(2.0, b, a) for name, (a, b) in pairs.items()}
    return sample("plain", tensors, config, deltas)


def read(out, task):
    """Read an adapter with PEFT: ``get_delta_weight`` of a model that has just these targets."""
    import torch
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    class Head(torch.nn.Module):
        pass

    model = Head()
    model.config = {"model_type": "custom"}
    for name, info in task.targets.items():
        module = model
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, Head())
            module = getattr(module, part)
        module.add_module(leaf, layer(torch, info.shape))
    config = PeftConfig.from_pretrained(str(out))
    config.modules_to_save = None
    model = inject_adapter_in_model(config, model)
    weights = load_peft_weights(str(out), device="cpu")
    factors = {key: value.float() for key, value in weights.items() if ".lora_" in key}
    result = set_peft_model_state_dict(model, factors)
    assert not result.unexpected_keys
    deltas = {}
    for name, info in task.targets.items():
        module = model.get_submodule(name)
        delta = module.get_delta_weight("default").detach().double().numpy()
        if delta.ndim == 2 and info.shape.kind.name == "EMBEDDING":
            delta = delta.T
        deltas[name] = delta.reshape(info.shape.n_out, info.shape.n_in)
    return deltas


def layer(torch, shape):
    if shape.kind.name == "EMBEDDING":
        return torch.nn.Embedding(shape.n_in, shape.n_out)
    if shape.kind.name == "CONV":
        kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        inner = shape.n_in // math.prod(shape.kernel)
        return kinds[len(shape.kernel) - 1](inner, shape.n_out, shape.kernel)
    return torch.nn.Linear(shape.n_in, shape.n_out)


PROVIDER = Provider(
    "peft",
    (mixed(), layers(), plain()),
    Output("adapter", read, frozenset({"peft/mixed", "peft/layers", "peft/plain"}), tolerance=1e-5),
)
