"""How alike deltas are, without forming any.

The inner product of two deltas ``s B A`` and ``s' B' A'`` of one target is
``s s' sum((B^T B') * (A A'^T))``: two matrices of r x r' instead of one of n_out x n_in.

Tasks that grew from one start, or from one draw of A, need not have alike deltas; what they have in
common is the space of their rows on one side.  :func:`sketch` keeps of a delta what is needed to
see that, :func:`families` groups deltas by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.gauge import check_factors

__all__ = ["Sketch", "affinity", "cosines", "delta_products", "families", "sketch"]

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: Orthonormal rows of one delta along either side, narrowed to at most WIDTH values each.
Sketch = tuple[Float32, Float32]
#: Values that a row keeps; products of narrowed rows err by WIDTH^-1/2, which is little beside
#: LEAST once squared.
WIDTH = 512
#: Mean affinity from which deltas are one family.  Adapters trained apart have 0.02 to 0.2,
#: continued ones and such of one seed 0.5 to 1.
LEAST = 0.3
#: Components with less than this part of the energy say nothing about where a delta comes from.
_FAINT = 1e-4


def delta_products(deltas: Sequence[tuple[Array, Array, float]]) -> F64:
    """Frobenius inner products of the deltas of one target.

    Parameters
    ----------
    deltas
        For each task A (r_t, n_in), B (n_out, r_t) and its scale; ranks may differ.

    Returns
    -------
    (n, n) float64, symmetric
        The diagonal has the squared norms.

    Raises
    ------
    ShapeError
        Factors do not fit together, or the deltas differ in shape.

    Notes
    -----
    O((n_in + n_out) R^2) for R, the sum of the ranks, and R (n_in + n_out) values of memory.
    """
    for A, B, _ in deltas:
        check_factors(A, B)
    sides = {(A.shape[1], B.shape[0]) for A, B, _ in deltas}
    if len(sides) > 1:
        raise ShapeError(f"deltas differ in shape: {sorted(sides)}")
    if not deltas:
        return np.zeros((0, 0))
    all_a = np.concatenate([A for A, _, _ in deltas], axis=0, dtype=np.float64)
    all_b = np.concatenate([s * B.T.astype(np.float64) for _, B, s in deltas], axis=0)
    ranks = [A.shape[0] for A, _, _ in deltas]
    ends = np.cumsum(ranks)
    products = np.zeros((len(deltas), len(deltas)))
    for t, (end, rank) in enumerate(zip(ends, ranks, strict=True)):
        rows = slice(end - rank, end)
        # Column sums of the r_t x R products, gathered by task; reduceat would misread rank 0.
        columns = ((all_b[rows] @ all_b[:end].T) * (all_a[rows] @ all_a[:end].T)).sum(axis=0)
        running = np.concatenate([[0.0], np.cumsum(columns)])
        products[t, : t + 1] = running[ends[: t + 1]] - running[ends[: t + 1] - ranks[: t + 1]]
    lower = np.tril(products, -1)
    return lower + lower.T + np.diag(np.diag(products))


def cosines(products: F64) -> F64:
    """Cosines from inner products.

    Parameters
    ----------
    products
        (n, n), as :func:`delta_products` gives them, or a sum of such over targets.

    Returns
    -------
    (n, n) float64 within -1 and 1
        NaN where a delta is zero.
    """
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    outer = np.outer(norms, norms)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(outer > 0.0, products / outer, np.nan)
    limited: F64 = np.clip(found, -1.0, 1.0)
    return limited


def sketch(V: F64, U: F64, singular: F64) -> Sketch:
    """What :func:`affinity` needs of a delta.

    Parameters
    ----------
    V, U, singular
        The delta's singular value decomposition, ``U diag(singular) V``: V (r, n_in), U (n_out, r).

    Notes
    -----
    Longer rows are narrowed by adding up values under fixed pseudo-random signs (count sketch,
    Charikar, Chen and Farach-Colton 2002): O(r L), and products of rows stay right on average.
    """
    n = int(np.count_nonzero(np.square(singular) > _FAINT * np.sum(np.square(singular))))
    return _narrowed(V[:n]), _narrowed(U.T[:n])


def _narrowed(rows: F64) -> Float32:
    length = rows.shape[1]
    if length <= WIDTH:
        return rows.astype(np.float32)
    random = np.random.default_rng(length)
    signs = random.integers(0, 2, length) * 2.0 - 1.0
    order = random.permutation(length)
    missing = -length % WIDTH
    spread = np.pad((rows * signs)[:, order], ((0, 0), (0, missing)))
    found: Float32 = spread.reshape(len(rows), -1, WIDTH).sum(axis=1).astype(np.float32)
    return found


def affinity(one: Sketch, other: Sketch) -> float:
    """How much of the smaller row space lies in the larger, on the side where that is most.

    Returns
    -------
    0 (orthogonal on both sides) to 1 (on one side, one contains the other).
    """
    most = 0.0
    for rows, others in zip(one, other, strict=True):
        if len(rows) and len(others):
            inside = float(np.square(rows @ others.T).sum()) / min(len(rows), len(others))
            most = max(most, inside)
    return min(most, 1.0)


def families(deltas: Sequence[Sketch], least: float = LEAST) -> list[list[int]]:
    """Group deltas by the affinity of their row spaces.

    Parameters
    ----------
    deltas
        Of one target.
    least
        Groups are joined, the most alike first, as long as the mean affinity between their members
        is at least this (average linkage).

    Returns
    -------
    Ordinals of the deltas of every group of two or more; ascending in each, groups by their first.

    Notes
    -----
    O(n^2 r^2 WIDTH) for the affinities and O(n^3) for the groups: for samples, not for thousands.
    """
    n = len(deltas)
    between = np.full((n, n), -1.0)
    for i in range(n):
        for j in range(i):
            between[i, j] = between[j, i] = affinity(deltas[i], deltas[j])
    groups: dict[int, list[int]] = {i: [i] for i in range(n)}
    while len(groups) > 1:
        i, j = sorted(int(x) for x in np.unravel_index(int(between.argmax()), between.shape))
        if between[i, j] < least:
            break
        sizes = len(groups[i]), len(groups[j])
        between[i] = (sizes[0] * between[i] + sizes[1] * between[j]) / sum(sizes)
        between[:, i] = between[i]
        between[[i, j], [i, i]] = between[j] = between[:, j] = -1.0
        groups[i] += groups.pop(j)
    return [sorted(group) for _, group in sorted(groups.items()) if len(group) > 1]
