"""Adding an adapter to a model and taking it out again, either wholly or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from rmmformat.cache import TaskCache
from rmmformat.errors import NotFoundError, OptionError, UnsupportedError
from rmmformat.runtimes.peft_live import LiveAdapter, Source
from rmmformat.runtimes.peft_modules import base_of, find_place, remove_adapter, shape_of
from rmmformat.runtimes.peft_room import make_room

__all__ = ["add", "find", "remove"]

DEFAULT_NAME = "rmm"
_ATTRIBUTE = "_rmm_adapters"
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def add(
    model: nn.Module,
    collection: Source,
    task: str,
    *,
    name: str | None,
    tasks: Iterable[str] | None,
    max_rank: int | None,
    dtype: torch.dtype | str | None,
    private: bool,
    threads: int,
) -> LiveAdapter:
    """See :func:`rmmformat.runtimes.peft.load`."""
    name = DEFAULT_NAME if name is None else name
    base = base_of(model)
    _check_name(model, base, name)
    opened = collection.collection if isinstance(collection, TaskCache) else collection
    wanted = None if dtype is None else _dtype(dtype)

    def tensor_shape(tensor: str) -> tuple[int, ...] | None:
        place = find_place(base, tensor)
        return None if place is None else tuple(place.tensor.shape)

    room = make_room(
        opened,
        task,
        [other for other in (opened.tasks if tasks is None else tasks) if other != task],
        max_rank=max_rank,
        private=private,
        shape_of=lambda target: shape_of(base, target),
        tensor_shape=tensor_shape,
        module_names=lambda: (path for path, _ in base.named_modules()),
    )
    fields = json.loads(room.config_text(opened.source(task).base_model))
    config = LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"})
    # Not under inference mode, whose tensors nobody may write to later.
    with torch.inference_mode(False), _all_or_nothing(model, base, name):
        _inject(model, base, config, name)
        live = LiveAdapter(base, name, room, private)
        _check_shared(base, live)
        if wanted is not None or dtype is None:
            live.cast(wanted or torch.float32)
        for parameter in live.parameters():
            parameter.requires_grad_(False)
        live.switch(collection, task, threads=threads)
    base.__dict__.setdefault(_ATTRIBUTE, {})[name] = live
    return live


def find(model: nn.Module, name: str | None) -> LiveAdapter:
    """See :func:`rmmformat.runtimes.peft.find`."""
    adapters: dict[str, LiveAdapter] = base_of(model).__dict__.get(_ATTRIBUTE, {})
    if name is None and len(adapters) == 1:
        return next(iter(adapters.values()))
    if name in adapters:
        return adapters[name]
    asked = "the one meant" if name is None else f"adapter {name!r}"
    raise NotFoundError(
        f"{asked} is not among the adapters that were loaded into this model: "
        f"{', '.join(sorted(adapters)) or 'none'}",
        hint="Call rmmformat.runtimes.peft.load first, and name the adapter if there are several.",
    )


def remove(model: nn.Module, name: str | None) -> None:
    """See :func:`rmmformat.runtimes.peft.unload`."""
    live = find(model, name)
    live.check()
    live.restore_shared()
    remove_adapter(model, live.name)
    del base_of(model).__dict__[_ATTRIBUTE][live.name]


def _check_name(model: nn.Module, base: nn.Module, name: str) -> None:
    known = {key for holder in (model, base) for key in getattr(holder, "peft_config", None) or ()}
    if name in known:
        raise OptionError(
            f"the model has an adapter {name!r} already",
            hint="Use switch to change its task, or another adapter_name.",
        )
    if not name or "." in name or name.startswith("lora_") or hasattr(nn.ModuleDict, name):
        raise OptionError(f"{name!r} cannot be the name of an adapter")


def _dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """Give the dtype, or None for that of the base."""
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise OptionError(f"factors are floating point, not {dtype}")
        return dtype
    if dtype != "base" and dtype not in _DTYPES:
        raise OptionError(f"dtype is one of {', '.join(_DTYPES)}, base, not {dtype!r}")
    return _DTYPES.get(dtype)


def _inject(model: nn.Module, base: Any, config: LoraConfig, name: str) -> None:
    outer: Any = model
    while not isinstance(outer, PeftModel) and "_orig_mod" in outer._modules:
        outer = outer._modules["_orig_mod"]
    try:
        if isinstance(outer, PeftModel):
            outer.add_adapter(name, config, autocast_adapter_dtype=False)
            outer.set_adapter(name)
        else:
            inject_adapter_in_model(config, base, name)
            _activate(base, {name})
            if hasattr(base, "_hf_peft_config_loaded"):  # how transformers knows of adapters
                base._hf_peft_config_loaded = True
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UnsupportedError(f"PEFT cannot put the adapter into this model: {error}") from error


def _activate(base: nn.Module, names: set[str]) -> None:
    for module in base.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([n for n in names if n in module.modules_to_save])
        elif isinstance(module, BaseTunerLayer):
            module.set_adapter(list(names))


def _check_shared(base: nn.Module, live: LiveAdapter) -> None:
    for other in base.__dict__.get(_ATTRIBUTE, {}).values():
        both = sorted(set(live.shared) & set(other.shared))
        if both:
            raise UnsupportedError(
                f"adapter {other.name!r} writes to {both[0]!r} of the base model, too",
                hint="Load with private=False, or unload the other one.",
            )


@contextmanager
def _all_or_nothing(model: nn.Module, base: nn.Module, name: str) -> Iterator[None]:
    gradients = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    active = [
        (module, list(module.active_adapters))
        for module in base.modules()
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
    ]
    try:
        yield
    except BaseException:
        remove_adapter(model, name)
        for module, names in active:
            module.set_adapter(names)
        if active and isinstance(model, PeftModel):
            tuner: Any = model.base_model
            tuner.active_adapter = active[0][1]
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)
        raise
