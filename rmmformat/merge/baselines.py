"""What people do with several fine-tunes today: the methods that RMM is compared with.

Plain functions on arrays.  All but :func:`truncate_rank` give every task the same delta.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.gauge import svd_gauge

__all__ = ["dare", "mean_factors", "mean_product", "ties", "truncate_rank"]

Array = npt.NDArray[np.generic]
F64 = npt.NDArray[np.float64]


def truncate_rank(A: Array, B: Array, rank: int) -> tuple[F64, F64]:
    """Keep the `rank` largest singular components of a delta.

    Parameters
    ----------
    A
        (r, n_in), any real dtype.
    B
        (n_out, r), any real dtype.
    rank
        Components kept, from 0 to r.

    Returns
    -------
    A' : (rank, n_in) float64
    B' : (n_out, rank) float64

    Raises
    ------
    ShapeError
        If the factors do not fit together or `rank` is out of range.

    Source: Eckart & Young (1936): the nearest delta of that rank.
    """
    if not 0 <= rank <= A.shape[0]:
        raise ShapeError(f"rank must be from 0 to {A.shape[0]}, got {rank}")
    new_a, new_b = svd_gauge(A, B)
    return new_a[:rank], new_b[:, :rank]


def mean_factors(factors: Array) -> F64:
    """Task Arithmetic on factors: the mean of one factor over the tasks.

    Merge A and B each by itself; the product of the means is not the mean of the products.

    Parameters
    ----------
    factors
        (n, ...) array, the same factor of n tasks (of different ranks:
        :func:`rmmformat.merge.rmm.pad_rank`).

    Returns
    -------
    array of the shape of one factor, float64

    Raises
    ------
    ShapeError
        If there is no task.

    Source: arXiv 2212.04089, the sum of task vectors, with the weight 1/n.
    """
    _check_stack(factors)
    mean: F64 = factors.astype(np.float64).mean(axis=0)
    return mean


def mean_product(
    factors: Sequence[tuple[Array, Array]], scales: Sequence[float]
) -> tuple[F64, F64]:
    """Task Arithmetic on products: the mean delta, exactly, in factored form.

    Parameters
    ----------
    factors
        Pairs A (r_t, n_in), B (n_out, r_t).
    scales
        The multiplier of each task; the result's is 1.

    Returns
    -------
    A' : (sum r_t, n_in) float64
        The tasks' A, one below the other.
    B' : (n_out, sum r_t) float64
        The tasks' ``scale_t / n * B``, side by side.

    Raises
    ------
    ShapeError
        If there is no task, or the numbers of tasks and scales differ.

    Source: arXiv 2212.04089, the sum of task vectors, with the weight 1/n.
    """
    if not factors or len(factors) != len(scales):
        raise ShapeError(f"need one scale a task, got {len(factors)} and {len(scales)}")
    n = len(factors)
    down = np.concatenate([A.astype(np.float64) for A, _ in factors], axis=0)
    up = np.concatenate(
        [(s / n) * B.astype(np.float64) for (_, B), s in zip(factors, scales, strict=True)],
        axis=1,
    )
    return down, up


def ties(tasks: Array, density: float = 0.2, weight: float = 1.0) -> F64:
    """TIES: trim every task, elect a sign for every entry, average those that agree.

    Parameters
    ----------
    tasks
        (n, ...) array: one factor, or the dense delta, of n tasks.
    density
        Part of each task's entries kept, those of largest magnitude; equal magnitudes at the
        threshold are all kept.
    weight
        Multiplier of the result (the paper's lambda).

    Returns
    -------
    array of the shape of one task, float64

    Raises
    ------
    ShapeError
        If there is no task or the density is not in (0, 1].

    Notes
    -----
    The trim is within the array given; the paper trims over the whole model.  An entry whose
    trimmed values cancel exactly has no elected sign and becomes zero.

    Source: arXiv 2306.01708, algorithm 1.
    """
    _check_stack(tasks)
    _check_density(density)
    values = tasks.astype(np.float64)
    flat = values.reshape(len(values), -1)
    n_kept = max(1, int(density * flat.shape[1]))
    size = np.abs(flat)
    threshold = np.partition(size, flat.shape[1] - n_kept, axis=1)[:, [-n_kept]]
    trimmed = np.where(size >= threshold, flat, 0.0)
    elected = np.sign(trimmed.sum(axis=0))
    agrees = (np.sign(trimmed) == elected) & (elected != 0.0)
    count = np.maximum(agrees.sum(axis=0), 1)
    merged = np.where(agrees, trimmed, 0.0).sum(axis=0) / count
    result: F64 = weight * merged.reshape(values.shape[1:])
    return result


def dare(tasks: Array, rng: np.random.Generator, density: float = 0.2) -> F64:
    """DARE: drop entries at random, rescale the rest, average the tasks.

    Parameters
    ----------
    tasks
        (n, ...) array: one factor, or the dense delta, of n tasks.
    rng
        Source of the choice, e.g. ``numpy.random.default_rng(0)``.
    density
        Probability that an entry is kept; kept entries are divided by it, so that the
        expectation is the mean.

    Returns
    -------
    array of the shape of one task, float64

    Raises
    ------
    ShapeError
        If there is no task or the density is not in (0, 1].

    Source: arXiv 2311.03099, equations of section 3 (drop rate ``1 - density``), with the mean
    of the tasks as the merge.
    """
    _check_stack(tasks)
    _check_density(density)
    kept = rng.random(tasks.shape) < density
    merged: F64 = np.where(kept, tasks.astype(np.float64) / density, 0.0).mean(axis=0)
    return merged


def _check_stack(tasks: Array) -> None:
    if tasks.ndim < 2 or 0 in tasks.shape:
        raise ShapeError(f"need a stack of tasks (n, ...), not empty, got {tasks.shape}")


def _check_density(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ShapeError(f"density must be above 0 and at most 1, got {density}")
