"""One more task on a basis that was made without it: the coefficients that fit best.

Source: least squares on the directions of :mod:`rmmformat.merge.rmm`, group by group.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rmmformat.errors import NonFiniteError, ShapeError
from rmmformat.merge.rmm import Shared, _blocks, _to_groups

__all__ = ["project"]

Array = npt.NDArray[np.generic]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def project(factor: Array, shared: Shared) -> F32:
    """Coefficients of one more task on what others share: their least-squares fit.

    Parameters
    ----------
    factor
        (rank, L), any real dtype, component-major; at most as many rows as `shared` has.
    shared
        Mean and directions as they are stored, in any state of orthonormality.

    Returns
    -------
    (p, Kc, G) float32
        For :func:`~rmmformat.merge.rmm.reconstruct` with this rank; Kc is `rank` with row mixing.

    Raises
    ------
    ShapeError
        If `factor` does not fit.
    NonFiniteError
        If values are not finite, or beyond float32.
    """
    rank, length = factor.shape
    rows, basis = shared.row_mixing, shared.basis
    full = rank if rows else basis.shape[1]
    if length != shared.length or not 1 <= rank <= full:
        raise ShapeError(f"factor {factor.shape} does not fit a basis {basis.shape}")
    mean = None if shared.mean is None else shared.mean[:rank]
    coefs = np.zeros((shared.components, rank if rows else 1, shared.n_groups), np.float32)
    for start, stop, m in _blocks(length, shared.group, rank):
        points = factor[None, :, start:stop].astype(np.float64)
        if mean is not None:
            points -= mean[:, start:stop]
        if not np.isfinite(points).all():
            raise NonFiniteError("factors hold NaN, infinity or values beyond float32")
        part = basis[:, :, start:stop] if rows else basis[:, :rank, start:stop]
        p, kb = part.shape[:2]
        directions = part.reshape(p, kb, -1, m).transpose(2, 0, 1, 3).reshape(-1, p, kb * m)
        fitted = _fit_any(_to_groups(points, m, rows), directions)
        first = start // shared.group
        if rows:
            coefs[:, :, 0] = fitted[0].T
        else:
            coefs[:, 0, first : first + len(fitted)] = fitted[:, 0].T
    if not np.isfinite(coefs).all():
        raise NonFiniteError("factors hold values beyond float32")
    return coefs


def _fit_any(points: F64, stored: F32) -> F64:
    """Least-squares coefficients (G, N, p) on directions (G, p, D) that may depend on one another.

    A task of lower rank sees only the first rows of each direction, and fewer rows than there are
    directions leave them dependent: then the smallest of the best.
    """
    basis = stored.astype(np.float64)
    gram = basis @ basis.transpose(0, 2, 1)
    right = basis @ points.transpose(0, 2, 1)
    inverse = np.linalg.pinv(gram, rcond=1e-12, hermitian=True)
    with np.errstate(over="ignore"):  # the caller refuses what float32 cannot hold
        found: F64 = (inverse @ right).transpose(0, 2, 1)
    return found
