"""How far one delta is from another, without forming either.

A delta is ``scale * B @ A`` with A (r, n_in) and B (n_out, r).  In general everything goes through
the triangular factors of two QR decompositions, so the largest matrix is 2r x 2r.  Of factors that
are alike row by row, as those of a merge and their originals are, Gram matrices of 2r x 2r do
(:func:`row_gram`, :func:`error_of_grams`): a fifth of the work, and one block of positions at a
time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.gauge import check_factors

__all__ = [
    "Summary",
    "delta_norm",
    "error_of_grams",
    "relative_error",
    "row_gram",
    "summarize",
]

Array = npt.NDArray[np.generic]
F64 = npt.NDArray[np.float64]

#: Positions that are summed in one product; blocks are added in their order.
_BLOCK = 2048


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean, median and largest of a set of relative errors."""

    mean: float
    median: float
    max: float


def delta_norm(A: Array, B: Array, scale: float = 1.0) -> float:
    """Frobenius norm of ``scale * B @ A``.

    Parameters
    ----------
    A
        (r, n_in), any real dtype.
    B
        (n_out, r), any real dtype.
    scale
        The multiplier as applied.

    Raises
    ------
    ShapeError
        If the factors do not fit together.
    """
    check_factors(A, B)
    return abs(scale) * _product_norm(B.astype(np.float64), A.T.astype(np.float64))


def relative_error(
    A: Array,
    B: Array,
    scale: float,
    A2: Array,
    B2: Array,
    scale2: float,
) -> float:
    """Relative Frobenius error ``||s2 B2 A2 - s B A|| / ||s B A||`` of a second delta.

    The ranks of the two may differ.

    Parameters
    ----------
    A, B, scale
        The reference: (r, n_in), (n_out, r) and its multiplier.
    A2, B2, scale2
        The approximation: (r2, n_in), (n_out, r2) and its multiplier.

    Returns
    -------
    float
        0 if both deltas are zero, infinity if only the reference is.

    Raises
    ------
    ShapeError
        If the factors do not fit together.

    Notes
    -----
    The difference is one product, ``[s2 B2, -s B] [A2; A]``, and its norm that of the product of
    the two triangular factors.  The subtraction happens inside that product, at float64 rounding
    of the deltas (about 1e-15 of them), where expanding the square into Gram matrices would lose
    everything below 1e-8.
    """
    check_factors(A, B)
    check_factors(A2, B2)
    if A.shape[1] != A2.shape[1] or B.shape[0] != B2.shape[0]:
        raise ShapeError(
            f"deltas differ in shape: {(B.shape[0], A.shape[1])} and {(B2.shape[0], A2.shape[1])}"
        )
    down, up = A.astype(np.float64), B.astype(np.float64)
    down2, up2 = A2.astype(np.float64), B2.astype(np.float64)
    left = np.concatenate([scale2 * up2, -scale * up], axis=1)
    right = np.concatenate([down2, down], axis=0).T
    difference = _product_norm(left, right)
    reference = abs(scale) * _product_norm(up, down.T)
    if reference == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / reference


def row_gram(original: Array, approximation: Array) -> F64:
    """Products of the rows of a factor's approximation and of its difference, for one factor.

    Parameters
    ----------
    original, approximation
        (r, L) each, any real dtype: A, or B transposed; row k of one is to be row k of the other.

    Returns
    -------
    (2r, 2r) float64
        ``M M^T`` of ``M = [approximation; approximation - original]``.

    Raises
    ------
    ShapeError
        If the two differ in shape.

    Notes
    -----
    Summed over blocks of 2,048 positions, one after the other.
    """
    if original.ndim != 2 or original.shape != approximation.shape:
        raise ShapeError(f"factors differ in shape: {original.shape} and {approximation.shape}")
    rank, length = original.shape
    gram = np.zeros((2 * rank, 2 * rank))
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        rows = np.empty((2 * rank, stop - start))
        rows[:rank] = approximation[:, start:stop]
        rows[rank:] = original[:, start:stop]
        np.subtract(rows[:rank], rows[rank:], out=rows[rank:])
        gram += rows @ rows.T
    return gram


def error_of_grams(of_a: F64, of_b: F64) -> float:
    """Relative Frobenius error of a delta whose factors are approximated row by row.

    Parameters
    ----------
    of_a, of_b
        What :func:`row_gram` gives of A (r, n_in) and of B transposed (r, n_out).

    Returns
    -------
    float
        0 if both deltas are zero, infinity if only the original is.

    Notes
    -----
    ``B' A' - B A = (B' - B) A' + B (A' - A)``: two terms of the size of the error.  Where the
    factors are alike nothing cancels that :func:`relative_error` would have kept; where they are
    not, because G A' and B' G^-1 are the same delta, it is the function to call.
    """
    r = len(of_a) // 2
    # Of [B' - B; B], from that of [B'; B' - B].
    turn = np.block([[np.zeros((r, r)), np.eye(r)], [np.eye(r), -np.eye(r)]])
    of_b = turn @ of_b @ turn.T
    left = np.concatenate([np.eye(r), -np.eye(r)], axis=1)  # A = A' - (A' - A)
    reference = float(np.sum((left @ of_a @ left.T) * of_b[r:, r:]))
    difference = max(0.0, float(np.sum(of_a * of_b)))
    if reference <= 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(np.sqrt(difference / reference))


def summarize(errors: Iterable[float]) -> Summary:
    """Mean, median and maximum of relative errors, of one task over its targets for instance.

    Raises
    ------
    ShapeError
        If there is none.
    """
    values = np.fromiter(errors, np.float64)
    if values.size == 0:
        raise ShapeError("no errors to summarize")
    return Summary(float(values.mean()), float(np.median(values)), float(values.max()))


def _product_norm(left: F64, right: F64) -> float:
    """Frobenius norm of ``left @ right.T`` for tall matrices of equally many columns."""
    if 0 in left.shape or 0 in right.shape:
        return 0.0
    r_left: F64 = np.asarray(np.linalg.qr(left, mode="r"))
    r_right: F64 = np.asarray(np.linalg.qr(right, mode="r"))
    return float(np.linalg.norm(r_left @ r_right.T))
