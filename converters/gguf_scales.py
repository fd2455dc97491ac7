"""One alpha for all targets of an adapter, and what is left to fold into factor B.

llama.cpp adds ``alpha / rank * lora_b @ lora_a`` with one alpha for all targets, and takes an alpha
of 0 for "scale 1".  So one alpha is chosen such that as many targets as can be get their scale from
it; the others have the rest folded into factor B: exactly where it is a power of two, else with one
rounding to B's type.  A scale of 0 is written as B = 0.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping

import numpy as np

from rmmformat.model import TargetInfo

__all__ = ["choose_alpha", "fold_for", "is_exact"]


def _applied(alpha: float, rank: int) -> np.float32:
    """Scale that llama.cpp computes, in its float32."""
    return np.float32(np.float32(alpha) / np.float32(rank))


def _alpha_for(info: TargetInfo) -> float | None:
    """Find the float32 alpha that gives a target its scale to the last bit, or the nearest one.

    Where it would be too large or too small for a float32, a power of two is left to be folded.
    """
    fraction, exponent = math.frexp(info.scale * info.rank)
    if not fraction:
        return None
    alpha = np.float32(math.ldexp(fraction, min(max(exponent, -100), 126)))
    scale = np.float32(info.scale)
    up, down = np.nextafter(alpha, np.float32(np.inf)), np.nextafter(alpha, np.float32(-np.inf))
    for candidate in (alpha, up, down):
        if _applied(float(candidate), info.rank) == scale:
            return float(candidate)
    return float(alpha)


def choose_alpha(targets: Mapping[str, TargetInfo]) -> float:
    """Choose the alpha, exactly a float32, under which the most values of B need no rounding."""
    wanted: collections.Counter[float] = collections.Counter()
    for info in targets.values():
        alpha = _alpha_for(info)
        if alpha is not None:
            wanted[alpha] += info.rank * info.shape.n_out
    if not wanted:
        return 1.0
    # One alpha times a power of two serves the same targets; count them together, prefer the one
    # that is wanted most as it is.
    by_fraction: collections.Counter[float] = collections.Counter()
    for alpha, weight in wanted.items():
        by_fraction[abs(math.frexp(alpha)[0])] += weight
    return min(
        wanted,
        key=lambda alpha: (
            -by_fraction[abs(math.frexp(alpha)[0])],
            -wanted[alpha],
            abs(alpha),
            -alpha,
        ),
    )


def fold_for(alpha: float, info: TargetInfo) -> float:
    """Give the factor for B: 1, a power of two, 0, or what is left of the scale."""
    applied = float(_applied(alpha, info.rank))
    fold = info.scale / applied
    if np.float32(info.scale) == np.float32(applied):
        return 1.0
    # Exact in float64; out of float32's range it is unequal to anything.
    power = math.copysign(2.0 ** round(math.log2(abs(fold))), fold) if fold else 0.0
    with np.errstate(over="ignore", under="ignore"):
        exact = np.float32(applied * power) == np.float32(info.scale)
    return power if exact else fold


def is_exact(fold: float) -> bool:
    """Say whether multiplying with a fold rounds nothing, but for values at the ends of a type."""
    return fold == 0 or abs(math.frexp(fold)[0]) == 0.5
