"""What the tensors of a checkpoint are: weights that a delta can be factored for, and the rest.

A weight ``X.weight`` belongs to the target ``X``, which is the name that PEFT gives the module.  A
checkpoint does not say what sort of module that is, so names decide, as the libraries that write
such files use them:

- two axes: a linear weight (out, in); an embedding (vocabulary, width) where the module's own name
  says so (``word_embeddings``, ``embed_tokens``, ``wte``, ...); a transposed linear weight (in,
  out) for GPT-2's Conv1D modules, where the config says that the model is one of that family;
- three to five axes: a convolution (out, in, kernel...), unless it is depthwise or its "kernel" is
  too large for one (stacked experts): those have no low-rank form that a runtime knows.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Collection as AnyCollection
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rmmformat.converters.checkpoint_store import Checkpoint
from rmmformat.errors import UnsupportedError
from rmmformat.model import TargetKind, TargetShape

__all__ = [
    "as_delta",
    "as_weight",
    "base_names",
    "in_layers",
    "is_float",
    "target_of",
    "tied_output",
]

T = TypeVar("T", bound=np.generic)

_LARGEST_KERNEL = 64
#: Words of a module's name that make it an embedding, and those that unmake it.
_EMBEDDING = frozenset({"embed", "embeds", "embedding", "embeddings", "emb", "wte", "wpe"})
_NO_EMBEDDING = frozenset(
    {"out", "proj", "project", "projection", "mapping", "hidden", "norm", "linear", "dense"}
)
_EMBEDDINGS = frozenset({"shared", "relative_attention_bias"})  # T5's
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CAUSAL = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")
_OTHER_HEADS = ("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration", "WithLMHead")
_INPUTS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")
_OUTPUTS = ("lm_head", "embed_out", "output", "decoder", "output_projection")


def is_float(dtype: np.dtype[Any]) -> bool:
    """Say whether a tensor of this dtype is trained: a float of at least 16 bits."""
    return dtype.itemsize >= 2 and dtype.kind in "fV"


def in_layers(name: str) -> bool:
    """Say whether a name leads through a numbered layer."""
    return any(part.isdigit() for part in name.split("."))


def target_of(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], config: Mapping[str, Any]
) -> tuple[str, TargetShape] | None:
    """Name the target that a tensor is the weight of, and its shape.

    Parameters
    ----------
    name, shape, dtype
        Of the tensor.
    config
        The model's ``config.json``, as far as there is one.

    Returns
    -------
    target, shape
        None for what is not such a weight.

    Raises
    ------
    UnsupportedError
        The weight may be transposed, and there is no config that would tell.
    """
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or not module or not is_float(dtype) or 0 in shape:
        return None
    own = module.rpartition(".")[2]
    if len(shape) == 2:
        rows, columns = shape
        if _is_embedding(own):
            return module, TargetShape(rows, columns, TargetKind.EMBEDDING)
        if own in _CONV1D:
            if "model_type" not in config:
                raise UnsupportedError(
                    f"{name!r} may be stored as (out, in) or, as in GPT-2, (in, out)",
                    hint="Put the model's config.json beside the weights.",
                )
            if config["model_type"] in _CONV1D_MODELS:
                return module, TargetShape(rows, columns, TargetKind.LINEAR, transposed=True)
        return module, TargetShape(columns, rows)
    if 3 <= len(shape) <= 5 and shape[1] > 1 and max(shape[2:]) <= _LARGEST_KERNEL:
        kernel = shape[2:]
        n_in = shape[1] * math.prod(kernel)
        return module, TargetShape(n_in, shape[0], TargetKind.CONV, kernel=kernel)
    return None


def _is_embedding(own: str) -> bool:
    words = set(re.split(r"[_\d]+", own.lower()))
    return own in _EMBEDDINGS or bool(words & _EMBEDDING and not words & _NO_EMBEDDING)


def as_delta(weight: npt.NDArray[T], shape: TargetShape) -> npt.NDArray[T]:
    """View a stored weight, or a difference of two, as a delta (n_out, n_in)."""
    if shape.transposed or shape.kind is TargetKind.EMBEDDING:
        return weight.T
    return weight.reshape(shape.n_out, shape.n_in)


def as_weight(delta: npt.NDArray[T], shape: TargetShape) -> npt.NDArray[T]:
    """View a delta (n_out, n_in) in the shape of the stored weight."""
    if shape.transposed or shape.kind is TargetKind.EMBEDDING:
        return delta.T
    inner = shape.n_in // math.prod(shape.kernel)
    return delta.reshape(shape.n_out, inner, *shape.kernel) if shape.kernel else delta


def base_names(names: AnyCollection[str], base: AnyCollection[str]) -> dict[str, str]:
    """Find the base's name of each tensor.

    A base saved without a head lacks the prefix that the fine-tuned model has, or has one that it
    lacks (``bert.encoder...`` and ``encoder...``).  The prefix under which most names are found
    decides, none at all being preferred.

    Parameters
    ----------
    names
        Tensors of the fine-tune, or any tensor names of its model.
    base
        Tensors of the base.

    Returns
    -------
    dict
        Those of `names` that the base has, under its names.
    """
    known = set(base)
    found = [{name: name for name in names if name in known}]
    for count_from, add in ((names, False), (base, True)):
        heads = collections.Counter(name.partition(".")[0] for name in count_from)
        for head, _ in heads.most_common(8):
            prefix = f"{head}."
            if add:
                renamed = {name: prefix + name for name in names}
            else:
                renamed = {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)}
            found.append({name: other for name, other in renamed.items() if other in known})
    return max(found, key=len)


def tied_output(
    checkpoint: Checkpoint, config: Mapping[str, Any]
) -> tuple[tuple[str, ...], str | None]:
    """Find the input embedding that is also the output weight, where only the input is stored.

    Returns
    -------
    embeddings, output
        Tensor names, none if there is no such sharing: the config says so, or has no language
        model's head, or both weights are stored.  The name of the module that shares the weight;
        None where the architecture does not tell or several embeddings could be meant.
    """
    given = config.get("architectures") or []
    architectures = [given] if isinstance(given, str) else given
    causal = any(a.endswith(_CAUSAL) for a in architectures)
    if not config.get("tie_word_embeddings", True) or not (
        causal or any(a.endswith(_OTHER_HEADS) for a in architectures)
    ):
        return (), None
    modules = {
        name.removesuffix(".weight"): name.removesuffix(".weight").rpartition(".")[2]
        for name in checkpoint.metas
        if name.endswith(".weight") and not in_layers(name)
    }
    if not set(_OUTPUTS).isdisjoint(modules.values()):
        return (), None
    inputs = tuple(f"{module}.weight" for module, own in modules.items() if own in _INPUTS)
    return inputs, "lm_head" if causal and len(inputs) == 1 else None
