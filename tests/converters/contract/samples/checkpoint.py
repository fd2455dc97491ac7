"""Fine-tuned models beside their base."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from rmmformat.converters import Options
from rmmformat.converters.contract import UNKNOWN, Flaw, Provider, Sample


def values(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = {
    "encoder.layer.0.query.weight": values(1, 8, 12),
    "encoder.layer.0.query.bias": values(2, 8),
    "encoder.layer.1.query.weight": values(3, 8, 12),
    "encoder.layer.1.query.bias": values(4, 8),
    "head.norm.weight": values(5, 8),
}
CHANGES = {
    f"encoder.layer.{n}.query": 0.1 * values(n + 10, 8, 2) @ values(n + 20, 2, 12) for n in range(2)
}


def build(folder, flaw):
    tuned = dict(BASE)
    for target, change in CHANGES.items():
        tuned[f"{target}.weight"] = BASE[f"{target}.weight"] + change
    tuned["head.norm.weight"] = BASE["head.norm.weight"] + 1
    if flaw is Flaw.EXTRA:
        tuned[UNKNOWN] = values(9, 2, 2)
    for name, tensors in (("base", BASE), ("tuned", tuned)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": "bert"}))
        save_file(tensors, folder / name / "model.safetensors")
    return folder / "tuned"


SAMPLE = Sample(
    "fine-tune",
    build,
    {target: change.astype(np.float64) for target, change in CHANGES.items()},
    frozenset(
        {f"tensor {target}.weight" for target in CHANGES}
        | {"tensor head.norm.weight", "unchanged tensors"}
    ),
    options=lambda path: Options(base=path.parent / "base", rank=4),
    # The difference of two broken weights means nothing, so it is never handed out.
    flaws=frozenset({Flaw.NONE, Flaw.EXTRA}),
    tolerance=1e-5,
    by_name=True,
)

PROVIDER = Provider("checkpoint", (SAMPLE,))
