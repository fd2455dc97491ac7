"""FlexMerge: one merge after another, block by block, until the collection has the chosen size.

Every target starts with each task's delta for itself.  The two most similar groups of tasks, over
all targets, become one; and again, until the groups together are as small as asked.  A group keeps
one delta for its tasks, so the method runs from all deltas kept to one for all.

Source: FlexMerge (greedy pairwise merging of blocks, by cosine similarity of the
blocks' task vectors, to a target size; any data-free merge inside a group).  Chosen here: the
similarity of two groups is the smallest between their members, and the merge inside a group is the
mean delta at the group's rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.baselines import mean_product, truncate_rank

__all__ = ["Groups", "flex_groups", "merge_group", "similarity"]

Array = npt.NDArray[np.generic]
F64 = npt.NDArray[np.float64]

#: Members of each group, ascending; groups in the order of their first members.
Groups = tuple[tuple[int, ...], ...]


def similarity(factors: Sequence[tuple[Array, Array]], scales: Sequence[float]) -> F64:
    """Cosine similarity of every two deltas of one target, none of them formed.

    Parameters
    ----------
    factors
        Pairs A (r_t, n_in), B (n_out, r_t).
    scales
        The multiplier of each.

    Returns
    -------
    (n, n) float64
        ``<dW_i, dW_j> = s_i s_j sum((B_i^T B_j) * (A_i A_j^T))`` over the norms; 0 where a delta is
        zero.

    Raises
    ------
    ShapeError
        If there is no task, or the numbers of tasks and scales differ.
    """
    if not factors or len(factors) != len(scales):
        raise ShapeError(f"need one scale a task, got {len(factors)} and {len(scales)}")
    down = [A.astype(np.float64) for A, _ in factors]
    up = [s * B.astype(np.float64) for (_, B), s in zip(factors, scales, strict=True)]
    n = len(factors)
    inner = np.zeros((n, n))
    for i in range(n):
        for j in range(i, n):
            inner[i, j] = inner[j, i] = float(np.sum((up[i].T @ up[j]) * (down[i] @ down[j].T)))
    norm = np.sqrt(np.maximum(np.diag(inner), 0.0))
    scale = np.outer(norm, norm)
    cosine: F64 = np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0.0)
    return cosine


def flex_groups(
    similarities: Sequence[F64], costs: Sequence[Sequence[float]], budget: float
) -> list[Groups]:
    """Choose the groups of every target, most similar pair first, until the budget holds.

    Parameters
    ----------
    similarities
        For each target an (n, n) matrix, of its own n tasks.
    costs
        For each target, what each of its tasks takes when kept alone; a group takes the most of
        its members.
    budget
        The sum of the costs stops above this only if nothing is left to merge.

    Returns
    -------
    list
        For each target its groups.

    Raises
    ------
    ShapeError
        If the numbers of targets or tasks do not fit.

    Notes
    -----
    Groups of different targets never mix.  The best pair of each target is kept, so that a merge
    costs one scan over the targets and one over the pairs of the target that changed.
    """
    if len(similarities) != len(costs) or any(
        s.shape != (len(c), len(c)) for s, c in zip(similarities, costs, strict=False)
    ):
        raise ShapeError("need a square matrix and as many costs for each target")
    groups: list[list[tuple[int, ...]]] = [[(i,) for i in range(len(c))] for c in costs]
    prices = [list(map(float, c)) for c in costs]
    linkage = [np.array(s, np.float64) for s in similarities]
    for matrix in linkage:
        np.fill_diagonal(matrix, -np.inf)
    best = np.array([m.max(initial=-np.inf) for m in linkage])
    total = sum(map(sum, prices))
    while total > budget and best.size and np.isfinite(best.max()):
        at = int(best.argmax())
        matrix = linkage[at]
        i, j = sorted(int(k) for k in np.unravel_index(int(matrix.argmax()), matrix.shape))
        total -= min(prices[at][i], prices[at][j])
        prices[at][i] = max(prices[at][i], prices[at][j])
        groups[at][i] = tuple(sorted(groups[at][i] + groups[at][j]))
        row = np.minimum(matrix[i], matrix[j])
        row[i] = -np.inf
        matrix[i], matrix[:, i] = row, row
        linkage[at] = np.delete(np.delete(matrix, j, axis=0), j, axis=1)
        del groups[at][j], prices[at][j]
        best[at] = linkage[at].max(initial=-np.inf)
    return [tuple(sorted(g)) for g in groups]


def merge_group(factors: Sequence[tuple[Array, Array]], scales: Sequence[float]) -> tuple[F64, F64]:
    """One delta for a group of tasks: their mean, at the largest rank among them.

    Parameters
    ----------
    factors
        Pairs A (r_t, n_in), B (n_out, r_t) of the group.
    scales
        The multiplier of each; the result's is 1.

    Returns
    -------
    A : (max r_t, n_in) float64
    B : (n_out, max r_t) float64

    Raises
    ------
    ShapeError
        If there is no task, or the numbers of tasks and scales differ.
    """
    down, up = mean_product(factors, scales)
    return truncate_rank(down, up, max(A.shape[0] for A, _ in factors))
