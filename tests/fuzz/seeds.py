"""Small sound sources, as the fuzzer's first inputs."""

from __future__ import annotations

import io
import json
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

PREFIX = "base_model.model."
QUERY, HEAD, TABLE = "layer.0.query", "classifier", "embeddings.word"


def _array(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _tensors(dtype: Any = np.float32) -> dict[str, Any]:
    return {
        f"{PREFIX}{QUERY}.lora_A.weight": _array((2, 3), dtype),
        f"{PREFIX}{QUERY}.lora_B.weight": _array((4, 2), dtype, 1),
    }


def adapter() -> bytes:
    """Weights of one linear target and of a head."""
    return save({**_tensors(), f"{PREFIX}{HEAD}.weight": _array((2, 4))})


def adapters() -> list[bytes]:
    """Weights with what LoRA adapters can carry."""
    extra = {
        f"{PREFIX}{QUERY}.lora_magnitude_vector": _array((4,)),
        f"{PREFIX}{TABLE}.lora_embedding_A": _array((2, 5)),
        f"{PREFIX}{TABLE}.lora_embedding_B": _array((3, 2)),
        f"{PREFIX}conv.lora_A.weight": _array((2, 3, 2, 2)),
        f"{PREFIX}conv.lora_B.weight": _array((4, 2, 1, 1)),
        f"{PREFIX}{QUERY}.lora_B.bias": _array((4,)),
        f"{PREFIX}{HEAD}.bias": np.arange(3),
    }
    half = _tensors(np.float16) | {f"{PREFIX}{HEAD}.w": _array((2,), ml_dtypes.bfloat16)}
    return [adapter(), save({**_tensors(), **extra}), save(half, {"format": "pt"}), save({})]


def configs() -> list[bytes]:
    """Configurations: the plainest, and one with most fields in use."""
    plain: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query"],
        "modules_to_save": [HEAD],
        "task_type": "SEQ_CLS",
    }
    rich = plain | {
        "use_rslora": True,
        "use_dora": False,
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"query": 8},
        "fan_in_fan_out": True,
        "bias": "none",
        "layers_to_transform": [0],
        "layers_pattern": "layer",
        "init_lora_weights": "gaussian",
        "inference_mode": True,
        "exclude_modules": None,
        "auto_mapping": {"base_model_class": "X"},
        "revision": None,
        "lora_dropout": 0.1,
    }
    return [json.dumps(plain).encode(), json.dumps(rich).encode()]


SHARDS = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors")


def shards() -> dict[str, bytes]:
    """Weights in two files."""
    parts = list(_tensors().items())
    return {name: save(dict([part])) for name, part in zip(SHARDS, parts, strict=True)}


def indices() -> list[bytes]:
    """The file that says which tensor is in which shard."""
    names = dict(zip(_tensors(), SHARDS, strict=True))
    return [json.dumps({"metadata": {"total_size": 56}, "weight_map": names}).encode()]


def pickles() -> list[bytes]:
    """What `torch.save` writes, in its present and its old form."""
    import torch

    state = {name: torch.from_numpy(array) for name, array in _tensors().items()}
    found = []
    for new in (True, False):
        for value in (state, {"x": torch.zeros(2, dtype=torch.bfloat16)}):
            stream = io.BytesIO()
            torch.save(value, stream, _use_new_zipfile_serialization=new)
            found.append(stream.getvalue())
    return found


def kohya() -> list[bytes]:
    """Weights under the names of kohya's trainer."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    linear = {
        f"{name}.lora_down.weight": _array((2, 3)),
        f"{name}.lora_up.weight": _array((4, 2)),
        f"{name}.alpha": np.array(1.0, np.float32),
    }
    conv = {
        "lora_unet_conv_in.lora_down.weight": _array((2, 3, 3, 3)),
        "lora_unet_conv_in.lora_up.weight": _array((4, 2, 1, 1)),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": _array((2, 3), np.float16),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": _array((4, 2), np.float16),
    }
    return [
        save(linear),
        save({**linear, **conv}, {"ss_network_dim": "2", "ss_base_model_version": "sd"}),
    ]


def checkpoints() -> list[bytes]:
    """A base model, and fine-tunes of it."""
    base = {
        "layer.0.q.weight": _array((6, 5)),
        "layer.0.q.bias": _array((6,)),
        "layer.0.norm.weight": _array((5,)),
        "embeddings.word.weight": _array((9, 5)),
    }
    tuned = base | {
        "layer.0.q.weight": base["layer.0.q.weight"] + _array((6, 5), seed=1),
        "layer.0.norm.weight": base["layer.0.norm.weight"] * 2,
        "classifier.weight": _array((2, 5)),
    }
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tuned.items()}
    return [save(base), save(tuned), save(half, {"format": "pt"})]


def llama_base() -> dict[str, bytes]:
    """What the GGUF importer asks of a base model."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    return {"config.json": json.dumps(config).encode()}


def ggufs() -> list[bytes]:
    """LoRA adapters in GGUF."""
    import tempfile
    from pathlib import Path

    import gguf

    found = []
    for dtype in (np.float32, np.float16):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.gguf"
            writer = gguf.GGUFWriter(str(path), "llama")
            writer.add_string("general.type", "adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", 4.0)
            for module in ("attn_q", "attn_v", "ffn_up"):
                writer.add_tensor(f"blk.0.{module}.weight.lora_a", _array((2, 32), dtype))
                writer.add_tensor(f"blk.0.{module}.weight.lora_b", _array((32, 2), dtype))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            found.append(path.read_bytes())
    return found
