"""The smallest file at the fidelity asked, or the most faithful one at the size asked.

Every delta is coded in its singular value decomposition (:mod:`rmmformat.deltas`), on its own or,
where that is measured to be smaller, by what it lacks of a shared part (:mod:`rmmformat.shared`).
:mod:`rmmformat.merge.planner` says how fine; here it is done, measured and corrected, target by
target, so that the figure asked for holds in the file and not in a model.

Source: ``docs/fidelity.md`` and ``docs/sharing.md`` for what this gives on real adapters.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.deltas import (
    Coded,
    Delta,
    exact,
    finite,
    fit_size,
    plan_error,
    search,
    within_error,
    within_range,
)
from rmmformat.errors import OptionError
from rmmformat.format.writer import EntryData, FramePart
from rmmformat.merge.gauge import delta_svd
from rmmformat.merge.planner import Spectra, allocate, predict
from rmmformat.model import Factors
from rmmformat.rows import CodedTarget, dtype_codes
from rmmformat.shared import Frame, FramedDelta, frames

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

F64 = npt.NDArray[np.float64]


#: How often a frame is made anew for the steps that sharing allows.
_ROUNDS = 3
#: A further round is of use if it lowers the error to this part of it.
_WORTH_A_ROUND = 0.99
#: Most deltas of a target that a frame is made of.
_SAMPLE = 128


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


def survey(factors: Sequence[Factors]) -> list[Survey]:
    """Statistics of the distinct deltas of a target: A (rank, n_in), B (n_out, rank) each."""
    found = []
    for members in _distinct(factors):
        original = factors[members[0]]
        energy = np.zeros(1)
        within = finite(original)
        if within:
            singular = delta_svd(original.A, original.B)[1]
            within = within_range(float(np.linalg.norm(singular)))
            energy = np.square(singular / max(float(singular.max(initial=0.0)), 1e-300))
        found.append(
            Survey(
                energy,
                original.A.shape[1],
                original.B.shape[0],
                exact(original).n_bytes,
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
    originals = [factors[members[0]] for members in groups]
    coded = [within_error(original, plan.max_error) for original in originals]
    plans = {}
    for number in _candidates(groups, originals):
        step, count = plan_error(Delta(originals[number]), plan.max_error)
        if step > 0:
            plans[number] = (step, count)
    sample = {number: Delta(originals[number]) for number in _sample(list(plans))}
    steps = {number: plans[number][0] for number in sample}
    best, shared = coded, None
    for frame in _frames(sample, steps, len(plans)):
        trial = list(coded)
        for number, planned in plans.items():
            delta = sample[number] if number in sample else Delta(originals[number])
            found = search(FramedDelta(delta, frame), plan.max_error, *planned)
            if found.error <= plan.max_error and found.n_bytes < coded[number].n_bytes:
                trial[number] = found
        if _total(trial, frame) < _total(best, shared):
            best, shared = trial, frame
    return _assemble(factors, groups, best, shared)


def code_to_size(plan: SizePlan, factors: Sequence[Factors]) -> CodedTarget:
    """Code all deltas of a target in the bytes that its plan gives them.

    All steps of the target are scaled by one factor until the bytes are just below the budget, so
    that the plan's proportions stay.
    """
    groups = _distinct(factors)
    originals = [factors[members[0]] for members in groups]
    steps = dict(enumerate(plan.steps))
    fixed = {number: exact(originals[number]) for number, step in steps.items() if step == 0}
    deltas = {number: Delta(originals[number]) for number in steps if number not in fixed}
    budget = plan.budget - sum(coded.n_bytes for coded in fixed.values())

    def attempt(factor: float) -> list[Coded]:
        return [
            delta.code(steps[number] * factor, plan.counts[number])
            for number, delta in deltas.items()
        ]

    values = sum(
        count * (o.A.shape[1] + o.B.shape[0])
        for o, count in zip(originals, plan.counts, strict=True)
    )
    best = fit_size(attempt, budget, values / 8)[0] if values else attempt(1.0)
    shared, factor = None, 1.0
    members = [n for n in _candidates(groups, originals) if n in deltas and deltas[n].norm > 0]
    # What is saved goes into finer steps, for which another frame may be the best.
    for _ in range(_ROUNDS if values else 0):
        sample = {n: deltas[n] for n in _sample(members)}
        tried = _frames(sample, {n: steps[n] * factor for n in sample}, len(members))
        results = [(*_fit_frame(f, deltas, members, steps, budget, factor), f) for f in tried]
        bound = _sum_error(best) * (1.0 if shared is None else _WORTH_A_ROUND)
        results = [result for result in results if _sum_error(result[0]) < bound]
        if not results:
            break
        best, factor, shared = min(results, key=lambda result: _sum_error(result[0]))
    found = {**fixed, **dict(zip(deltas, best, strict=True))}
    return _assemble(factors, groups, [found[n] for n in range(len(groups))], shared)


def _fit_frame(
    frame: Frame,
    deltas: Mapping[int, Delta],
    members: Sequence[int],
    steps: Mapping[int, float],
    budget: float,
    factor: float,
) -> tuple[list[Coded], float]:
    """Finest coding with a frame that fits, and the factor of the steps that it took."""
    framed = {number: FramedDelta(deltas[number], frame) for number in members}

    def attempt(times: float) -> list[Coded]:
        coded = []
        for number, delta in deltas.items():
            step = steps[number] * factor * times
            coded.append(framed.get(number, delta).code(step, _count(delta, step)))
        return coded

    values = sum(
        _count(delta, steps[number] * factor) * (delta.V.shape[1] + delta.U.shape[0])
        for number, delta in deltas.items()
    )
    best, times = fit_size(attempt, budget - frame.n_bytes, max(values, 1) / 8)
    return best, factor * times


def _count(delta: Delta, step: float) -> int:
    """Components worth coding at a step."""
    if not np.isfinite(step):
        return 0
    spectra = Spectra.collect([delta.energy], [delta.V.shape[1]], [delta.U.shape[0]], [2**60])
    return int(predict(spectra, np.array([step])).counts[0])


def _candidates(groups: Sequence[Sequence[int]], originals: Sequence[Factors]) -> list[int]:
    """Deltas that may share: those of one task (equal ones are stored once as it is)."""
    found = []
    for number, (members, original) in enumerate(zip(groups, originals, strict=True)):
        if len(members) == 1 and finite(original):
            norm = float(np.linalg.norm(delta_svd(original.A, original.B)[1]))
            if norm > 0 and within_range(norm):
                found.append(number)
    return found


def _sample(numbers: Sequence[int]) -> list[int]:
    """Those that a frame is made of: evenly spread, and bounded whatever their number."""
    places = np.linspace(0, len(numbers) - 1, min(len(numbers), _SAMPLE)).round().astype(int)
    return [numbers[place] for place in places]


def _frames(sample: Mapping[int, Delta], steps: Mapping[int, float], tasks: int) -> list[Frame]:
    if tasks < 2:
        return []
    return frames(list(sample.values()), [steps[number] for number in sample], tasks)


def _total(coded: Sequence[Coded], frame: Frame | None) -> int:
    return sum(item.n_bytes for item in coded) + (0 if frame is None else frame.n_bytes)


def _sum_error(coded: Sequence[Coded]) -> float:
    return sum(item.error for item in coded)


def _distinct(factors: Sequence[Factors]) -> list[list[int]]:
    """Tasks by equal bits of both factors; what holds NaN or infinity stands alone."""
    groups: dict[object, list[int]] = {}
    for number, item in enumerate(factors):
        key: object = number
        if finite(item):
            raw = (np.ascontiguousarray(x) for x in (item.A, item.B))
            digest = hashlib.sha256(b"".join(x.tobytes() for x in raw)).digest()
            key = (item.A.dtype.name, item.B.dtype.name, item.rank, digest)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _assemble(
    factors: Sequence[Factors],
    groups: Sequence[Sequence[int]],
    coded: Sequence[Coded],
    shared: Frame | None,
) -> CodedTarget:
    """Entries of all tasks; what several have becomes the mean of a frame of theirs."""
    frames: list[tuple[FramePart | None, FramePart | None]] = []
    if shared is not None:
        frames.append(shared.parts)
    entries: dict[int, EntryData] = {}
    for members, item in zip(groups, coded, strict=True):
        cluster, own = int(item.framed), (item.a, item.b)
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
                item.coefficients_a,
                residual_a,
                item.coefficients_b,
                residual_b,
                *dtype_codes(factors[number]),
                error=item.error,
            )
    return CodedTarget(tuple(frames), tuple(entries[number] for number in range(len(factors))))
