"""What the deltas of one target share: a row space on either side, or a common delta.

Two forms are foreseen; either is worth it only if it lowers the bytes at equal error.

*Row space.*  Each delta keeps its own singular value decomposition; the rows ``s_k v_k`` of all
tasks are written as combinations of q shared directions plus what is left.  This is the
Karhunen-Loeve transform of the rows over the collection, cut off where further directions cost more
than they save.

*Common gauge.*  Tasks that grew from one start, so that their factors are alike as they are, are
all rewritten with one G, ``(B_t G^-1)(G A_t)``, such that rows of the mean of ``G A_t`` are the
principal directions of the tasks' deltas; what a task adds to the mean is small.

Costs are counted in squares of the step: a bit is worth :data:`~rmmformat.merge.planner.SLOPE`
of them, and so is the energy that it saves, which makes forms of unlike error comparable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.merge.planner import SLOPE, value_bits

__all__ = ["Side", "coded_coefficients", "coded_rows", "common_gauge", "n_directions", "subspace"]

F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

#: Most directions that tasks share; it bounds what a reader does for one task, whatever n.
MOST = 96
_GRID = (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96)
#: A matrix up to this order is decomposed whole; of a larger one the leading part is iterated for.
_DENSE = 512
_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Side:
    """One delta's rows along one side, as far as they may be coded.

    Attributes
    ----------
    rows
        (m, L) orthonormal.
    weight
        (m,): energy of each component in squares of the step.
    even
        Whether the step is even in the weighted rows (as for A), or in all weighted alike, as where
        one step serves the coefficients of unlike rows (as for B).
    """

    rows: F64
    weight: F64
    even: bool


def subspace(rows: Sequence[F64], most: int = MOST) -> tuple[F64, F64]:
    """Leading directions of many weighted rows.

    Parameters
    ----------
    rows
        (m_t, L) each.
    most
        Most directions.

    Returns
    -------
    directions : (q, L) float64, orthonormal
    energy : (q,) float64
        Of all rows along each, falling; directions without energy are left out.

    Notes
    -----
    Deterministic: where neither the rows nor L are few, subspace iteration starts from the rows'
    leading ones by weight and some fixed pseudo-random ones.
    """
    stack = np.concatenate(list(rows))
    n, length = stack.shape
    most = min(most, n, length)
    if n <= min(_DENSE, length):
        energy, left = np.linalg.eigh(stack @ stack.T)
        vectors = left.T[::-1][:most] @ stack
    elif length <= _DENSE:
        energy, left = np.linalg.eigh(stack.T @ stack)
        vectors = left.T[::-1][:most]
    else:
        start = np.random.default_rng(0).standard_normal((length, min(most + 32, n, length)))
        for _ in range(_ROUNDS):
            start = np.linalg.qr(stack.T @ (stack @ start))[0]
        seen = stack @ start
        energy, left = np.linalg.eigh(seen.T @ seen)
        vectors = left.T[::-1][:most] @ start.T
    energy = energy[::-1][:most]
    good = energy > 1e-10 * max(float(energy[0]), 1e-300)
    vectors = vectors[good]
    return vectors / np.linalg.norm(vectors, axis=1)[:, None], energy[good]


def coded_rows(variance: F64, length: int) -> Bool:
    """Which residual rows are worth coding; their variance is in squares of their steps."""
    worth: Bool = _row_costs(length * variance, length) < length * variance
    return worth


def coded_coefficients(mean_square: F64, rank: int, active: int) -> Bool:
    """Which directions of a delta are worth coefficients; squares over all `rank` of them."""
    worth: Bool = _coefficient_costs(mean_square, rank, active) < rank * mean_square
    return worth


def _row_costs(energy: F64, length: int) -> F64:
    """Cost of coding rows of that energy."""
    octaves = 0.5 * np.log2(np.maximum(energy / length, 1e-30))
    costs: F64 = length + SLOPE * (length * value_bits(octaves) + 8)
    return costs


def _coefficient_costs(mean_square: F64, rank: int, active: int) -> F64:
    octaves = 0.5 * np.log2(np.maximum(mean_square, 1e-30))
    costs: F64 = active + SLOPE * (rank * value_bits(octaves) + 8)
    return costs


def n_directions(
    sides: Sequence[Side], directions: F64, energy: F64, rank: int, tasks: int | None = None
) -> int:
    """How many shared directions cost least; 0 if none are worth it.

    Parameters
    ----------
    sides
        Of every task, one factor.
    directions, energy
        What :func:`subspace` gives of their weighted rows.
    rank
        Of the factors: each direction has that many coefficients.
    tasks
        How many there are, where `sides` are only some of them.
    """
    n, length = len(sides), directions.shape[1]
    part = n / (tasks or n)
    most = len(directions)
    grid = np.array([0, *(q for q in _GRID if q < most), most])
    costs = np.zeros(len(grid))
    for side in sides:
        if not len(side.weight):
            continue
        squares = np.square(side.rows @ directions.T)
        inside = np.cumsum(np.pad(squares, ((0, 0), (1, 0))), axis=1)[:, grid]
        left = side.weight[:, None] * np.maximum(1.0 - inside, 0.0)
        alone = _row_costs(left, length)
        costs += np.where(grid > 0, np.minimum(alone, left), alone).sum(axis=0)
        scale = side.weight if side.even else np.full(len(side.weight), side.weight.mean())
        mean_square = (scale[:, None] * squares).sum(axis=0) / rank
        mine = np.minimum(
            _coefficient_costs(mean_square, rank, len(side.weight)),
            (side.weight[:, None] * squares).sum(axis=0) + 8 * SLOPE,
        )
        costs += np.cumsum(np.concatenate([[0.0], mine]))[grid]
    octaves = 0.5 * np.log2(np.maximum(energy / part / length, 1e-30))
    basis = length + SLOPE * (length * value_bits(octaves) + 8)
    costs += part * np.cumsum(np.concatenate([[0.0], basis]))[grid]
    costs += np.where(grid > 0, part * SLOPE * 250, 0)
    # A run of coefficients has its own length, base and state.
    costs += np.where(grid > 0, SLOPE * 8 * 7 * n, 0)
    return int(grid[costs.argmin()])


def common_gauge(factors: Sequence[tuple[F64, F64]]) -> tuple[F64, F64, F64, float, float] | None:
    """One G for tasks whose factors are alike as they are.

    Parameters
    ----------
    factors
        Pairs A (r, n_in), B (n_out, r) of one rank, each delta of norm 1.

    Returns
    -------
    gauge : (r, r) float64
        G.
    mean_a : (r, n_in) float64
        Mean of ``G A_t``; rows orthogonal, row k of norm s_k.
    mean_b : (r, n_out) float64
        Mean of ``(B_t G^-1)^T``.
    left_a, left_ab : float
        Part of the deltas' energy outside the row space of the mean of A, and what is left of them
        if the product of the means is subtracted.
    None
        The mean of A has not full rank.
    """
    mean = np.mean([a for a, _ in factors], axis=0)
    q, triangle = np.linalg.qr(mean.T)
    diagonal = np.abs(np.diag(triangle))
    if mean.shape[0] > mean.shape[1] or diagonal.min() <= 1e-6 * diagonal.max():
        return None
    inner = np.zeros((len(mean), len(mean)))
    total = 0.0
    for a, b in factors:
        gram = b.T @ b
        projected = a @ q
        inner += projected.T @ gram @ projected
        total += float(np.sum(gram * (a @ a.T)))
    values, vectors = np.linalg.eigh(inner / len(factors))
    values, vectors = values[::-1], vectors[:, ::-1]
    root = np.sqrt(np.maximum(values, 1e-9 * max(float(values[0]), 1e-300)))
    # mean = T^T q^T, so that G mean = root W^T q^T for this G.
    gauge = (root[:, None] * vectors.T) @ np.linalg.inv(triangle.T)
    inverse = np.linalg.inv(gauge)
    mean_a = gauge @ mean
    mean_b = np.mean([(b @ inverse).T for _, b in factors], axis=0)
    gram_mean = (mean_b @ mean_b.T) * (mean_a @ mean_a.T)
    rest = total + len(factors) * float(gram_mean.sum())
    for a, b in factors:
        rest -= 2.0 * float(np.sum((b.T @ mean_b.T) * (a @ mean_a.T)))
    left_a = 1.0 - float(np.trace(inner)) / total
    return gauge, mean_a, mean_b, left_a, rest / total
