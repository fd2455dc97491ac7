"""A tiny Llama as transformers has it and as llama.cpp has it, and tasks trained on nothing.

These tests need llama.cpp itself: ``make test-llamacpp``.  Without it they are not collected, and
``make test-llamacpp`` fails if they are not.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("llama_cpp") is None:
    collect_ignore_glob = ["test_*.py"]

HEADS, KV_HEADS, WIDTH, MLP, BLOCKS, VOCABULARY = 4, 2, 64, 96, 2, 320
PROMPT = [1, 17, 290, 33, 4, 305, 260, 77, 12, 280, 63, 300]
MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("embed_tokens", "lm_head"),
)
# Task: what PEFT's LoraConfig gets besides the modules.
TASKS = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rslora": {"r": 8, "lora_alpha": 12, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"k_proj": 2, "down_proj": 16},
        "alpha_pattern": {"v_proj": 3, "lm_head": 6, "embed_tokens": 5},
    },
    "zero": {"r": 8, "lora_alpha": 0},
    "some": {"r": 3, "lora_alpha": -7, "modules": ("q_proj", "down_proj", "lm_head")},
}


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float().eval()


def write_base(path, model, architecture="llama"):
    """Write the model as llama.cpp's converter would, rotary order included."""
    import gguf

    def rotary(weight, heads):
        rows, columns = weight.shape
        pairs = weight.reshape(heads, 2, rows // heads // 2, columns)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    special = [b"<unk>", b"<s>", b"</s>"]
    tokens = [*special, *(f"<0x{n:02X}>".encode() for n in range(256))]
    tokens += [f"piece{n}".encode() for n in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(n) for n in range(VOCABULARY)])
    kinds = [2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)]  # unknown, control, byte, normal
    writer.add_token_types(kinds)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.endswith("q_proj.weight"):
            array = rotary(array, HEADS)
        elif name.endswith("k_proj.weight"):
            array = rotary(array, KV_HEADS)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_adapter(folder, seed, modules=MODULES, **settings):
    """Save an adapter with random factors, and give the logits of the model that has it."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=list(modules), **settings)
    model = get_peft_model(tiny_llama(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits_of(model)


def logits_of(model):
    import torch

    with torch.inference_mode():
        return model.eval()(torch.tensor([PROMPT])).logits[0].numpy()


class World:
    """The base model, the collection of tasks, and what PEFT says that they compute."""

    def __init__(self, root: Path) -> None:
        import rmmformat

        self.root = root
        self.base = root / "base.gguf"
        model = tiny_llama()
        write_base(self.base, model)
        self.want = {None: logits_of(model)}
        for seed, (task, settings) in enumerate(TASKS.items()):
            self.want[task] = write_adapter(root / "adapters" / task, seed + 1, **settings)
        self.path = root / "tasks.rmm"
        rmmformat.convert([root / "adapters"], self.path, exact=True)

    def llama(self, **more):
        """The base in llama.cpp, with nothing in the way of exactness."""
        import llama_cpp

        return llama_cpp.Llama(
            str(self.base),
            n_ctx=64,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            flash_attn=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
            **more,
        )

    @staticmethod
    def logits(llama):
        llama.reset()
        llama.eval(PROMPT)
        return np.array(llama.scores[: len(PROMPT)])


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("llamacpp"))


@pytest.fixture
def collection(world):
    import rmmformat

    with rmmformat.open(world.path) as opened:
        yield opened
