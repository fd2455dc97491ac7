"""Low-rank factors of what a full fine-tune changed (post-training SVD, PT-SVD).

``delta = W_task - W_base`` is cut to its leading singular directions: ``B = U sqrt(S)`` and
``A = sqrt(S) V^T``, the best ``B A`` of that rank in the Frobenius norm (Eckart & Young 1936).

The SVD is LAPACK's, or, for large matrices, a randomised one that goes on until what it would still
gain is small against what rank truncation leaves anyway.  Either way the error is measured on the
float32 factors that are handed out.

Source: arXiv 2510.14163 (PT-SVD as a source of factors); Halko, Martinsson & Tropp (2011),
algorithm 4.4, for the randomised one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.merge.gauge import left_signs

__all__ = ["DEFAULT_RANK", "Criterion", "Extract", "Svd", "extract"]

F32 = npt.NDArray[np.float32]
Svd = Literal["auto", "exact", "random"]
_Triple = tuple[F32, F32, F32]

DEFAULT_RANK = 16

#: Up to this, short side squared times long side, a matrix is decomposed exactly: below a second.
_EXACT_WORK = 1 << 28
_OVERSAMPLE = 16
#: What the directions may still miss: this part of the squared error of the truncation.
_TOLERANCE = 5e-5
_LIMIT = 60  # rounds
_BLOCK = 1 << 22  # values that are looked at together


@dataclasses.dataclass(frozen=True)
class Criterion:
    """How many components are kept.

    Parameters
    ----------
    rank
        At most so many; without any of the three, :data:`DEFAULT_RANK`.
    energy
        The fewest that keep this part of the squared Frobenius norm, over 0 and below 1.
    max_error
        The fewest that leave at most this relative error, from 1e-5 to 1.

    Raises
    ------
    ShapeError
        Out of range, or `energy` together with `max_error`.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ShapeError(f"rank must be positive, got {self.rank}")
        if self.energy is not None and not 0.0 < self.energy < 1.0:
            raise ShapeError(f"energy must be between 0 and 1, got {self.energy}")
        if self.max_error is not None and not 1e-5 <= self.max_error < 1.0:
            raise ShapeError(f"error must be from 1e-5 to 1, got {self.max_error}")
        if self.energy is not None and self.max_error is not None:
            raise ShapeError("energy and error say the same thing twice")

    @property
    def most(self) -> int | None:
        """The largest rank allowed, None where there is no limit."""
        if self.rank is None and self.energy is None and self.max_error is None:
            return DEFAULT_RANK
        return self.rank

    @property
    def left(self) -> float | None:
        """The part of the squared norm that may be left out, None where only rank counts."""
        if self.max_error is not None:
            return self.max_error**2
        return None if self.energy is None else 1.0 - self.energy


@dataclasses.dataclass(frozen=True, eq=False)
class Extract:
    """Factors of one delta.

    Attributes
    ----------
    A
        (rank, n_in) float32, ``sqrt(S) V^T``.
    B
        (n_out, rank) float32, ``U sqrt(S)``.
    norm
        Frobenius norm of the delta.
    residual
        Frobenius norm of ``delta - B A``, measured on these factors.
    """

    A: F32
    B: F32
    norm: float
    residual: float

    @property
    def rank(self) -> int:
        """Components kept."""
        return int(self.A.shape[0])

    @property
    def error(self) -> float:
        """Relative error, ``residual / norm``; 0 for a delta of zeros."""
        return self.residual / self.norm if self.norm else 0.0


def extract(delta: F32, criterion: Criterion, svd: Svd = "auto", seed: int = 0) -> Extract:
    """Cut one delta to low-rank factors.

    Parameters
    ----------
    delta
        (n_out, n_in) float32, finite.
    criterion
        How many components are kept; never fewer than one, nor such as hold nothing but rounding.
    svd
        ``"exact"``: LAPACK's, all of it.  ``"random"``: subspace iteration, to which float32 and a
        tolerance of some 1e-4 of the error are the limits.  ``"auto"``: exact where that takes less
        than a second or a quarter of all components is wanted, else random.
    seed
        Of the random start.

    Returns
    -------
    Extract
        Components by falling singular value; signs as in :func:`~rmmformat.merge.gauge.delta_svd`.

    Raises
    ------
    ShapeError
        `delta` is no such array, or `svd` is unknown.

    Notes
    -----
    Memory: exact, some three times the delta; random, the delta and a few times the factors.
    Deterministic for one machine, numpy, BLAS library and number of its threads.
    """
    if delta.ndim != 2 or 0 in delta.shape or delta.dtype != np.float32:
        raise ShapeError(f"expected (n_out, n_in) float32, got {delta.shape} {delta.dtype}")
    if svd not in ("auto", "exact", "random"):
        raise ShapeError(f"unknown svd {svd!r}: auto, exact or random")
    total = _energy(delta)
    norm = math.sqrt(total)
    if total == 0.0:
        rows, columns = delta.shape
        return Extract(
            np.zeros((1, columns), np.float32), np.zeros((rows, 1), np.float32), 0.0, 0.0
        )
    goal = None if criterion.left is None else (1.0 - criterion.left) * total
    most = min(*delta.shape, criterion.most or min(delta.shape))
    work = min(delta.shape) * delta.size
    if svd == "exact" or (svd == "auto" and work <= _EXACT_WORK):
        left, s, right = _exact(delta)
    else:
        left, s, right = _random(delta, total, goal, most, svd == "auto", seed)
    # What is left of an exact zero after rounding is no component.
    real = max(1, int(np.count_nonzero(s > np.finfo(np.float32).eps * len(s) * s[0])))
    rank = min(most, real)
    if goal is not None:
        captured = np.cumsum(s.astype(np.float64) ** 2)
        rank = min(rank, int(np.searchsorted(captured, goal)) + 1)
    while True:
        root = np.sqrt(s[:rank])
        signs = left_signs(left[:, :rank])
        A = np.ascontiguousarray((root * signs)[:, None] * right[:rank])
        B = np.ascontiguousarray(left[:, :rank] * (root * signs))
        residual = math.sqrt(_residual(delta, A, B))
        # Rounding can leave a hair more than the singular values say.
        if (
            criterion.left is None
            or rank >= min(most, real)
            or (residual <= math.sqrt(criterion.left) * norm)
        ):
            return Extract(A, B, norm, residual)
        rank += 1


def _exact(delta: F32) -> _Triple:
    left, s, right = np.linalg.svd(delta, full_matrices=False)
    return left, s, right


def _random(
    delta: F32, total: float, goal: float | None, most: int, may_be_exact: bool, seed: int
) -> _Triple:
    """Leading singular triples: `most` of them, or as many as `goal` takes."""
    short = min(delta.shape)
    k = most if goal is None else min(most, DEFAULT_RANK)
    while True:
        # Where most components are wanted, the whole is cheaper, and needs no tolerance.
        if may_be_exact and 4 * (k + _OVERSAMPLE) > short:
            return _exact(delta)
        left, s, right = _subspace(delta, total, k, min(short, k + _OVERSAMPLE), seed)
        enough = goal is not None and float(np.sum(s.astype(np.float64) ** 2)) >= goal
        if enough or k >= most:
            return left, s, right
        k = min(most, 2 * k)


def _subspace(delta: F32, total: float, k: int, width: int, seed: int) -> _Triple:
    """Iterate a random subspace of `width` until its best `k` directions hardly gain."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal((delta.shape[1], width), dtype=np.float32)
    q = np.linalg.qr(delta @ start)[0]
    held, gain = -math.inf, math.inf
    for _ in range(_LIMIT):
        other, small = np.linalg.qr(delta.T @ q)
        left, s, right = np.linalg.svd(small.T)
        now = float(np.sum(s[:k].astype(np.float64) ** 2))
        before, gain, held = gain, now - held, now
        # Gains fall about geometrically, so their rest is the last one times ratio / (1 - ratio).
        ratio = min(max(gain / before, 0.0), 0.99) if math.isfinite(before) else 0.99
        if gain * ratio / (1.0 - ratio) <= _TOLERANCE * max(total - now, 1e-12 * total):
            break
        q = np.linalg.qr(delta @ other)[0]
    return q @ left[:, :k], s[:k], right[:k] @ other.T


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    step = max(1, _BLOCK // shape[1])
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _energy(matrix: F32) -> float:
    """Sum of squares, in float64, without a float64 copy of the whole."""
    return _sum(matrix, lambda rows: matrix[rows])


def _residual(delta: F32, A: F32, B: F32) -> float:
    """Squared norm of ``delta - B A``, from the values themselves."""
    return _sum(delta, lambda rows: delta[rows] - B[rows] @ A)


def _sum(matrix: F32, part: Callable[[slice], F32]) -> float:
    total = 0.0
    for rows in _blocks(matrix.shape):
        block = part(rows).astype(np.float64)
        total += float(np.einsum("kl,kl->", block, block))
    return total
