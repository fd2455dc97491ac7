"""EMR-Merging: elect one vector, and keep a mask and a rescaler for each task.

With tasks tau_i, all over one array::

    gamma = sign(sum_i tau_i)                                  the elected signs
    eps   = max_i |tau_i| over the tasks whose sign is gamma   the elected magnitudes
    tau   = gamma * eps                                        the one vector kept
    M_i   = (tau_i * tau > 0)                                  one bit a value and task
    l_i   = sum |tau_i| / sum |M_i * tau|                      one number a task

and task i comes back as ``l_i * M_i * tau``.

Source: EMR-Merging, arXiv 2405.17461, section 3.2 (its rescaler is one number for the whole model;
here it is one for each array given, which can only be closer).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError

__all__ = ["Elected", "emr"]

Array = npt.NDArray[np.generic]
F32 = npt.NDArray[np.float32]
Bits = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, eq=False)
class Elected:
    """What EMR-Merging keeps of one array of n tasks.

    Parameters
    ----------
    unified
        The elected vector, float32, of the shape of one task.
    masks
        (n, ...) bool.
    rescalers
        (n,) float32.
    """

    unified: F32
    masks: Bits
    rescalers: F32

    def task(self, i: int) -> F32:
        """Give task i back."""
        return np.where(self.masks[i], self.rescalers[i] * self.unified, np.float32(0.0))

    @property
    def n_bytes(self) -> int:
        """Bytes to keep it: 4 a value, a bit a value and task (in whole bytes), 4 a rescaler."""
        values = self.unified.size
        return 4 * values + len(self.masks) * (-(-values // 8)) + 4 * len(self.rescalers)


def emr(tasks: Array) -> Elected:
    """Merge one array of n tasks.

    Parameters
    ----------
    tasks
        (n, ...) array: one factor, or the dense delta, of n tasks.

    Returns
    -------
    Elected

    Raises
    ------
    ShapeError
        If there is no task.

    Notes
    -----
    Where the tasks cancel exactly no sign is elected, and every task loses the value.

    Source: arXiv 2405.17461, section 3.2, algorithm 1.
    """
    if tasks.ndim < 2 or 0 in tasks.shape:
        raise ShapeError(f"need a stack of tasks (n, ...), not empty, got {tasks.shape}")
    values = tasks.astype(np.float64)
    gamma = np.sign(values.sum(axis=0))
    aligned = values * gamma
    unified = (gamma * aligned.max(axis=0, initial=0.0)).astype(np.float32)
    masks = aligned * np.abs(unified) > 0.0
    axes = tuple(range(1, values.ndim))
    kept = (masks * np.abs(unified)).sum(axis=axes)
    whole = np.abs(values).sum(axis=axes)
    rescalers = np.divide(whole, kept, out=np.zeros_like(whole), where=kept > 0.0)
    return Elected(unified, masks, rescalers.astype(np.float32))
