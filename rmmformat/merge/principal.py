"""Principal directions of many groups of points at once, in numpy: for groups that are large.

Small ones are found natively (``native/src/principal.cpp``), by the same mathematics.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["directions", "energy", "fit"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def directions(points: F64, p: int, floor: F64) -> F32:
    """Top principal directions of each group, (G, p, D) float32, from points (G, N, D).

    `floor` (G,) is the energy at or below which a direction is noise.
    """
    n_points, n_values = points.shape[1:]
    transposed = points.transpose(0, 2, 1)
    by_point = n_points <= n_values
    gram = points @ transposed if by_point else transposed @ points
    # eigh sorts upwards.
    leading = np.linalg.eigh(gram)[1][:, :, ::-1][:, :, :p].transpose(0, 2, 1)
    # From points to values: u^T X = s v^T; the normalisation divides by s.
    found = _orthonormal(leading @ points) if by_point else np.ascontiguousarray(leading)
    # Eigenvalues of the Gram matrix cannot tell energies below 1e-16 of the largest from nothing.
    # The energy measured along an orthonormal direction can, and p >= the limit then leaves no
    # small direction out.
    along = found @ transposed
    kept = np.einsum("gpn,gpn->gp", along, along)
    found = np.where((kept > floor[:, None])[:, :, None], found, 0.0)
    at = np.abs(found).argmax(axis=2)[:, :, None]
    sign = np.where(np.take_along_axis(found, at, axis=2) < 0.0, -1.0, 1.0)
    return (found * sign).astype(np.float32)


def _orthonormal(vectors: F64) -> F64:
    """Gram-Schmidt within each group, rows in order, two passes; dependent rows become zero.

    Directions of small energy, computed through the Gram matrix, lean on the larger ones by
    rounding; a second pass makes them orthogonal to float64 rounding ("twice is enough": a row
    that the second pass shortens again was nothing but rounding noise).  Plain sums instead of a
    library QR, since that would go group by group.
    """
    out = np.zeros_like(vectors)
    for j in range(vectors.shape[1]):
        v, kept = _unit(vectors[:, j]), np.ones(len(vectors), bool)
        for _ in range(2 if j else 0):
            along = out[:, :j] @ v[:, :, None]
            rest = v - (out[:, :j].transpose(0, 2, 1) @ along)[:, :, 0]
            v, kept = _unit(rest), np.einsum("gd,gd->g", rest, rest) > 0.25
        out[:, j] = np.where(kept[:, None], v, 0.0)
    return out


def _unit(v: F64) -> F64:
    """Scale each row to norm 1; a zero row stays zero."""
    # Scaling by the largest entry first keeps the squares of tiny vectors from vanishing.
    top = np.abs(v).max(axis=1, keepdims=True)
    v = v / np.where(top > 0.0, top, 1.0)
    norm = np.sqrt(np.einsum("gd,gd->g", v, v))[:, None]
    return v / np.where(norm > 0.0, norm, 1.0)


def energy(points: F64) -> F64:
    """Sum of squares of each group."""
    total: F64 = np.einsum("gnd,gnd->g", points, points)
    return total


def fit(points: F64, stored: F32) -> F32:
    """Least-squares coefficients (G, N, p) of points (G, N, D) on directions (G, p, D)."""
    basis = stored.astype(np.float64)
    gram = basis @ basis.transpose(0, 2, 1)
    # A zero direction has a zero row; a one on its diagonal makes its coefficient 0.
    diagonal = np.einsum("gpp->gp", gram)
    diagonal[diagonal == 0.0] = 1.0
    right = basis @ points.transpose(0, 2, 1)
    with np.errstate(over="ignore"):  # the caller refuses what float32 cannot hold
        return np.linalg.solve(gram, right).transpose(0, 2, 1).astype(np.float32)
