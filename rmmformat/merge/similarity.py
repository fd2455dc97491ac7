"""How alike deltas are, without forming any.

The inner product of two deltas ``s B A`` and ``s' B' A'`` of one target is
``s s' sum((B^T B') * (A A'^T))``: two matrices of r x r' instead of one of n_out x n_in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.gauge import check_factors

__all__ = ["cosines", "delta_products"]

Array = npt.NDArray[np.generic]
F64 = npt.NDArray[np.float64]


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
