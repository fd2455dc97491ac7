"""One delta to coded rows: at a step, within an error, or exactly.

Every delta is coded in its singular value decomposition: the leading components' rows of A,
``s_k v_k``, with one step; then the rows of B fitted to what A decodes to; what is not worth its
bits is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rmmformat.errors import OptionError
from rmmformat.format import trellis
from rmmformat.format.encodings import by_name
from rmmformat.format.writer import EncodedArray
from rmmformat.merge.gauge import delta_svd
from rmmformat.merge.planner import Spectra, predict, steps_for_error
from rmmformat.model import Factors
from rmmformat.rows import encode_rows, exact_rows, measure

__all__ = [
    "Coded",
    "Delta",
    "exact",
    "finite",
    "fit_size",
    "leading",
    "plan_error",
    "search",
    "within_error",
    "within_range",
]

F64 = npt.NDArray[np.float64]

#: A coded error this close below what was asked is close enough, and where corrections aim.
_ERROR_BAND, _ERROR_AIM = 0.985, 0.994
#: The same for the bytes of a target.
_SIZE_BAND, _SIZE_AIM = 0.99, 0.9975
_ATTEMPTS = 6
#: Steps are sought within so many octaves of the first; beyond, nothing is left to code or gain.
_OCTAVES = 60.0
_LEAST_NORM = 1e-25


@dataclasses.dataclass(frozen=True)
class Coded:
    """The arrays of one delta; one that is None has no bytes and adds nothing."""

    a: EncodedArray | None
    b: EncodedArray | None
    error: float
    coefficients_a: EncodedArray | None = None
    coefficients_b: EncodedArray | None = None
    framed: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.coefficients_a, self.a, self.coefficients_b, self.b)
        return sum(len(raw) for array in arrays if array is not None for raw in array.runs)


class Delta:
    """One delta, ready to be coded at any step."""

    def __init__(self, original: Factors) -> None:
        self.original = original
        self.U, self.s, self.V = delta_svd(original.A, original.B)
        self.norm = float(np.linalg.norm(self.s))
        # A power of two from A to B makes their norms alike, so that either fits in f16.
        rows = max(1, int(np.count_nonzero(self.s)))
        self.gain = 1.0
        if self.norm > 0:
            self.gain = 2.0 ** round(math.log2(math.sqrt(rows) / self.norm) / 2)

    @property
    def energy(self) -> F64:
        """Energy of each component over that of the delta."""
        return np.square(self.s / self.norm) if self.norm > 0 else np.zeros_like(self.s)

    def code(self, step: float, count: int) -> Coded:
        """Code the first `count` components with one step, relative to the norm of the delta."""
        for _ in range(_ATTEMPTS):
            if count == 0 or math.isinf(step):
                break
            try:
                return self._code(step, count)
            except OptionError:  # finer than the encoding goes
                step *= 2.0
        rank = self.original.rank
        return Coded(zeros(rank), zeros(rank), 1.0 if self.norm > 0 else 0.0)

    def _code(self, step: float, count: int) -> Coded:
        rank = self.original.rank
        absolute = step * self.norm
        rows_a = (self.gain * self.s[:count, None]) * self.V[:count]
        raw_a, read_a = trellis.encode_rows(
            rows_a.astype(np.float32), np.full(count, absolute * self.gain), tied=False
        )
        A = read_a.astype(np.float64)
        gram = A @ A.T
        fitted = np.linalg.lstsq(gram, A @ (self.V.T * self.s), rcond=None)[0] @ self.U.T
        raw_b, read_b = trellis.encode_rows(
            fitted.astype(np.float32), absolute / np.sqrt(np.diag(gram)), tied=True
        )
        return Coded(
            leading(raw_a, count, rank),
            leading(raw_b, count, rank),
            measure(self.original, read_a, read_b),
        )

    def plain(self) -> Coded:
        """All components that are not zero, as f32."""
        root = np.sqrt(self.s)
        missing = ((0, self.original.rank - len(self.s)), (0, 0))
        a, read_a = encode_rows(
            np.pad(root[:, None] * self.V, missing).astype(np.float32), by_name("f32").code
        )
        b, read_b = encode_rows(
            np.pad(root[:, None] * self.U.T, missing).astype(np.float32), by_name("f32").code
        )
        return Coded(a, b, measure(self.original, read_a, read_b))


def fit_size(
    attempt: Callable[[float], list[Coded]], budget: float, bytes_an_octave: float
) -> tuple[list[Coded], float]:
    """Find the finest coding that fits, and the factor of the steps that gives it.

    A step of half the size costs a bit a value; less where much is shared.
    """
    octaves, best, best_bytes, best_factor = 0.0, None, -1, math.inf
    slope, previous = bytes_an_octave, None
    for number in range(40):
        coded = attempt(2.0**octaves)
        n_bytes = sum(item.n_bytes for item in coded)
        if best_bytes < n_bytes <= budget:
            best, best_bytes, best_factor = coded, n_bytes, 2.0**octaves
        if n_bytes <= budget and (n_bytes >= _SIZE_BAND * budget or number >= _ATTEMPTS):
            break
        if best is not None and number >= _ATTEMPTS:
            break
        if previous is not None and octaves != previous[0]:
            slope = (previous[1] - n_bytes) / (octaves - previous[0])
            slope = min(max(slope, 0.1 * bytes_an_octave), 2.0 * bytes_an_octave)
        previous = octaves, n_bytes
        octaves += (n_bytes - _SIZE_AIM * budget) / slope
        octaves += 0.25 * max(0, number - _ATTEMPTS)  # nothing has fitted: go on, faster
        octaves = min(max(octaves, -_OCTAVES), _OCTAVES)
    return (attempt(math.inf) if best is None else best), best_factor


def within_error(original: Factors, bound: float) -> Coded:
    """Fewest bytes at which one delta's measured error is at most `bound`."""
    kept = exact(original)
    if not finite(original):
        return kept
    delta = Delta(original)
    if not within_range(delta.norm):
        return kept
    if delta.norm == 0:
        return delta.code(1.0, 0)
    step, count = plan_error(delta, bound)
    candidates = [kept]
    if step > 0:
        candidates.append(search(delta, bound, step, count))
    if candidates[-1].error > bound or len(candidates) == 1:
        candidates.append(delta.plain())
    return min((c for c in candidates if c.error <= bound), key=lambda c: c.n_bytes)


def plan_error(delta: Delta, bound: float) -> tuple[float, int]:
    """Step and number of components that should give an error; step 0 where exact is cheaper."""
    original = delta.original
    spectra = Spectra.collect(
        [delta.energy],
        [original.A.shape[1]],
        [original.B.shape[0]],
        [exact(original).n_bytes],
    )
    planned = predict(spectra, steps_for_error(spectra, _ERROR_AIM * bound))
    return float(planned.steps[0]), int(planned.counts[0])


def search(delta: Delta, bound: float, step: float, count: int) -> Coded:
    """Largest step that keeps the bound; the last one tried if none does."""
    energy, best = delta.energy, None
    good = bad = 0.0
    for number in range(2 * _ATTEMPTS):
        coded = delta.code(step, count)
        if coded.error <= bound:
            good = max(good, step)
            if best is None or coded.n_bytes < best.n_bytes:
                best = coded
            if coded.error >= _ERROR_BAND * bound:
                break
        else:
            bad = step if bad == 0 else min(bad, step)
        if best is not None and number >= _ATTEMPTS:
            break
        left_out = float(energy[count:].sum())
        goal = (_ERROR_AIM * bound) ** 2 - left_out
        if goal <= 0.1 * (bound * bound - left_out) or goal <= 0:
            if count == len(energy):
                break
            count, good, bad = count + 1, 0.0, 0.0
            continue
        # What is not left out comes from rounding, which goes with the square of the step.
        step *= math.sqrt(goal / max(coded.error**2 - left_out, 0.1 * goal))
        if good and bad and not good < step < bad:
            step = math.sqrt(good * bad)
    return coded if best is None else best


def exact(original: Factors) -> Coded:
    """Both factors bit for bit."""
    return Coded(exact_rows(original.A), exact_rows(original.B.T), 0.0)


def within_range(norm: float) -> bool:
    """Whether rows of a delta keep clear of the ends of f32; a delta beyond is kept exactly."""
    return norm == 0 or _LEAST_NORM < norm < 1.0 / _LEAST_NORM


def finite(original: Factors) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(
        np.isfinite(original.A.astype(np.float32)).all()
        and np.isfinite(original.B.astype(np.float32)).all()
    )


def leading(raw: bytes, count: int, rank: int) -> EncodedArray:
    """A run of the first `count` of `rank` rows; the others are zero."""
    if count == rank:
        return EncodedArray(((trellis.CODE, count),), (raw,))
    return EncodedArray(((trellis.CODE, count), (0, rank - count)), (raw, b""))


def zeros(rank: int) -> EncodedArray:
    return EncodedArray(((0, rank),), (b"",))
