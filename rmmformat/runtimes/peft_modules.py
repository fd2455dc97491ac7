"""A torch model as tasks see it: modules and tensors by the base model's names.

Targets and private tensors are called as in the base model.  PEFT puts layers of its own in between
(``base_layer``, ``modules_to_save``); these functions look through them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from rmmformat.errors import UnsupportedError
from rmmformat.model import TargetKind, TargetShape

__all__ = ["Place", "base_of", "find_module", "find_place", "remove_adapter", "shape_of"]


def base_of(model: nn.Module) -> nn.Module:
    """Give the base model inside of torch.compile's and PEFT's wrappers, in which names start."""
    while True:
        inner = model.__dict__.get("_modules", {}).get("_orig_mod")
        if inner is not None:
            model = inner
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            return model


def _enter(module: nn.Module, adapter: str | None) -> nn.Module:
    while True:
        if isinstance(module, ModulesToSaveWrapper):
            if adapter is not None and adapter in module.modules_to_save:
                module = module.modules_to_save[adapter]
            else:
                module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def find_module(base: nn.Module, name: str, adapter: str | None = None) -> nn.Module | None:
    """Find a module by its name in the base model; a tuner layer there is given as it is.

    Parameters
    ----------
    adapter
        Whose copy to follow where a module is saved in full; by default the original.
    """
    module = base
    for part in name.split(".") if name else ():
        child = _enter(module, adapter)._modules.get(part)
        if child is None:
            return None
        module = child
    return module


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lives: an entry of a module's own table, so that replacing it is seen.

    ``original`` is the base model's tensor where the place is an adapter's copy of it.
    """

    table: dict[str, Any]
    key: str
    original: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor that is there now."""
        found: torch.Tensor = self.table[self.key]
        return found


def find_place(base: nn.Module, name: str, adapter: str | None = None) -> Place | None:
    """Find a parameter or buffer by its name in the base model."""
    owner, _, leaf = name.rpartition(".")
    own, original = find_module(base, owner, adapter), find_module(base, owner)
    if own is None or original is None:
        return None
    inside, outside = _enter(own, adapter), _enter(original, None)
    for table, other in (
        (inside._parameters, outside._parameters),
        (inside._buffers, outside._buffers),
    ):
        if table.get(leaf) is not None:
            return Place(table, leaf, None if inside is outside else other[leaf])
    return None


def shape_of(base: nn.Module, name: str) -> TargetShape | None:
    """Describe the base weight of a module, or give None if there is no such module.

    Raises
    ------
    UnsupportedError
        PEFT adapts no module of that class.
    """
    found = find_module(base, name)
    if found is None:
        return None
    module = _enter(found, None)
    parent = find_module(base, name.rpartition(".")[0])
    if parent is not None and isinstance(_enter(parent, None), nn.MultiheadAttention):
        parent_shape = shape_of(base, name.rpartition(".")[0])
        if name.endswith(".out_proj") and parent_shape is not None:
            return TargetShape(parent_shape.n_in, parent_shape.n_in)
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            raise UnsupportedError(f"{name!r} has keys of another width, which PEFT does not adapt")
        return TargetShape(module.embed_dim, 3 * module.embed_dim)
    if isinstance(module, nn.Embedding):
        return TargetShape(module.num_embeddings, module.embedding_dim, TargetKind.EMBEDDING)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups != 1:
            raise UnsupportedError(f"{name!r} is a convolution in {module.groups} groups")
        n_in = module.in_channels * math.prod(module.kernel_size)
        return TargetShape(n_in, module.out_channels, TargetKind.CONV, kernel=module.kernel_size)
    sides = [getattr(module, f"{side}_features", None) for side in ("in", "out")]
    if isinstance(sides[0], int) and isinstance(sides[1], int):
        return TargetShape(sides[0], sides[1])
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):  # GPT-2's: (in, out)
        return TargetShape(weight.shape[0], weight.shape[1], transposed=True)
    raise UnsupportedError(f"{name!r} is a {type(module).__name__}, which PEFT does not adapt")


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of a model; layers that hold no other one become the base's again.

    Whichever adapters are left are as they were, and none of them is activated for it.
    """
    base: Any = base_of(model)
    for module in list(base.modules()):
        if isinstance(module, ModulesToSaveWrapper):
            if name in module.modules_to_save:
                module.delete_adapter(name, [a for a in module.active_adapters if a != name])
        elif isinstance(module, BaseTunerLayer) and name in module._get_available_adapters():
            module.delete_adapter(name)
    gone: list[str] = []
    for path, module in list(base.named_modules()):
        if any(path.startswith(f"{outer}.") for outer in gone):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            bare = None if module.modules_to_save else module.original_module
        elif isinstance(module, BaseTunerLayer):
            bare = None if module._get_available_adapters() else _unwrap(module)
        else:
            continue
        if bare is not None:
            owner, _, leaf = path.rpartition(".")
            setattr(base.get_submodule(owner), leaf, bare)
            gone.append(path)
    for holder in (model, base):
        configs = getattr(holder, "peft_config", None)
        if isinstance(configs, dict):
            configs.pop(name, None)
            if not configs and holder is base and "peft_config" in base.__dict__:
                del base.peft_config
                if "_hf_peft_config_loaded" in base.__dict__:
                    base._hf_peft_config_loaded = False


def _unwrap(module: Any) -> nn.Module:
    if hasattr(module, "unload_and_optionally_merge_module"):  # torch's multi-head attention
        bare: nn.Module = module.unload_and_optionally_merge_module(
            merge=False, safe_merge=False, adapter_names=None
        )
        return bare
    inner: nn.Module = module.get_base_layer()
    return inner
