"""How fine each delta of a collection has to be coded: bytes against error, before any coding.

A delta in its singular value decomposition, ``sum_k s_k u_k v_k``, is a set of independent
sources: component k carries s_k^2 of its energy, and an error D in each value of ``s_k v_k`` (and
D / s_k^2 in each of u_k) costs ``n D`` of it.  So one number, the *step* of an entry, says all:
every component is coded with the same mean squared error, or left out (reverse water-filling; Cover
& Thomas, *Elements of Information Theory*, section 10.3.3).  This module predicts what a step costs
and what error it leaves, and chooses the steps of many entries under one budget of bytes.

Steps and errors are relative to the norm of the delta.  Nothing here codes anything: the rate is
that of an ideal code plus what trellis-coded quantisation was measured to lose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError

__all__ = ["Allocation", "Spectra", "allocate", "predict", "steps_for_error", "value_bits"]

F64 = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

#: What the trellis does to Gaussian rows (measured): octaves of a row's deviation over its step,
#: the mean squared error over the square of the step, and the bits a value beyond that ratio.
_OCTAVES = (0.6, 1.0, 1.4, 1.8, 2.2, 2.6, 3.0, 4.0, 5.0, 8.0, 14.0)
_DISTORTION = (1.351, 1.264, 1.185, 1.093, 1.047, 1.019, 1.003, 0.989, 0.986, 0.983, 0.981)
_EXCESS = (-0.132, -0.125, -0.097, -0.04, -0.004, 0.014, 0.036, 0.048, 0.053, 0.05, 0.051)
#: The distortion where bits are many, which is what components are chosen by.
DISTORTION = 0.98
#: Energy that a bit must save, in units of DISTORTION * step^2, for a component to be coded: the
#: slope -dD/dR of the Gaussian bound is 2 ln 2 D a bit, of which the trellis keeps 1.53 / 1.39.
SLOPE = 1.53
#: Steps that a row's deviation may have: beyond 14 bits a value the tables of the trellis end.
FINEST = 16000.0
#: Entries that are so few that calls cost more than what they compute.
_FEW = 8
#: How a step follows the error of its entry, see :func:`allocate`.
EXPONENT = 0.25
#: How a step follows the norm of its delta: 0 weighs relative errors alike, 1 absolute ones, which
#: are what moves a model's outputs.  1/2 keeps most accuracy, for 5 % more mean error
#: (docs/fidelity.md).
NORM_EXPONENT = 0.5
#: Norms further than this factor from the middle count as if they were there.
_NORM_RANGE = 4.0


def value_bits(octaves: F64) -> F64:
    """Bits that the trellis takes for a value, by octaves of its row's deviation over its step."""
    bits: F64 = np.maximum(octaves + np.interp(octaves, _OCTAVES, _EXCESS), 0.03)
    return bits


@dataclasses.dataclass(frozen=True)
class Spectra:
    """What the planner knows of E deltas.

    Parameters
    ----------
    energy
        (E, r): squared singular values over their sum, falling; zeros behind.  All zero for a delta
        that is zero.
    n_in, n_out
        (E,): the sides.
    exact_bytes
        (E,): what storing the factors as they are takes, the most that an entry ever costs.
    weight
        (E,): how many tasks have the entry (equal ones are stored once).
    exact
        (E,) bool: entries that can only be stored exactly.
    rate
        (E,): bytes over those that the entry would take alone, where tasks share; 1 otherwise.
    norm
        (E,): Frobenius norm of the delta as applied, for :func:`allocate`; only ratios matter.
    """

    energy: F64
    n_in: F64
    n_out: F64
    exact_bytes: F64
    weight: F64
    exact: npt.NDArray[np.bool_]
    rate: F64
    norm: F64

    @classmethod
    def collect(
        cls,
        energies: Sequence[F64],
        n_in: Sequence[int],
        n_out: Sequence[int],
        exact_bytes: Sequence[int],
        weight: Sequence[int] | None = None,
        exact: Sequence[bool] | None = None,
        rate: Sequence[float] | None = None,
        norm: Sequence[float] | None = None,
    ) -> Spectra:
        """Put deltas of different ranks side by side.

        Raises
        ------
        ShapeError
            The sequences differ in length.
        """
        n = len(energies)
        weight = [1] * n if weight is None else weight
        exact = [False] * n if exact is None else exact
        rate = [1.0] * n if rate is None else rate
        norm = [1.0] * n if norm is None else norm
        if {*map(len, (n_in, n_out, exact_bytes, weight, exact, rate, norm))} != {n}:
            raise ShapeError("statistics of deltas differ in number")
        table = np.zeros((n, max((len(e) for e in energies), default=0)))
        for row, energy in zip(table, energies, strict=True):
            total = energy.sum()
            row[: len(energy)] = energy / total if total > 0 else 0.0
        return cls(
            table,
            np.array(n_in, np.float64),
            np.array(n_out, np.float64),
            np.array(exact_bytes, np.float64),
            np.array(weight, np.float64),
            np.array(exact, np.bool_),
            np.array(rate, np.float64),
            np.array(norm, np.float64),
        )

    def repeated(self, times: int) -> Spectra:
        """All entries, that many times over."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Spectra(
            **{
                name: np.tile(values, (times,) + (1,) * (values.ndim - 1))
                for name, values in fields.items()
            }
        )


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Steps for E entries, and what they are expected to give.

    Attributes
    ----------
    steps
        (E,): relative to each delta's norm; 0 for an entry that is cheaper exact.
    counts
        (E,): components coded; the others are left out.
    n_bytes, errors
        (E,): predicted.
    """

    steps: F64
    counts: Int
    n_bytes: F64
    errors: F64


def predict(spectra: Spectra, steps: F64) -> Allocation:
    """Predict bytes and error of every entry.

    A component is coded if the energy that it restores is worth its bits at the slope that the step
    stands for; since its rows in A and B are of no use without one another, that sets in only at
    about 0.9 bit a value.

    Parameters
    ----------
    spectra
        The entries.
    steps
        (E,) positive.

    Returns
    -------
    Allocation
        Where exact storage is cheaper, its step is 0, its error 0, and its bytes are those.
    """
    energy, n_in, n_out = spectra.energy, spectra.n_in[:, None], spectra.n_out[:, None]
    squares = np.maximum(steps * steps, 1e-300)[:, None]
    noise = DISTORTION * squares
    with np.errstate(divide="ignore"):
        lost_a = np.minimum(1.0, n_in * noise / np.where(energy > 0, energy, 1e-300))
        lost_b = np.minimum(1.0, n_out * noise / np.where(energy > 0, energy, 1e-300))
    kept = energy * (1.0 - lost_a) * (1.0 - lost_b)
    ideal = -0.5 * (n_in * np.log2(lost_a) + n_out * np.log2(lost_b))
    worth = (energy > 0) & (kept >= SLOPE * noise * (ideal + 0.04 * (n_in + n_out) + 16.0))
    active = np.logical_and.accumulate(worth, axis=1)
    counts = active.sum(axis=1)
    bits = np.zeros(len(counts))
    restored = energy * active
    for n in (n_in, n_out):
        octaves = 0.5 * np.log2(np.where(active, energy / (n * squares), 1.0))
        distortion = np.interp(octaves, _OCTAVES, _DISTORTION)
        restored *= np.maximum(0.0, 1.0 - distortion / np.exp2(2.0 * octaves))
        bits += (n * (octaves + np.interp(octaves, _OCTAVES, _EXCESS)) * active).sum(axis=1)
    error = np.sqrt(np.maximum(0.0, energy.sum(axis=1) - restored.sum(axis=1)))
    n_bytes = spectra.rate * np.where(counts > 0, bits / 8 + _bookkeeping(spectra, counts), 0.0)
    exact = spectra.exact | (n_bytes >= spectra.exact_bytes)
    exact &= spectra.exact | (energy.sum(axis=1) > 0)
    return Allocation(
        np.where(exact, 0.0, steps),
        np.where(exact, 0, counts),
        np.where(exact, spectra.exact_bytes, n_bytes),
        np.where(exact, 0.0, error),
    )


def steps_for_error(spectra: Spectra, error: float) -> F64:
    """Choose the largest step of each entry whose predicted error is at most `error`.

    Returns
    -------
    (E,) float64
    """
    low, high = _finest(spectra), np.full(len(spectra.n_in), 1.0)
    n = len(low)
    # For few entries the calls take most of the time: their bisection is done five levels at once.
    levels = 5 if n <= _FEW else 1
    cells = 2**levels
    many = spectra.repeated(cells - 1)
    entries = np.arange(n)
    for _ in range(40 // levels):
        bounds = np.empty((cells + 1, n))
        bounds[0], bounds[cells] = low, high
        width = cells
        while width > 1:
            bounds[width // 2 :: width] = np.sqrt(bounds[:-1:width] * bounds[width::width])
            width //= 2
        good = predict(many, bounds[1:-1].reshape(-1)).errors.reshape(-1, n) <= error
        at = np.zeros(n, np.int64)
        for level in range(levels):
            half = cells >> (level + 1)
            at += half * good[at + half - 1, entries]
        low, high = bounds[at, entries], bounds[at + 1, entries]
    return low


def allocate(spectra: Spectra, budget: float, exponent: float = EXPONENT) -> Allocation:
    """Choose the steps of all entries for a number of bytes.

    Entry e gets the step ``c * error_e^exponent * sqrt(rate_e / weight_e)`` with one c for all, the
    least whose bytes fit the budget.  To minimise the sum of error_e^p, the steps must follow with
    exponent (2 - p) / 2: 0 is best for the root mean square, 1/2 for the mean.  Between them the
    mean moves by 1 to 2.5 %, the largest error by a lot, so the default is 1/4.

    Parameters
    ----------
    spectra
        The entries.
    budget
        Bytes for all of them, each counted once whatever its weight.
    exponent
        See above.

    Returns
    -------
    Allocation
        Its bytes sum to the budget or less; everything is left out where nothing fits, and exact
        where that fits.  Between what the finest step takes (about 14 bits a value of the leading
        component) and exact storage, the rest of a budget is not used.

    Notes
    -----
    Eight rank-16 adapters trained apart (288 entries, bytes of the coded rows over those of the
    originals in f32), mean / largest error in per cent:

    ======  ===========  ===========  ===========
    size    exponent 0   1/4          1/2
    ======  ===========  ===========  ===========
    10.9 %  4.11 / 6.4   4.04 / 7.1   4.01 / 8.9
    3.1 %   24.2 / 39.7  23.9 / 46    23.8 / 56.9
    1.0 %   45.7 / 77.3  45.3 / 81.7  45.2 / 89.4
    ======  ===========  ===========  ===========
    """
    floor = _finest(spectra)
    if spectra.exact_bytes.sum() <= budget:
        zero = np.zeros(len(floor))
        return Allocation(zero, zero.astype(np.int64), spectra.exact_bytes, zero)
    best = _steps_at(spectra, 4.0, exponent, floor)
    low, high = 1e-9, 4.0
    for _ in range(36):
        middle = float(np.sqrt(low * high))
        trial = _steps_at(spectra, middle, exponent, floor)
        if trial.n_bytes.sum() > budget:
            low = middle
        else:
            high, best = middle, trial
    return best


def _steps_at(spectra: Spectra, c: float, exponent: float, floor: F64) -> Allocation:
    """Allocation in which step and error of each entry agree with c."""
    unit = c * np.sqrt(spectra.rate / spectra.weight) * _importance(spectra.norm)
    steps = np.maximum(unit, floor)
    for _ in range(12 if exponent else 1):
        found = predict(spectra, steps)
        # An entry that is exact for now has no error to go by; it stays where it is.
        goal = np.maximum(unit * np.maximum(found.errors, 1e-9) ** exponent, floor)
        after = np.where(found.errors > 0, np.sqrt(steps * goal), steps)
        if np.all(np.abs(after / steps - 1.0) < 1e-3):
            break
        steps = after
    return predict(spectra, steps)


def _importance(norm: F64) -> F64:
    """What steps are multiplied by for the norm of each delta; 1 for one that is zero."""
    counts = np.isfinite(norm) & (norm > 0)
    found = np.ones(len(norm))
    if counts.any():
        octaves = np.log2(norm[counts])
        limit = np.log2(_NORM_RANGE)
        found[counts] = np.exp2(
            -NORM_EXPONENT * np.clip(octaves - np.median(octaves), -limit, limit)
        )
    return found


def _finest(spectra: Spectra) -> F64:
    largest = np.sqrt(np.maximum(spectra.energy.max(axis=1, initial=0.0), 1e-12))
    return np.asarray(largest / np.sqrt(np.maximum(spectra.n_in, spectra.n_out)) / FINEST)


def _bookkeeping(spectra: Spectra, counts: Int) -> F64:
    """Bytes of two runs beside their symbols: length, base step, row bytes, states."""
    total = np.zeros(len(counts))
    for side in (spectra.n_in, spectra.n_out):
        values = side * counts
        lanes = np.where(values < 2**14, 1, np.where(values < 2**16, 4, 16))
        # Half of what a state holds is symbols.
        total += 3 + counts + 2 * lanes
    return total
