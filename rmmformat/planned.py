"""The smallest file at the fidelity asked, or the most faithful one at the size asked.

Every delta is coded in its singular value decomposition: the leading components' rows of A,
``s_k v_k``, with one step; then the rows of B fitted to what A decodes to; what is not worth its
bits is left out.  :mod:`rmmformat.merge.planner` says how fine; here it is done, measured and
corrected, target by target, so that the figure asked for holds in the file and not in a model.

Source: ``docs/fidelity.md`` for what this gives on real adapters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.errors import OptionError
from rmmformat.format import trellis
from rmmformat.format.encodings import by_name
from rmmformat.format.writer import EncodedArray, EntryData, FramePart
from rmmformat.merge.gauge import delta_svd
from rmmformat.merge.planner import Spectra, allocate, predict, steps_for_error
from rmmformat.model import Factors
from rmmformat.rows import CodedTarget, dtype_codes, encode_rows, exact_rows, measure

__all__ = [
    "ErrorPlan",
    "SizePlan",
    "Survey",
    "code_to_error",
    "code_to_size",
    "plan_size",
    "spectra_of",
    "survey",
]

Float32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: A coded error this close below what was asked is close enough, and where corrections aim.
_ERROR_BAND, _ERROR_AIM = 0.985, 0.994
#: The same for the bytes of a target.
_SIZE_BAND, _SIZE_AIM = 0.99, 0.9975
_ATTEMPTS = 6
_LEAST_NORM = 1e-25


@dataclasses.dataclass(frozen=True)
class ErrorPlan:
    """Every delta of a target within this relative error, in as few bytes as can be."""

    max_error: float


@dataclasses.dataclass(frozen=True)
class SizePlan:
    """What a target gets of a budget; one number for each distinct delta, in the tasks' order.

    Attributes
    ----------
    steps
        Relative to the norm of the delta; 0 for one that is stored exactly.
    counts
        Components coded.
    budget
        Bytes for all of them, which are not exceeded.
    """

    steps: tuple[float, ...]
    counts: tuple[int, ...]
    budget: float


@dataclasses.dataclass(frozen=True)
class Survey:
    """Statistics of one distinct delta: what planning needs of it."""

    energy: F64
    n_in: int
    n_out: int
    exact_bytes: int
    weight: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class _Coded:
    a: EncodedArray
    b: EncodedArray
    error: float

    @property
    def n_bytes(self) -> int:
        return sum(len(raw) for array in (self.a, self.b) for raw in array.runs)


def survey(factors: Sequence[Factors]) -> list[Survey]:
    """Statistics of the distinct deltas of a target: A (rank, n_in), B (n_out, rank) each."""
    found = []
    for members in _distinct(factors):
        original = factors[members[0]]
        energy = np.zeros(1)
        within = _finite(original)
        if within:
            singular = delta_svd(original.A, original.B)[1]
            within = _within_range(float(np.linalg.norm(singular)))
            energy = np.square(singular / max(float(singular.max(initial=0.0)), 1e-300))
        found.append(
            Survey(
                energy,
                original.A.shape[1],
                original.B.shape[0],
                _exact(original).n_bytes,
                len(members),
                not within,
            )
        )
    return found


def spectra_of(surveys: Iterable[Survey]) -> Spectra:
    """Put surveys of many deltas side by side."""
    rows = list(surveys)
    return Spectra.collect(
        [row.energy for row in rows],
        [row.n_in for row in rows],
        [row.n_out for row in rows],
        [row.exact_bytes for row in rows],
        [row.weight for row in rows],
        [row.exact for row in rows],
    )


def plan_size(
    surveys: Sequence[tuple[Hashable, list[Survey]]], budget: float
) -> dict[Hashable, SizePlan]:
    """Share a budget of bytes among the deltas of all targets.

    Raises
    ------
    OptionError
        There is no room for anything.
    """
    spectra = spectra_of(row for _, rows in surveys for row in rows)
    fixed = float(spectra.exact_bytes[spectra.exact].sum())
    found = allocate(spectra, budget)
    nothing = not found.counts.any() and not (found.steps == 0).any()
    if fixed > budget or (nothing and spectra.energy.any()):
        raise OptionError(
            f"{budget:.0f} bytes have no room for any component of any delta"
            if fixed <= budget
            else f"deltas with NaN or infinity are kept exactly, which takes {fixed:.0f} bytes "
            f"where {budget:.0f} are allowed",
            hint="Allow a larger size; `rmm plan` shows what is possible.",
        )
    plans: dict[Hashable, SizePlan] = {}
    first = 0
    # What prediction leaves over is given out in proportion, so that targets can use it.
    spare = min(budget / max(float(found.n_bytes.sum()), 1.0), 1.05)
    for key, rows in surveys:
        part = slice(first, first + len(rows))
        first += len(rows)
        plans[key] = SizePlan(
            tuple(found.steps[part].tolist()),
            tuple(found.counts[part].tolist()),
            float(found.n_bytes[part].sum()) * spare,
        )
    return plans


def code_to_error(plan: ErrorPlan, factors: Sequence[Factors]) -> CodedTarget:
    """Code every delta of a target within an error: the bound is checked on decoded values."""
    groups = _distinct(factors)
    coded = [_within_error(factors[members[0]], plan.max_error) for members in groups]
    return _assemble(factors, groups, coded)


def code_to_size(plan: SizePlan, factors: Sequence[Factors]) -> CodedTarget:
    """Code all deltas of a target in the bytes that its plan gives them.

    All steps of the target are scaled by one factor until the bytes are just below the budget, so
    that the plan's proportions stay.
    """
    groups = _distinct(factors)
    originals = [factors[members[0]] for members in groups]
    deltas = [
        None if step == 0 else _Delta(original)
        for original, step in zip(originals, plan.steps, strict=True)
    ]
    fixed = [_exact(o) if d is None else None for o, d in zip(originals, deltas, strict=True)]
    budget = plan.budget - sum(coded.n_bytes for coded in fixed if coded is not None)

    def attempt(factor: float) -> list[_Coded]:
        return [
            delta.code(step * factor, count)
            for delta, step, count in zip(deltas, plan.steps, plan.counts, strict=True)
            if delta is not None
        ]

    values = sum(
        count * (o.A.shape[1] + o.B.shape[0])
        for o, count in zip(originals, plan.counts, strict=True)
    )
    best = _fit(attempt, budget, values / 8) if values else attempt(1.0)
    coded = iter(best)
    return _assemble(factors, groups, [next(coded) if f is None else f for f in fixed])


def _fit(
    attempt: Callable[[float], list[_Coded]], budget: float, bytes_an_octave: float
) -> list[_Coded]:
    """Find the finest coding that fits: a step of half the size costs a bit a value."""
    octaves, best, best_bytes = 0.0, None, -1
    for number in range(40):
        coded = attempt(2.0**octaves)
        n_bytes = sum(item.n_bytes for item in coded)
        if best_bytes < n_bytes <= budget:
            best, best_bytes = coded, n_bytes
        if n_bytes <= budget and (n_bytes >= _SIZE_BAND * budget or number >= _ATTEMPTS):
            break
        if best is not None and number >= _ATTEMPTS:
            break
        octaves += (n_bytes - _SIZE_AIM * budget) / bytes_an_octave
        octaves += 0.25 * max(0, number - _ATTEMPTS)  # nothing has fitted: go on, faster
    return attempt(math.inf) if best is None else best


class _Delta:
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
        return np.square(self.s / self.norm) if self.norm > 0 else np.zeros_like(self.s)

    def code(self, step: float, count: int) -> _Coded:
        """Code the first `count` components with one step, relative to the norm of the delta."""
        for _ in range(_ATTEMPTS):
            if count == 0 or math.isinf(step):
                break
            try:
                return self._code(step, count)
            except OptionError:  # finer than the encoding goes
                step *= 2.0
        rank = self.original.rank
        return _Coded(_zeros(rank), _zeros(rank), 1.0 if self.norm > 0 else 0.0)

    def _code(self, step: float, count: int) -> _Coded:
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
        return _Coded(
            _leading(raw_a, count, rank),
            _leading(raw_b, count, rank),
            measure(self.original, read_a, read_b),
        )

    def plain(self) -> _Coded:
        """All components that are not zero, as f32."""
        root = np.sqrt(self.s)
        missing = ((0, self.original.rank - len(self.s)), (0, 0))
        a, read_a = encode_rows(
            np.pad(root[:, None] * self.V, missing).astype(np.float32), by_name("f32").code
        )
        b, read_b = encode_rows(
            np.pad(root[:, None] * self.U.T, missing).astype(np.float32), by_name("f32").code
        )
        return _Coded(a, b, measure(self.original, read_a, read_b))


def _within_error(original: Factors, bound: float) -> _Coded:
    """Fewest bytes at which one delta's measured error is at most `bound`."""
    exact = _exact(original)
    if not _finite(original):
        return exact
    delta = _Delta(original)
    if not _within_range(delta.norm):
        return exact
    if delta.norm == 0:
        return delta.code(1.0, 0)
    spectra = Spectra.collect(
        [delta.energy], [original.A.shape[1]], [original.B.shape[0]], [exact.n_bytes]
    )
    steps = steps_for_error(spectra, _ERROR_AIM * bound)
    planned = predict(spectra, steps)
    candidates = [exact]
    if planned.steps[0] > 0:
        candidates.append(_search(delta, bound, float(planned.steps[0]), int(planned.counts[0])))
    if candidates[-1].error > bound or len(candidates) == 1:
        candidates.append(delta.plain())
    return min((c for c in candidates if c.error <= bound), key=lambda c: c.n_bytes)


def _search(delta: _Delta, bound: float, step: float, count: int) -> _Coded:
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


def _exact(original: Factors) -> _Coded:
    return _Coded(exact_rows(original.A), exact_rows(original.B.T), 0.0)


def _within_range(norm: float) -> bool:
    """Whether rows of a delta keep clear of the ends of f32; a delta beyond is kept exactly."""
    return norm == 0 or _LEAST_NORM < norm < 1.0 / _LEAST_NORM


def _finite(original: Factors) -> bool:
    return bool(
        np.isfinite(original.A.astype(np.float32)).all()
        and np.isfinite(original.B.astype(np.float32)).all()
    )


def _distinct(factors: Sequence[Factors]) -> list[list[int]]:
    """Tasks by equal bits of both factors; what holds NaN or infinity stands alone."""
    groups: dict[object, list[int]] = {}
    for number, item in enumerate(factors):
        key: object = number
        if _finite(item):
            raw = (np.ascontiguousarray(x) for x in (item.A, item.B))
            digest = hashlib.sha256(b"".join(x.tobytes() for x in raw)).digest()
            key = (item.A.dtype.name, item.B.dtype.name, item.rank, digest)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _assemble(
    factors: Sequence[Factors], groups: Sequence[Sequence[int]], coded: Sequence[_Coded]
) -> CodedTarget:
    """Entries of all tasks; what several have becomes the mean of a frame of theirs."""
    frames: list[tuple[FramePart | None, FramePart | None]] = []
    entries: dict[int, EntryData] = {}
    for members, item in zip(groups, coded, strict=True):
        cluster, own = 0, (item.a, item.b)
        residual_a: EncodedArray | None
        residual_b: EncodedArray | None
        residual_a, residual_b = own
        first = factors[members[0]]
        if len(members) > 1 and item.n_bytes:
            sides = (first.A.shape[1], first.B.shape[0])
            parts = [
                FramePart(side, 0, first.rank, array, None)
                for side, array in zip(sides, own, strict=True)
            ]
            frames.append((parts[0], parts[1]))
            cluster, residual_a, residual_b = len(frames), None, None
        for number in members:
            entries[number] = EntryData(
                factors[number].scale,
                first.rank,
                cluster,
                None,
                residual_a,
                None,
                residual_b,
                *dtype_codes(factors[number]),
                error=item.error,
            )
    return CodedTarget(tuple(frames), tuple(entries[number] for number in range(len(factors))))


def _leading(raw: bytes, count: int, rank: int) -> EncodedArray:
    if count == rank:
        return EncodedArray(((trellis.CODE, count),), (raw,))
    return EncodedArray(((trellis.CODE, count), (0, rank - count)), (raw, b""))


def _zeros(rank: int) -> EncodedArray:
    return EncodedArray(((0, rank),), (b"",))
