"""LoRE-Merging: low-rank deltas of fine-tunes whose base model is not known.

For each weight matrix, over an approximate base theta0 and deltas delta_i::

    min  1/2 sum_i ||theta0 + delta_i - theta_i||_F^2  +  mu sum_i ||delta_i||_*

by turns: ``theta0 <- mean(theta_i - delta_i)``, then ``delta_i <- U max(S - mu, 0) V^T`` of
``theta_i - theta0``.  Both steps are exact minimisers and the objective is jointly convex, so it
never rises.  (The paper prints the objective without 1/2 and with a squared norm, while its update
is a constant threshold mu; this is the form for which that update is exact.)

Source: LoRE-Merging, arXiv 2502.10749; Cai, Candes & Shen (2010) for the thresholding step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.baselines import ties

__all__ = ["LoreResult", "lore", "lore_merge"]

Array = npt.NDArray[np.generic]
F64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class LoreResult:
    """An approximate base and what each fine-tune adds to it.

    Parameters
    ----------
    theta0
        (out, in) float64, the approximate base.
    factors
        A pair A (k_i, in), B (out, k_i) float64 for each fine-tune, ``delta_i = B A``, balanced
        (``sqrt(S) V^T`` and ``U sqrt(S)``) and sorted by falling singular value, so that a prefix
        of the components is the best delta of that rank.
    objective
        The objective before the first step (all deltas zero, theta0 the mean) and after each.
    """

    theta0: F64
    factors: tuple[tuple[F64, F64], ...]
    objective: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.objective) - 1

    def delta(self, i: int) -> F64:
        """Form delta_i, (out, in) float64."""
        A, B = self.factors[i]
        return B @ A


def lore(
    thetas: Sequence[Array] | Array,
    mu: float = 0.01,
    steps: int = 20,
    tolerance: float = 1e-9,
) -> LoreResult:
    """Split fine-tuned matrices into an approximate base and low-rank deltas.

    Parameters
    ----------
    thetas
        n matrices (out, in): an array (n, out, in), or a sequence whose items may be mapped from
        a file; each is read once a half-step.
    mu
        Threshold on the singular values, not negative.  Larger means lower ranks.
    steps
        Most rounds of both updates.
    tolerance
        Stop once a round lowers the objective by at most this part of it.

    Returns
    -------
    LoreResult

    Raises
    ------
    ShapeError
        If there is no matrix, shapes differ, or a parameter is out of range.

    Notes
    -----
    Cost of a step: for each matrix two products and an eigen-decomposition on its shorter side.
    Memory: theta0, the factors and two float64 copies of one matrix.  Deterministic for one BLAS
    library and number of BLAS threads.

    Source: arXiv 2502.10749, algorithm 1; mu = 0.01 and 20 steps are its published settings.
    """
    _check(thetas, mu, steps)
    n = len(thetas)
    theta0 = _mean_base(thetas, [None] * n)
    shape = theta0.shape
    deltas: list[tuple[F64, F64]] = [(np.zeros((0, shape[1])), np.zeros((shape[0], 0)))] * n
    objective = [0.5 * sum(_energy(x.astype(np.float64) - theta0) for x in thetas)]
    for step in range(steps):
        if step:  # with zero deltas theta0 is already the mean
            theta0 = _mean_base(thetas, deltas)
        value = 0.0
        for i, theta in enumerate(thetas):
            gap = theta.astype(np.float64) - theta0
            deltas[i], nuclear = _shrink(gap, mu)
            A, B = deltas[i]
            value += 0.5 * _energy(gap - B @ A) + mu * nuclear
        objective.append(value)
        if objective[-2] - value <= tolerance * objective[-2]:
            break
    return LoreResult(theta0, tuple(deltas), tuple(objective))


def lore_merge(
    result: LoreResult,
    weight: float = 1.0,
    method: Literal["mean", "ties"] = "mean",
    density: float = 0.2,
) -> F64:
    """Merge to one matrix: ``theta0 + weight * tau``, tau the mean or the TIES of the deltas.

    Parameters
    ----------
    result
        What :func:`lore` found.
    weight
        Multiplier of the merged delta (the paper's lambda).
    method
        ``"mean"`` or ``"ties"``.
    density
        Part of the entries that TIES keeps.

    Returns
    -------
    (out, in) float64

    Raises
    ------
    ShapeError
        If the method is unknown or the density out of range.

    Source: arXiv 2502.10749, algorithm 1.
    """
    if method == "mean":
        tau = np.zeros_like(result.theta0)
        for i in range(len(result.factors)):
            tau += result.delta(i)
        tau /= len(result.factors)
    elif method == "ties":
        tau = ties(np.stack([result.delta(i) for i in range(len(result.factors))]), density)
    else:
        raise ShapeError(f"unknown method {method!r}: mean or ties")
    return result.theta0 + weight * tau


def _check(thetas: Sequence[Array] | Array, mu: float, steps: int) -> None:
    if len(thetas) == 0:
        raise ShapeError("need at least one matrix")
    shapes = sorted({tuple(x.shape) for x in thetas})
    if len(shapes) != 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ShapeError(f"matrices must be (out, in), not empty and of one shape, got {shapes}")
    if mu < 0.0 or steps < 0:
        raise ShapeError(f"mu and steps must not be negative, got {mu} and {steps}")


def _mean_base(thetas: Sequence[Array] | Array, deltas: Sequence[tuple[F64, F64] | None]) -> F64:
    """Mean of theta_i - delta_i; None stands for a zero delta."""
    total = np.zeros(thetas[0].shape)
    for theta, delta in zip(thetas, deltas, strict=True):
        total += theta
        if delta is not None:
            total -= delta[1] @ delta[0]
    return total / len(thetas)


def _shrink(matrix: F64, mu: float) -> tuple[tuple[F64, F64], float]:
    """Singular value thresholding; the factors (A, B) of the result and its nuclear norm.

    Through the eigenvectors W of the Gram matrix on the shorter side, several times cheaper than
    an SVD.  Singular values are taken as the norms of ``W^T matrix``, which keeps small ones
    right where the roots of the eigenvalues would not.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    vectors = np.linalg.eigh(wide @ wide.T)[1]
    rows = vectors.T @ wide
    s = np.sqrt(np.einsum("kl,kl->k", rows, rows))
    order = np.argsort(-s, kind="stable")
    order = order[s[order] > mu]
    kept = s[order] - mu
    root = np.sqrt(kept)
    inner = vectors[:, order] * root
    outer = rows[order] * (root / s[order])[:, None]
    if tall:
        return (inner.T, outer.T), float(kept.sum())
    return (outer, inner), float(kept.sum())


def _energy(matrix: F64) -> float:
    return float(np.einsum("kl,kl->", matrix, matrix))
