"""LoRA adapters of llama.cpp, written and read with the gguf package."""

from __future__ import annotations

import json

import gguf
import numpy as np

from rmmformat.converters import Options
from rmmformat.converters.contract import UNKNOWN, Flaw, Output, Provider, Sample

HEADS, WIDTH, RANK = 4, 32, 4
TENSORS = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v"}


def values(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rotary(b):
    """The rows of a query as llama.cpp's converter orders them: halves of each head interleaved."""
    return b.reshape(HEADS, 2, len(b) // HEADS // 2, -1).swapaxes(1, 2).reshape(b.shape)


def plain(b):
    """Undo :func:`rotary`."""
    return b.reshape(HEADS, len(b) // HEADS // 2, 2, -1).swapaxes(1, 2).reshape(b.shape)


def name_of(target):
    _, _, block, module = target.split(".", 3)
    return f"blk.{block}.{TENSORS[module]}.weight"


PAIRS = {
    f"model.layers.{n}.{module}": (values(n, RANK, WIDTH), values(n + 10, WIDTH, RANK))
    for n in range(2)
    for module in TENSORS
}


def build(folder, flaw):
    path = folder / "skill.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    writer.add_uint32("llama.attention.head_count", HEADS)
    writer.add_uint32("llama.attention.head_count_kv", HEADS)
    for target, (a, b) in PAIRS.items():
        a = a.copy()
        if flaw is Flaw.NAN:
            a[0, 0] = np.nan
        writer.add_tensor(f"{name_of(target)}.lora_a", a)
        writer.add_tensor(f"{name_of(target)}.lora_b", rotary(b) if "q_proj" in target else b)
    if flaw is Flaw.EXTRA:
        writer.add_tensor(UNKNOWN, values(9, 2, 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ITEMS = {f"tensor {name_of(target)}.lora_{part}" for target in PAIRS for part in "ab"} | {
    f"field {field}"
    for field in (
        *("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"),
        *("llama.attention.head_count", "llama.attention.head_count_kv"),
    )
}
SAMPLE = Sample(
    "llama",
    build,
    {t: 1.5 * (b.astype(np.float64) @ a.astype(np.float64)) for t, (a, b) in PAIRS.items()},
    frozenset(ITEMS),
    by_name=True,
)


def read(out, task):
    reader = gguf.GGUFReader(out)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in reader.tensors
    }
    deltas = {}
    for target in task.targets:
        a, b = (tensors[f"{name_of(target)}.lora_{part}"] for part in "ab")
        b = plain(b) if "q_proj" in target else b
        deltas[target] = alpha / len(a) * (b @ a)
    return deltas


def options(_task, folder):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return Options(base=folder)


PROVIDER = Provider(
    "gguf",
    (SAMPLE,),
    Output("skill.gguf", read, frozenset({"gguf/llama", "peft/plain"}), options),
)
