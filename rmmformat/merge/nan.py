"""NAN: weigh each task by the inverse of its norm.

Source: NAN, arXiv 2505.16148: the least-squares view of merging makes the weight of a model fall
with the size of its parameters, so the weights are the inverse norms over their sum.  The published
method is a choice of weights for any merge; here they weigh the sum of task vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.baselines import mean_product

__all__ = ["inverse_norm_weights", "nan_product"]

Array = npt.NDArray[np.generic]
F64 = npt.NDArray[np.float64]


def inverse_norm_weights(norms: Sequence[float]) -> F64:
    """Weights ``(1 / |t|) / sum_j (1 / |t_j|)``; a task of norm zero gets none.

    Parameters
    ----------
    norms
        Norms of the tasks' deltas, not negative: of one target, or of the whole model.

    Returns
    -------
    (n,) float64, summing to 1 (to 0 if every norm is 0)

    Raises
    ------
    ShapeError
        If there is none, or one is negative or not finite.

    Source: arXiv 2505.16148.
    """
    values = np.asarray(norms, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ShapeError("need the norm of at least one task")
    if not np.isfinite(values).all() or (values < 0.0).any():
        raise ShapeError("norms must be finite and not negative")
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=values > 0.0)
    total = inverse.sum()
    weights: F64 = inverse / total if total > 0.0 else inverse
    return weights


def nan_product(
    factors: Sequence[tuple[Array, Array]], scales: Sequence[float], norms: Sequence[float]
) -> tuple[F64, F64]:
    """Weighted sum of the deltas, exactly, in factored form.

    Parameters
    ----------
    factors
        Pairs A (r_t, n_in), B (n_out, r_t).
    scales
        The multiplier of each task; the result's is 1.
    norms
        As :func:`inverse_norm_weights` takes them.

    Returns
    -------
    A' : (sum r_t, n_in) float64
    B' : (n_out, sum r_t) float64

    Raises
    ------
    ShapeError
        If the numbers of tasks, scales and norms differ.

    Source: arXiv 2505.16148, applied to arXiv 2212.04089's sum of task vectors.
    """
    if len(norms) != len(scales):
        raise ShapeError(f"need one norm a task, got {len(norms)} for {len(scales)}")
    weights = inverse_norm_weights(norms)
    n = len(scales)
    return mean_product(factors, [float(w) * n * s for w, s in zip(weights, scales, strict=True)])
