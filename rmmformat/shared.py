"""Deltas of one target coded together: a frame that they share, and what is left of each.

:mod:`rmmformat.merge.sharing` says what could be shared; here it is coded, closed loop: what a
task adds is fitted to the frame as a reader decodes it, so no rounding of the frame is lost twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.deltas import Coded, Delta, leading
from rmmformat.format import trellis
from rmmformat.format.restore import sum_terms
from rmmformat.format.writer import EncodedArray, FramePart
from rmmformat.merge.sharing import (
    Side,
    coded_coefficients,
    coded_rows,
    common_gauge,
    n_directions,
    subspace,
)
from rmmformat.rows import measure

__all__ = ["Frame", "FramedDelta", "frames"]

Float32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: Components with at least this energy, in squares of the step, may be worth coding.
_FAINT = 64.0
#: A common gauge is tried if this part of the deltas' energy, or less, is left without it.
_ALIKE = 0.5


@dataclasses.dataclass(frozen=True)
class _Part:
    """One factor's side of a frame, and how it is read."""

    part: FramePart
    mean: Float32 | None
    basis: Float32 | None

    @property
    def n_bytes(self) -> int:
        arrays = (self.part.mean, self.part.basis)
        return sum(len(raw) for array in arrays if array is not None for raw in array.runs)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What the deltas of a target share; without a gauge each is in its own decomposition."""

    a: _Part | None
    b: _Part | None
    gauge: F64 | None

    @property
    def parts(self) -> tuple[FramePart | None, FramePart | None]:
        """As the container takes them."""
        return (
            None if self.a is None else self.a.part,
            None if self.b is None else self.b.part,
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of the frame itself and of its record."""
        return 88 + sum(part.n_bytes for part in (self.a, self.b) if part is not None)


def frames(deltas: Sequence[Delta], steps: Sequence[float], tasks: int) -> list[Frame]:
    """Frames that may pay at these steps, for as many tasks, of which `deltas` are a sample."""
    step = float(np.exp(np.mean(np.log(steps))))
    found = [_row_spaces(deltas, steps, tasks), _common(deltas, step, tasks)]
    return [frame for frame in found if frame is not None]


def _row_spaces(deltas: Sequence[Delta], steps: Sequence[float], tasks: int) -> Frame | None:
    rank = max(delta.original.rank for delta in deltas)
    parts: list[_Part | None] = []
    for is_a in (True, False):
        sides = []
        for delta, own in zip(deltas, steps, strict=True):
            weight = delta.energy / own**2
            n = int(np.count_nonzero(weight > _FAINT))
            sides.append(Side(delta.V[:n] if is_a else delta.U.T[:n], weight[:n], is_a))
        stack = [np.sqrt(side.weight)[:, None] * side.rows for side in sides]
        if not sum(map(len, stack)):
            return None
        directions, energy = subspace(stack)
        q = n_directions(sides, directions, energy, rank, tasks)
        if q == 0:
            parts.append(None)
            continue
        fine = np.sqrt(len(deltas) / tasks / energy[:q])
        raw, read = trellis.encode_rows(directions[:q].astype(np.float32), fine, tied=True)
        basis = EncodedArray(((trellis.CODE, q),), (raw,))
        length = directions.shape[1]
        parts.append(_Part(FramePart(length, q, rank, None, basis, row_mixing=True), None, read))
    if parts == [None, None]:
        return None
    return Frame(parts[0], parts[1], None)


def _common(deltas: Sequence[Delta], step: float, tasks: int) -> Frame | None:
    if len({delta.original.rank for delta in deltas}) > 1:
        return None
    factors = []
    for delta in deltas:
        a, b = (x.astype(np.float64) for x in (delta.original.A, delta.original.B))
        factors.append((a, b / delta.norm))
    found = common_gauge(factors)
    if found is None:
        return None
    gauge, mean_a, mean_b, left_a, left_ab = found
    if min(left_a, left_ab) > _ALIKE:
        return None
    fine = step / np.sqrt(tasks)
    rank = len(mean_a)
    raw, read = trellis.encode_rows(mean_a.astype(np.float32), np.full(rank, fine), tied=False)
    array = EncodedArray(((trellis.CODE, rank),), (raw,))
    parts: list[_Part | None] = [
        _Part(FramePart(mean_a.shape[1], 0, rank, array, None), read, None),
        None,
    ]
    if left_ab <= _ALIKE:
        # In units of a delta's norm, as B comes back from the fit.
        wanted = fine / np.linalg.norm(mean_a, axis=1)
        norm = float(np.exp(np.mean([np.log(delta.norm) for delta in deltas])))
        raw, read = trellis.encode_rows(
            (norm * mean_b).astype(np.float32), norm * wanted, tied=True
        )
        array = EncodedArray(((trellis.CODE, rank),), (raw,))
        parts[1] = _Part(FramePart(mean_b.shape[1], 0, rank, array, None), read, None)
    return Frame(parts[0], parts[1], gauge)


class FramedDelta(Delta):
    """One delta, ready to be coded at any step as what a frame lacks of it."""

    def __init__(self, delta: Delta, frame: Frame) -> None:
        self.__dict__.update(delta.__dict__)
        self.frame = frame

    def _code(self, step: float, count: int) -> Coded:
        frame, rank = self.frame, self.original.rank
        absolute = step * self.norm
        if frame.gauge is None:
            goal = np.zeros((rank, self.V.shape[1]))
            goal[:count] = (self.gain * self.s[:count, None]) * self.V[:count]
            wanted = np.full(count, absolute * self.gain)
        else:
            goal, count = frame.gauge @ self.original.A.astype(np.float64), rank
            # B is in units of the delta there, so A is in those of its singular values.
            wanted = np.full(count, step)
        coefficients_a, a, read_a = _side(frame.a, goal, wanted, tied=False)
        A = read_a[:count].astype(np.float64)
        gram = A @ A.T
        goal = np.zeros((rank, self.U.shape[0]))
        goal[:count] = np.linalg.lstsq(gram, A @ (self.V.T * self.s), rcond=None)[0] @ self.U.T
        wanted = absolute / np.sqrt(np.maximum(np.diag(gram), 1e-300))
        coefficients_b, b, read_b = _side(frame.b, goal, wanted, tied=True)
        error = measure(self.original, read_a, read_b)
        return Coded(a, b, error, coefficients_a, coefficients_b, framed=True)


def _side(
    part: _Part | None, goal: F64, steps: F64, *, tied: bool
) -> tuple[EncodedArray | None, EncodedArray | None, Float32]:
    """Coefficients, residual and decoded rows of one factor, of which the first rows count."""
    rank, length = goal.shape
    count = len(steps)
    if part is None:
        raw, decoded = trellis.encode_rows(goal[:count].astype(np.float32), steps, tied=tied)
        return None, leading(raw, count, rank), np.pad(decoded, ((0, rank - count), (0, 0)))
    coefficients, numbers = None, None
    basis = None if part.basis is None else part.basis[:, None, :]
    if part.basis is not None:
        numbers, coefficients = _coefficients(part.basis, goal, steps)

    def read(residual: Float32 | None) -> Float32:
        return sum_terms(
            rank,
            length,
            mean=part.mean,
            basis=basis,
            coefficients=numbers,
            residual=residual,
            group=length,
            row_mixing=part.part.row_mixing,
        )

    shared = read(None)
    left = (goal - shared)[:count]
    worth = coded_rows(np.square(left).mean(axis=1) / np.square(steps), length)
    if not worth.any():
        return coefficients, None, shared
    last = int(np.flatnonzero(worth)[-1]) + 1
    rows = np.where(worth[:last, None], left[:last], 0.0).astype(np.float32)
    raw, decoded = trellis.encode_rows(rows, steps[:last], tied=tied)
    residual = np.pad(decoded, ((0, rank - last), (0, 0)))
    return coefficients, leading(raw, last, rank), read(residual)


def _coefficients(basis: Float32, goal: F64, steps: F64) -> tuple[Float32, EncodedArray]:
    """Coefficients of rows over shared directions: each of the q rows has one for every row."""
    wide = basis.astype(np.float64)
    rank, count = len(goal), len(steps)
    numbers = np.linalg.solve(wide @ wide.T, wide @ goal.T)
    numbers[:, count:] = 0.0
    # Rows differ in what an error costs them; one step serves all of a direction's.
    step = 1.0 / np.sqrt(np.mean(1.0 / np.square(steps)))
    mean_square = np.square(numbers / step).mean(axis=1)
    numbers[~coded_coefficients(mean_square, rank, count)] = 0.0
    if not numbers.any():
        return np.zeros(numbers.shape, np.float32), EncodedArray(((0, len(basis)),), (b"",))
    last = int(np.flatnonzero(numbers.any(axis=1))[-1]) + 1
    raw, decoded = trellis.encode_rows(
        numbers[:last].astype(np.float32), np.full(last, step), tied=False
    )
    missing = len(basis) - last
    return np.pad(decoded, ((0, missing), (0, 0))), leading(raw, last, len(basis))
