"""vlora (package vlora-dev) as its own documents use it.

`SharedSubspace.from_adapters` on adapters that `load_adapter` read, then `save` or, in NF4,
`save_quantized`; `SharedSubspace.load` and `reconstruct` go back.  One thing is added: float16
adapters are widened first, because its decomposition (`torch.linalg.svd`) does not take them.
vlora keeps neither scales nor heads; deltas are compared with the adapters' own scales.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from deltas import errors_against, open_source


def read(sources: list[Path]) -> list[Any]:
    from vlora import load_adapter

    adapters = [load_adapter(source) for source in sources]
    for adapter in adapters:
        for factors in (adapter.lora_a, adapter.lora_b):
            for layer, value in factors.items():
                factors[layer] = value.float()
    return adapters


def compress(
    adapters: list[Any], components: int | None, names: list[str] | None = None, **how: Any
) -> Any:
    from vlora import SharedSubspace

    return SharedSubspace.from_adapters(adapters, names, num_components=components, **how)


def adapters_of(stacks: list[np.ndarray]) -> list[Any]:
    """Adapters of one layer whose A and B (transposed) are slices of two (n, r, L) arrays."""
    import torch
    from vlora import LoRAWeights

    return [
        LoRAWeights(
            ["x"],
            {"x": torch.from_numpy(A)},
            {"x": torch.from_numpy(np.ascontiguousarray(B.T))},
            len(A),
        )
        for A, B in zip(*stacks, strict=True)
    ]


def stacks_of(subspace: Any) -> list[np.ndarray]:
    """The other way round: what the subspace makes of them."""
    tasks = [subspace.reconstruct(name) for name in subspace.tasks]
    return [
        np.stack([task.lora_a["x"].numpy() for task in tasks]),
        np.stack([task.lora_b["x"].numpy().T for task in tasks]),
    ]


def _way(components: int | None, quantized: bool = False) -> Callable[[list[Path], Path], Any]:
    def work(sources: list[Path], out: Path) -> Any:
        subspace = compress(read(sources), components, [source.name for source in sources])
        (subspace.save_quantized if quantized else subspace.save)(out)
        return subspace

    return work


#: Its default, the published method's three components, and all that eight tasks have.
WAYS: dict[str, Callable[[list[Path], Path], Any]] = {
    "vlora compress, its default (60 % of the variance)": _way(None),
    "vlora compress, k = 3": _way(3),
    "vlora compress, k = 7": _way(7),
    "vlora compress, k = 7, NF4": _way(7, quantized=True),
}


def errors(folder: Path, sources: list[Path]) -> list[float]:
    from vlora import SharedSubspace

    subspace = SharedSubspace.load(folder)
    found = []
    for source in sources:
        task = open_source(source)
        weights = subspace.reconstruct(source.name)
        scales = {name: task.factors(name).scale for name in task.targets}
        pairs = {
            layer: (weights.lora_a[layer].numpy(), weights.lora_b[layer].numpy(), scales[layer])
            for layer in weights.layer_names
        }
        found += errors_against(task, pairs)
    return found
