"""How llama.cpp names and orders the weights of each model architecture: facts, in one table.

A LoRA adapter of llama.cpp adapts the weights of a base model *as llama.cpp stores them*.  Its
converter takes most of them from the original as they are, under other names.  What it changes is
here, as read in its ``conversion/*.py`` and ``src/llama-graph.cpp`` (the release that
llama-cpp-python 0.3.36 carries), by architecture:

- ``rope``: rows of the query and key projections are brought into the order of its rotary
  embedding, by :func:`rope_order`;
- ``rewritten``: weights that it splits, joins, scales or reorders in other ways.  A low-rank pair
  for such a weight has no counterpart in the original model (or only one that the adapter does not
  tell); pairs for these are refused;
- the graph applies adapters in its matrix products and in the look-up of token embeddings, which
  :data:`APPLIED` lists; a pair for anything else would be loaded and have no effect.

An architecture that is not in the table is refused: its rows might be in another order.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from rmmformat.errors import UnsupportedError

__all__ = [
    "APPLIED",
    "ARCHITECTURES",
    "Architecture",
    "architecture_of_class",
    "facts",
    "rope_order",
]

#: Tensors (without ``blk.N.`` and ``.weight``) to which llama.cpp applies a low-rank pair.
APPLIED = frozenset(
    (
        *("token_embd", "output"),
        *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "attn_gate"),
        *("ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp"),
        *("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
        *("shortconv.in_proj", "shortconv.out_proj"),
    )
)

_DECODER = ("lm_head", "model.layers.", "model.embed_tokens")
_SHARED = ("model.layers.{bid}.mlp.shared_experts.", *_DECODER)
_GPT = ("transformer.", "lm_head")
_FALCON = (
    "transformer.h.{bid}.self_attention.",
    "transformer.h.{bid}.mlp.dense_",
    "transformer.word_embeddings",
    "lm_head",
)
_FEED = ("model.layers.{bid}.feed_forward.", *_DECODER)
_GATED = ("model.layers.{bid}.self_attn.qkv_proj", "model.layers.{bid}.mlp.gate_up_proj", *_DECODER)
_QKV = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_LINEAR_ATTENTION = ("attn_qkv", "attn_gate", "ssm_in", "ssm_out")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is special about one architecture.

    Parameters
    ----------
    classes
        Hugging Face model classes that llama.cpp converts to it.
    prefer
        Beginnings of module paths, in order of preference: of the names that the gguf package
        lists for a tensor, the first one that begins so is the tensor's name here.
    rope
        Rows of query and key are in rotary order.
    rewritten
        Tensors that have no counterpart in the original model.
    encoder
        Token embeddings are only looked up: no head shares them.
    """

    classes: tuple[str, ...] = ()
    prefer: tuple[str, ...] = _DECODER
    rope: bool = False
    rewritten: tuple[str, ...] = ()
    encoder: bool = False


def _for(*families: str) -> tuple[str, ...]:
    return tuple(f"{family}ForCausalLM" for family in families)


_ENCODER_CLASSES = tuple(
    f"{family}{ending}"
    for family in ("Bert", "DistilBert", "Roberta", "XLMRoberta")
    for ending in ("Model", "ForMaskedLM", "ForSequenceClassification")
)

ARCHITECTURES: dict[str, Architecture] = {
    # rotary order
    "llama": Architecture(_for("Llama", "Mistral", "Mixtral"), rope=True),
    "llama-embed": Architecture(rope=True),
    "arcee": Architecture(_for("Arcee"), rope=True),
    "smollm3": Architecture(_for("SmolLM3"), rope=True),
    "mistral3": Architecture(
        ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"), rope=True
    ),
    "granite": Architecture(_for("Granite"), rope=True),
    "granitemoe": Architecture(_for("GraniteMoe"), rope=True),
    "deepseek": Architecture(prefer=_SHARED, rope=True),
    "minicpm": Architecture(("MiniCPMForCausalLM",), rope=True),
    "olmo": Architecture(_for("Olmo"), rope=True),
    "deci": Architecture(rope=True),
    # as in the original
    "afmoe": Architecture(_for("Afmoe"), prefer=_SHARED),
    "apertus": Architecture(_for("Apertus")),
    "chatglm": Architecture(_for("Glm"), prefer=_GATED),
    "codeshell": Architecture(prefer=_GPT),
    "cohere2": Architecture(_for("Cohere2")),
    "command-r": Architecture(_for("Cohere")),
    "dots1": Architecture(_for("Dots1"), prefer=_SHARED),
    "dream": Architecture(),
    "ernie4_5": Architecture(_for("Ernie4_5")),
    "ernie4_5-moe": Architecture(_for("Ernie4_5_Moe"), prefer=_SHARED),
    "exaone": Architecture(prefer=_GPT),
    "exaone-moe": Architecture(_for("ExaoneMoe"), prefer=_SHARED),
    "exaone4": Architecture(_for("Exaone4")),
    "gemma": Architecture(_for("Gemma")),
    "gemma-embedding": Architecture(prefer=("layers.", "embed_tokens"), encoder=True),
    "gemma2": Architecture(_for("Gemma2")),
    "gemma3": Architecture(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")),
    "glm4moe": Architecture(_for("Glm4Moe"), prefer=_SHARED),
    "gpt-oss": Architecture(_for("GptOss")),
    "hunyuan-dense": Architecture(_for("HunYuanDenseV1")),
    "hunyuan-moe": Architecture(_for("HunYuanMoEV1")),
    "jais2": Architecture(_for("Jais2")),
    "lfm2": Architecture(_for("Lfm2"), prefer=("model.layers.{bid}.self_attn.out_proj", *_FEED)),
    "llama4": Architecture(("Llama4ForCausalLM", "Llama4ForConditionalGeneration"), prefer=_FEED),
    "llada-moe": Architecture(),
    "maincoder": Architecture(),
    "mimo2": Architecture(),
    "minimax-m2": Architecture(_for("MiniMaxM2")),
    "mpt": Architecture(_for("Mpt"), prefer=("transformer.blocks.", "transformer.wte", "lm_head")),
    "nemotron": Architecture(_for("Nemotron")),
    "olmo2": Architecture(_for("Olmo2", "Olmo3")),
    "olmoe": Architecture(_for("Olmoe")),
    "orion": Architecture(),
    "pangu-embedded": Architecture(),
    "phi2": Architecture(
        _for("Phi"),
        prefer=("model.layers.{bid}.self_attn.dense", "model.layers.{bid}.mlp.fc", *_DECODER),
    ),
    "phi3": Architecture(_for("Phi3"), prefer=_GATED),
    "phimoe": Architecture(_for("Phimoe")),
    "qwen": Architecture(prefer=_GPT),
    "qwen2": Architecture(_for("Qwen2")),
    "qwen2moe": Architecture(_for("Qwen2Moe")),
    "qwen2vl": Architecture(("Qwen2VLForConditionalGeneration",)),
    "qwen3": Architecture(_for("Qwen3")),
    "qwen3moe": Architecture(_for("Qwen3Moe")),
    "qwen3vl": Architecture(("Qwen3VLForConditionalGeneration",)),
    "qwen3vlmoe": Architecture(("Qwen3VLMoeForConditionalGeneration",)),
    "seed_oss": Architecture(_for("SeedOss")),
    "smallthinker": Architecture(),
    "stablelm": Architecture(_for("StableLm")),
    "starcoder": Architecture(_for("GPTBigCode"), prefer=_GPT),
    "starcoder2": Architecture(_for("Starcoder2"), prefer=("model.layers.{bid}.mlp.c_", *_DECODER)),
    # encoders
    "bert": Architecture(_ENCODER_CLASSES, prefer=("encoder.layer.", "embeddings."), encoder=True),
    "jina-bert-v2": Architecture(prefer=("encoder.layer.", "embeddings."), encoder=True),
    "modern-bert": Architecture(
        ("ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification"),
        prefer=("layers.{bid}.attn.", "layers.{bid}.mlp.W", "embeddings.tok_embeddings"),
        encoder=True,
    ),
    "eurobert": Architecture(("EuroBertModel",), prefer=("layers.", "embed_tokens"), encoder=True),
    # some weights rewritten
    "baichuan": Architecture(rewritten=_QKV),
    "bloom": Architecture(
        ("BloomForCausalLM", "BloomModel"),
        prefer=_FALCON,
        rewritten=("attn_qkv",),
    ),
    "falcon": Architecture(_for("Falcon"), prefer=_FALCON, rewritten=("attn_qkv",)),
    "gptneox": Architecture(
        _for("GPTNeoX"), prefer=("gpt_neox.", "lm_head"), rewritten=("attn_qkv",)
    ),
    # Vision models share the name and have their rows in another order.
    "glm4": Architecture(_for("Glm4"), prefer=_GATED, rewritten=("attn_q", "attn_k")),
    "internlm2": Architecture(
        prefer=(
            "model.layers.{bid}.attention.",
            "model.layers.{bid}.feed_forward.",
            "model.tok_embeddings",
            "output",
        ),
        rewritten=_QKV,
    ),
    "openelm": Architecture(prefer=_GPT, rewritten=("ffn_gate", "ffn_up")),
    "qwen35": Architecture(_for("Qwen3_5"), rewritten=_LINEAR_ATTENTION),
    "qwen35moe": Architecture(_for("Qwen3_5Moe"), rewritten=_LINEAR_ATTENTION),
    "qwen3next": Architecture(_for("Qwen3Next"), rewritten=_LINEAR_ATTENTION),
    "refact": Architecture(prefer=_GPT, rewritten=("attn_k", "attn_v", "ffn_gate", "ffn_up")),
}

_BY_CLASS = {name: arch for arch, facts in ARCHITECTURES.items() for name in facts.classes}


def architecture_of_class(name: str) -> str | None:
    """Name llama.cpp's architecture for a Hugging Face model class; None where it is not known."""
    return _BY_CLASS.get(name)


def facts(architecture: str, path: str) -> Architecture:
    """Look an architecture up.

    Raises
    ------
    UnsupportedError
        It is not in the table.
    """
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {architecture[:64]!r}: how llama.cpp orders its weights is not known "
            "here",
            path=path,
            hint=f"Known: {', '.join(sorted(ARCHITECTURES))}.",
        )
    return ARCHITECTURES[architecture]


def rope_order(n_rows: int, n_heads: int) -> npt.NDArray[np.intp]:
    """Give the order of llama.cpp's query or key rows.

    Both halves of a head's rotary pairs are interleaved: row 2i of a head is the original's i, row
    2i + 1 its i + d/2.

    Parameters
    ----------
    n_rows
        Rows of the projection: heads times their width d, which is even.
    n_heads
        Heads of the query, or of the key where that has fewer.

    Returns
    -------
    (n_rows,) such that ``theirs = ours[order]``, and ``ours[order] = theirs`` undoes it.

    Source: ``LlamaModel.permute`` of llama.cpp's converter says the same of whole weights; as rows
    of a weight are rows of factor B, nothing changes in A.
    """
    half = n_rows // n_heads // 2
    order = np.arange(n_rows).reshape(n_heads, 2, half)
    return np.ascontiguousarray(order.swapaxes(1, 2)).reshape(-1)
