"""Fine-tunes of one unknown base: the same minimisation, by singular value decompositions."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from rmmformat.converters import Options
from rmmformat.converters.contract import UNKNOWN, Flaw, Provider, Sample

MU, STEPS = 0.05, 6


def values(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = {
    "encoder.layer.0.query.weight": values(1, 8, 12),
    "encoder.layer.0.query.bias": values(2, 8),
    "encoder.layer.0.key.weight": values(3, 8, 12),
    "head.norm.weight": values(4, 8),
}
QUERY, NORM = "encoder.layer.0.query.weight", "head.norm.weight"


def model(seed):
    """A fine-tune: one matrix changed by a low rank, one vector."""
    change = 0.3 * values(seed, 8, 2) @ values(seed + 1, 2, 12)
    return {**BASE, QUERY: BASE[QUERY] + change, NORM: BASE[NORM] + np.float32(seed)}


MODELS = {"one": model(10), "two": model(20), "three": model(30)}


def build(folder, flaw):
    for name, tensors in MODELS.items():
        tensors = {key: array.copy() for key, array in tensors.items()}
        if flaw is Flaw.EXTRA and name == "one":
            tensors[UNKNOWN] = values(9, 2, 2)
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text(json.dumps({"model_type": "bert"}))
        save_file(tensors, folder / "models" / name / "model.safetensors")
    return folder / "models"


def minimise(thetas):
    """Alternate by the definition; the deltas of the last step."""
    deltas = [np.zeros_like(theta) for theta in thetas]
    for _ in range(STEPS):
        base = np.mean([t - d for t, d in zip(thetas, deltas, strict=True)], axis=0)
        for number, theta in enumerate(thetas):
            u, s, v = np.linalg.svd(theta - base, full_matrices=False)
            deltas[number] = u * np.maximum(s - MU, 0.0) @ v
    return deltas


DELTAS = minimise([tensors[QUERY].astype(np.float64) for tensors in MODELS.values()])

SAMPLE = Sample(
    "three",
    build,
    {"encoder.layer.0.query": DELTAS[0]},
    frozenset({f"tensor {QUERY}", f"tensor {NORM}", "unchanged tensors", "base model"}),
    options=lambda path: Options(write_base=path.parent / "estimate", mu=MU, steps=STEPS),
    detected=False,
    several="one",
    # A base cannot be estimated from broken weights, so they are never handed out.
    flaws=frozenset({Flaw.NONE, Flaw.EXTRA}),
    tolerance=1e-6,
)

PROVIDER = Provider("lore", (SAMPLE,))
