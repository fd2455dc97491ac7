"""LoRA files of image models."""

from __future__ import annotations

import json

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from rmmformat.converters import Options
from rmmformat.converters.contract import UNKNOWN, Flaw, Output, Provider, Sample

F64 = np.float64


def values(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write(folder, flaw, tensors, metadata):
    tensors = {key: array.copy() for key, array in tensors.items()}
    if flaw is Flaw.EXTRA:
        tensors[UNKNOWN] = values(9, 2, 2)
    if flaw is Flaw.NAN:
        tensors[next(key for key in tensors if key.endswith("weight"))].flat[0] = np.nan
    save_file(tensors, folder / "style.safetensors", metadata=metadata)
    return folder / "style.safetensors"


def sample(name, tensors, metadata, deltas):
    items = {f"tensor {key}" for key in tensors} | {f"field {key}" for key in metadata or {}}
    return Sample(
        name, lambda folder, flaw: write(folder, flaw, tensors, metadata), deltas, frozenset(items)
    )


def product(scale, b, a):
    return scale * (b.reshape(len(b), -1).astype(F64) @ a.reshape(len(a), -1).astype(F64))


def flat():
    """A UNet and a text encoder, ranks and alphas of their own, convolutions, a magnitude."""
    modules = {
        "lora_unet_down_blocks_0_attn1_to_q": (values(1, 4, 6), values(2, 8, 4), 2.0),
        "lora_unet_mid_block_conv1": (values(3, 2, 3, 3, 3), values(4, 5, 2, 1, 1), 1.0),
        "lora_unet_mid_block_proj_in": (values(5, 3, 6, 1, 1), values(6, 6, 3, 1, 1), None),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (
            values(7, 8, 4, dtype=np.float16),
            values(8, 6, 8, dtype=np.float16),
            0.5,
        ),
    }
    tensors, deltas = {}, {}
    for module, (down, up, alpha) in modules.items():
        tensors[f"{module}.lora_down.weight"] = down
        tensors[f"{module}.lora_up.weight"] = up
        if alpha is not None:
            tensors[f"{module}.alpha"] = np.asarray(alpha, down.dtype)
        deltas[module] = product(1.0 if alpha is None else alpha / len(down), up, down)
    tensors["lora_unet_down_blocks_0_attn1_to_q.dora_scale"] = values(9, 8, 1)
    tensors["lora_unet_norm.diff"] = values(10, 8)
    tensors["bundle_emb.word.string_to_param.*"] = values(11, 2, 4)
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
        "sshs_model_hash": "0" * 64,
    }
    return sample("flat", tensors, metadata, deltas)


def dotted():
    """The spellings of diffusers, old and new, and no scale anywhere."""
    names = {
        "unet.mid_block.attn1.processor.to_out_lora.{}.weight": "unet.mid_block.attn1.to_out.0",
        "unet.mid_block.attn1.to_k.lora.{}.weight": "unet.mid_block.attn1.to_k",
        "text_encoder.layers.0.q_proj.lora_linear_layer.{}.weight": "text_encoder.layers.0.q_proj",
    }
    tensors, deltas = {}, {}
    for seed, (key, target) in enumerate(names.items()):
        down, up = values(seed, 2 + seed, 6), values(seed + 10, 4, 2 + seed)
        tensors[key.format("down")], tensors[key.format("up")] = down, up
        deltas[target] = product(1.0, up, down)
    return sample("dotted", tensors, None, deltas)


def configured():
    """Today's diffusers: lora_A and lora_B, the scale in the metadata."""
    tensors, deltas = {}, {}
    for seed, (module, scale) in enumerate({"attn.to_q": 4.0, "attn.to_k": 0.25}.items()):
        down, up = values(seed, 4, 6), values(seed + 10, 4, 4)
        tensors[f"transformer.{module}.lora_A.weight"] = down
        tensors[f"transformer.{module}.lora_B.weight"] = up
        deltas[f"transformer.{module}"] = product(scale, up, down)
    config = {
        "transformer.r": 4,
        "transformer.lora_alpha": 16,
        "transformer.alpha_pattern": {"attn.to_k": 1},
        "transformer.target_modules": ["to_q", "to_k"],
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    return sample("configured", tensors, metadata, deltas)


def read(out, task):
    """Read the file by the rules of kohya's and diffusers' loaders, with no code of ours."""
    with safe_open(out, framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    deltas = {}
    for key, down in tensors.items():
        for a, b in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            module = key.removesuffix(f".{a}.weight")
            if module == key:
                continue
            scale = 1.0
            component, _, path = module.partition(".")
            if f"{component}.r" in config:
                patterns = config.get(f"{component}.alpha_pattern", {})
                scale = patterns.get(path, config[f"{component}.lora_alpha"]) / len(down)
            if f"{module}.alpha" in tensors:
                scale = float(tensors[f"{module}.alpha"]) / len(down)
            deltas[module] = product(scale, tensors[f"{module}.{b}.weight"], down)
    back = {module: target for target, module in names(task).items()}
    return {back[module]: delta for module, delta in deltas.items()}


def foreign(target):
    known = ("lora_unet_", "lora_te_", "unet.", "transformer.", "text_encoder.")
    return target if target.startswith(known) else f"lora_unet_{target.replace('.', '_')}"


def names(task):
    return {target: foreign(target) for target in task.targets}


PROVIDER = Provider(
    "kohya",
    (flat(), dotted(), configured()),
    Output(
        "style.safetensors",
        read,
        frozenset({"kohya/flat", "kohya/dotted", "kohya/configured", "peft/plain"}),
        # Names that are given for writing would also be put back on reading.
        options=lambda task, _folder: Options(
            names={t: f for t, f in names(task).items() if t != f}
        ),
    ),
)
