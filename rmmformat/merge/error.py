"""How far one delta is from another, without forming either.

A delta is ``scale * B @ A`` with A (r, n_in) and B (n_out, r).  Everything goes through the
triangular factors of two QR decompositions, so the largest matrix is 2r x 2r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.gauge import check_factors

__all__ = ["Summary", "delta_norm", "relative_error", "summarize"]

Array = npt.NDArray[np.generic]
F64 = npt.NDArray[np.float64]


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
