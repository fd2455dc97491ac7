"""Reversible Model Merging: shared mean and basis, a few coefficients a task.

The n tasks' versions of one factor, each (r, L), are cut along the long side into G groups of m
positions.  Within a group the tasks are n points; what they share is kept once (a mean and p
orthonormal directions) and every task keeps p numbers.  One formula covers every grouping; for
row k and column l::

    x_t[k, l] = mean[k, l] + sum_j coef_t[j, kc, l // m] * basis[j, kb, l]  (+ residual_t[k, l])

======== ============ ==================== ========================= =====================
grouping group length basis (p, Kb, L)     coefs (n, p, Kc, G)       points in a group
======== ============ ==================== ========================= =====================
position 1            Kb = r               Kc = 1, G = L             n of r values
factor   L            Kb = r               Kc = 1, G = 1             n of r * L values
m        m            Kb = r               Kc = 1, G = ceil(L / m)   n of r * m values
row      L            Kb = 1               Kc = r, G = 1             n * r of L values
======== ============ ==================== ========================= =====================

*position* is the published method.  *row* is a shared row space: every row of every task is a
combination of the same p rows.

Source: Reversible Model Merging, arXiv 2510.14163; Eckart & Young (1936) for the optimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rmmformat import _native
from rmmformat.errors import NonFiniteError, ShapeError
from rmmformat.merge.principal import directions, energy, fit

__all__ = [
    "Grouping",
    "Shared",
    "factor_storage_fraction",
    "max_components",
    "merge",
    "merge_tasks",
    "pad_rank",
    "reconstruct",
    "storage_fraction",
]

Array = npt.NDArray[np.generic]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Grouping = Literal["position", "factor", "row"] | int

# Values of one block of groups in float64: about 16 MB, so that a handful of temporaries stay small
# beside the input while each numpy call still has thousands of groups to work on.
_BLOCK_VALUES = 2_000_000

# Values of a block of positions in float64 on its way to native code: 2 MB, but some cache lines of
# positions at least, however many tasks there are.
_STACK_VALUES = 1 << 18
_STACK_POSITIONS = 64

# A direction that carries less than this part of the norm of its group is float64 rounding noise
# (of the mean, or of a group of lower rank), not data: it is stored as zero.
_NOISE = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """What the tasks share at one factor.

    Parameters
    ----------
    mean
        (r, L) float32, or None where the merge is not centred.
    basis
        (p, Kb, L) float32, Kb = 1 if `row_mixing` else r.  Directions beyond the rank of the data
        are zero.
    group
        Positions in a group, m >= 1; the last group may be shorter.
    row_mixing
        Every row is a combination of the same p rows (Kb = 1, Kc = r) instead of every row having
        its own directions (Kb = r, Kc = 1).

    Raises
    ------
    ShapeError
        If the arrays do not fit together or are not float32.
    """

    mean: F32 | None
    basis: F32
    group: int
    row_mixing: bool

    def __post_init__(self) -> None:
        if self.basis.ndim != 3 or self.basis.dtype != np.float32:
            raise ShapeError(
                f"basis must be float32 of shape (p, rows, length), got {self.basis.dtype} "
                f"{self.basis.shape}"
            )
        if self.group < 1:
            raise ShapeError(f"group length must be at least 1, got {self.group}")
        if self.row_mixing and self.basis.shape[1] != 1:
            raise ShapeError(f"a row basis has one row a direction, got {self.basis.shape}")
        if self.mean is None:
            return
        rows = self.mean.shape[0] if self.row_mixing else self.basis.shape[1]
        if self.mean.shape != (rows, self.length) or self.mean.dtype != np.float32:
            raise ShapeError(
                f"mean must be float32 of shape {(rows, self.length)}, got {self.mean.dtype} "
                f"{self.mean.shape}"
            )

    @property
    def components(self) -> int:
        """Number of directions p."""
        return int(self.basis.shape[0])

    @property
    def length(self) -> int:
        """Long side L of the factor."""
        return int(self.basis.shape[2])

    @property
    def n_groups(self) -> int:
        """Number of groups G."""
        return -(-self.length // self.group)


def merge(
    factors: Array,
    components: int,
    grouping: Grouping = "position",
    center: bool = True,
) -> tuple[Shared, F32]:
    """Find the best shared mean and `components` directions, and every task's coefficients.

    The closed-form optimum of the squared error: in each group the top principal directions of
    the (centred) points.  Mean and basis are rounded to float32, and the coefficients are then the
    least-squares fit *against those rounded values*, so that only their own rounding adds error.

    Parameters
    ----------
    factors
        (n, r, L), any real dtype: the same factor of n tasks, component-major.
    components
        Directions p >= 0 of each group.  Directions beyond :func:`max_components`, or beyond the
        rank of the data, come out zero with coefficients zero.
    grouping
        ``"position"``, ``"factor"``, ``"row"``, or a group length from 1 to L.
    center
        Take out the mean of the tasks first.

    Returns
    -------
    shared : Shared
    coefs : (n, p, Kc, G) float32

    Raises
    ------
    ShapeError
        If `factors` is not three-dimensional and non-empty, or the other arguments do not fit it.
    NonFiniteError
        If `factors` holds NaN or infinity, or values beyond the range of float32.

    Notes
    -----
    Cost: for each group the Gram matrix of its points or of its values, whichever is smaller, and
    its eigen-decomposition: natively, several at once, where it has up to 64 rows and a group up to
    16,384 values (so always by position, unless tasks are very many), else by LAPACK.  Memory
    beyond input and output: a few float64 copies of a block of groups (2 million values) or of
    one group, whichever is larger; natively one copy of the input.

    Directions are orthonormal to float32 rounding, sorted by falling energy, with the entry of
    largest magnitude positive.  Small groups come out with the same bits on every machine and any
    number of threads; for large ones the result is a function of the input for one machine,
    numpy, BLAS and its threads.

    Source: arXiv 2510.14163 (RMM): the mean, ``V`` from the SVD of the centred points and
    ``c_i = V^T (x_i - mean)``.
    """
    if factors.ndim != 3 or 0 in factors.shape:
        raise ShapeError(f"factors must be (tasks, rank, length) and not empty: {factors.shape}")
    if components < 0:
        raise ShapeError(f"components must not be negative, got {components}")
    n, r, length = factors.shape
    rows = grouping == "row"
    group = _group_length(grouping, length)
    if not rows and _native.principal_possible(n, r * group):
        return _merge_small(factors, components, group, center)
    mean32 = np.empty((r, length), np.float32)
    basis = np.zeros((components, 1 if rows else r, length), np.float32)
    coefs = np.zeros((n, components, r if rows else 1, -(-length // group)), np.float32)

    for start, stop, m in _blocks(length, group, n * r):
        block = factors[:, :, start:stop].astype(np.float64)
        mean = block.mean(axis=0) if center else np.zeros(block.shape[1:])
        with np.errstate(over="ignore", invalid="ignore"):
            mean32[:, start:stop] = mean
            against = block - mean32[:, start:stop]  # what the stored mean leaves to be fitted
        if not np.isfinite(against).all():
            raise NonFiniteError("factors hold NaN, infinity or values beyond float32")
        limit = max_components(n, length if rows else r * m, center, rows=r if rows else 1)
        if min(components, limit) == 0:
            continue
        floor = _NOISE**2 * energy(_to_groups(block, m, rows))
        stored = directions(_to_groups(block - mean, m, rows), min(components, limit), floor)
        fitted = fit(_to_groups(against, m, rows), stored)
        kept, first = stored.shape[1], start // group
        if rows:
            basis[:kept, 0] = stored[0]
            coefs[:, :kept, :, 0] = fitted[0].reshape(n, r, kept).transpose(0, 2, 1)
        else:
            n_groups = stored.shape[0]
            basis[:kept, :, start:stop] = (
                stored.reshape(n_groups, kept, r, m)
                .transpose(1, 2, 0, 3)
                .reshape(kept, r, stop - start)
            )
            coefs[:, :kept, 0, first : first + n_groups] = fitted.transpose(1, 2, 0)
    if not np.isfinite(coefs).all():
        raise NonFiniteError("factors hold values beyond float32")
    return Shared(mean32 if center else None, basis, group, rows), coefs


def merge_tasks(
    factors: Sequence[Array],
    components: int,
    grouping: Grouping = "position",
    center: bool = True,
    each: Callable[[Callable[[int], Any], Sequence[int]], Iterable[Any]] = map,
) -> tuple[Shared, F32]:
    """Merge as :func:`merge` does, from the tasks' arrays where they lie, block by block.

    Parameters
    ----------
    factors
        (r_t, L) for each task, component-major, any real dtypes; a lower rank counts as rows of
        zeros.
    components, grouping, center
        As for :func:`merge`.
    each
        Applies a function to every block: ``map``, or that of a pool of threads.

    Returns
    -------
    shared : Shared
    coefs : (n, p, Kc, G) float32
        The same bits as of ``merge(pad_rank(factors, float64), ...)``.

    Raises
    ------
    ShapeError, NonFiniteError
        As :func:`merge` and :func:`pad_rank`.

    Notes
    -----
    Where groups are small, memory beyond input and output is a block of positions in float64 (2 MB,
    or 64 positions of many tasks) for each thread; of large groups it is all of the input.
    """
    if not factors or any(x.ndim != 2 for x in factors) or len({x.shape[1] for x in factors}) != 1:
        raise ShapeError("need factors of two dimensions and one length")
    n, rank, length = len(factors), max(x.shape[0] for x in factors), factors[0].shape[1]
    group = _group_length(grouping, length)
    if components < 0:
        raise ShapeError(f"components must not be negative, got {components}")
    if grouping == "row" or not rank or not _native.principal_possible(n, rank * group):
        return merge(pad_rank(factors, np.float64), components, grouping, center)
    mean = np.empty((rank, length), np.float32)
    basis = np.empty((components, rank, length), np.float32)
    coefs = np.empty((n, components, 1, -(-length // group)), np.float32)
    step = max(_STACK_VALUES // (n * rank), _STACK_POSITIONS)
    step = -(-step // group) * group

    def work(start: int) -> None:
        stop = min(start + step, length)
        stack = np.zeros((n, rank, stop - start))
        for rows, x in zip(stack, factors, strict=True):
            rows[: x.shape[0]] = x[:, start:stop]
        # A block may be no more than what is left behind the whole groups.
        found = _native.find_principal(stack, min(group, stop - start), components, center, 1)
        if found is None:
            raise NonFiniteError("factors hold NaN, infinity or values beyond float32")
        mean[:, start:stop], basis[:, :, start:stop] = found[:2]
        coefs[:, :, 0, start // group : -(-stop // group)] = found[2]

    for _ in each(work, range(0, length, step)):
        pass
    return Shared(mean if center else None, basis, group, False), coefs


def _merge_small(factors: Array, components: int, group: int, center: bool) -> tuple[Shared, F32]:
    """Merge many small groups natively: the same mathematics, several groups at once."""
    found = _native.find_principal(factors, group, components, center)
    if found is None:
        raise NonFiniteError("factors hold NaN, infinity or values beyond float32")
    mean, basis, coefs = found
    return Shared(mean if center else None, basis, group, False), coefs[:, :, None, :]


def reconstruct(
    shared: Shared,
    coef: F32,
    rank: int | None = None,
    residual: F32 | None = None,
) -> F32:
    """Rebuild one task's factor, in exactly the arithmetic of the specification.

    The sum starts at the mean (without one: at the first product), then adds the products in the
    order of the directions and the residual last.  Every product and every sum is rounded to
    float32; nothing is fused.

    Parameters
    ----------
    shared
        What the tasks share.
    coef
        (p, Kc, G) float32, one task's coefficients.
    rank
        Rows to rebuild, the first `rank` of r; all by default.
    residual
        (rank, L) float32, added last.

    Returns
    -------
    (rank, L) float32

    Raises
    ------
    ShapeError
        If the arrays do not fit `shared`, or are not float32.
    """
    row_basis = shared.row_mixing
    if row_basis:
        full = int(coef.shape[1]) if coef.ndim == 3 else 0
    else:
        full = int(shared.basis.shape[1])
    expected = (shared.components, full if row_basis else 1, shared.n_groups)
    if coef.shape != expected or coef.dtype != np.float32:
        raise ShapeError(f"coef must be float32 {expected}, got {coef.dtype} {coef.shape}")
    if shared.mean is not None and shared.mean.shape[0] != full:
        raise ShapeError(f"coef has {full} rows, the mean {shared.mean.shape[0]}")
    rank = full if rank is None else rank
    if not 0 <= rank <= full:
        raise ShapeError(f"rank must be from 0 to {full}, got {rank}")
    if residual is not None and (
        residual.shape != (rank, shared.length) or residual.dtype != np.float32
    ):
        raise ShapeError(
            f"residual must be float32 {(rank, shared.length)}, got {residual.dtype} "
            f"{residual.shape}"
        )

    acc = None if shared.mean is None else shared.mean[:rank].copy()
    for j in range(shared.components):
        along = np.repeat(coef[j, :rank], shared.group, axis=1)[:, : shared.length]
        product: F32 = along * shared.basis[j, :rank]
        acc = product if acc is None else acc + product
    if residual is not None:
        acc = residual.copy() if acc is None else acc + residual
    return np.zeros((rank, shared.length), np.float32) if acc is None else acc


def pad_rank(factors: Sequence[Array], dtype: npt.DTypeLike | None = None) -> Array:
    """Stack factors of different rank into one array, missing rows zero.

    After reconstruction a task of rank r_t takes its first r_t rows.

    Parameters
    ----------
    factors
        Arrays (r_t, L) of one dtype, component-major.
    dtype
        What the result has; then theirs may differ.

    Returns
    -------
    (n, max r_t, L) array of that dtype

    Raises
    ------
    ShapeError
        If there is no factor, or lengths or dtypes differ.
    """
    if not factors or any(x.ndim != 2 for x in factors):
        raise ShapeError("need at least one factor, each of two dimensions")
    lengths = sorted({x.shape[1] for x in factors})
    dtypes = sorted({str(x.dtype) for x in factors})
    if len(lengths) != 1 or (len(dtypes) != 1 and dtype is None):
        raise ShapeError(f"factors must agree in length and dtype, got {lengths} and {dtypes}")
    kind = factors[0].dtype if dtype is None else dtype
    out = np.zeros((len(factors), max(x.shape[0] for x in factors), lengths[0]), kind)
    for row, x in zip(out, factors, strict=True):
        row[: x.shape[0]] = x
    return out


def max_components(n: int, n_values: int, center: bool = True, rows: int = 1) -> int:
    """Directions that suffice to reproduce every task, whatever the data.

    Parameters
    ----------
    n
        Number of tasks.
    n_values
        Values of one point: ``r * m``; L for the grouping ``"row"``.
    center
        Whether the mean is taken out: it spends one point.
    rows
        Points that each task adds to a group: r for the grouping ``"row"``, else 1.
    """
    return max(0, min((n - 1 if center else n) * rows, n_values))


def storage_fraction(n: int, r: int, p: int) -> float:
    """Stored values over the originals' values, grouped by position.

    Source: arXiv 2510.14163, ``(p (r + n) + r) / (r n)``: p directions and a mean of r values,
    n times p coefficients, where n tasks had r values each.
    """
    return (p * (r + n) + r) / (r * n)


def factor_storage_fraction(n: int, r: int, length: int, p: int) -> float:
    """Stored values over the originals' values with the whole factor as one group.

    :func:`storage_fraction` with ``r * length`` values a point: ``(p + 1) / n`` and a little.
    """
    return storage_fraction(n, r * length, p)


def _group_length(grouping: Grouping, length: int) -> int:
    if isinstance(grouping, str):
        if grouping not in ("position", "factor", "row"):
            raise ShapeError(f"unknown grouping {grouping!r}: position, factor, row or a length")
        return 1 if grouping == "position" else length
    if not 1 <= grouping <= length:
        raise ShapeError(f"group length must be from 1 to {length}, got {grouping}")
    return int(grouping)


def _blocks(length: int, group: int, values: int) -> list[tuple[int, int, int]]:
    """Cut 0..length into (start, stop, m): whole groups of m = group, then the short last one."""
    step = max(1, _BLOCK_VALUES // (group * values)) * group
    whole = length // group * group
    blocks = [(i, min(i + step, whole), group) for i in range(0, whole, step)]
    if whole < length:
        blocks.append((whole, length, length - whole))
    return blocks


def _to_groups(block: F64, m: int, rows: bool) -> F64:
    """Reorder (n, r, columns) to (groups, points, values)."""
    n, r, columns = block.shape
    if rows:
        return block.reshape(1, n * r, columns)
    grouped = block.reshape(n, r, columns // m, m).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(grouped).reshape(columns // m, n, r * m)
