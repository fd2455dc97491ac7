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

from rmmformat.clusters import Deltas, Shared, count, framed_within, once, share_at, share_within
from rmmformat.deltas import Coded, exact, finite, fit_size, plan_error, within_error, within_range
from rmmformat.errors import OptionError
from rmmformat.format.writer import EntryData, FramePart
from rmmformat.merge.gauge import delta_svd
from rmmformat.merge.planner import Allocation, Spectra, allocate
from rmmformat.model import Factors
from rmmformat.rows import CodedTarget, dtype_codes
from rmmformat.shared import Frame, FramedDelta

__all__ = [
    "GAIN_ROUNDS",
    "ErrorPlan",
    "Gains",
    "SizePlan",
    "Survey",
    "code_to_error",
    "code_to_size",
    "divide",
    "foresee",
    "halfway",
    "plan_size",
    "shares",
    "spectra_of",
    "survey",
]

F64 = npt.NDArray[np.float64]


#: How often gains are looked at anew, for the steps that they led to.
GAIN_ROUNDS = 3
#: How often a frame is made anew for the steps that sharing allows.
_ROUNDS = 3
#: A further round is of use if it lowers the error to this part of it.
_WORTH_A_ROUND = 0.99


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
    share
        Whether to look for what they share.
    """

    steps: tuple[float, ...]
    counts: tuple[int, ...]
    budget: float
    share: bool = True


@dataclasses.dataclass(frozen=True)
class Gains:
    """What sharing does to each distinct delta of a target, estimated.

    Attributes
    ----------
    rates
        Bytes, a part of the frame's included, over those of the delta coded alone.
    errors
        Error over that of the delta coded alone, with the same step or to the same bound.
    """

    rates: tuple[float, ...]
    errors: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Survey:
    """Statistics of one distinct delta: what planning needs of it.

    The norm is that of the delta as applied; of several scales of equal factors, the largest one's.
    """

    energy: F64
    n_in: int
    n_out: int
    exact_bytes: int
    weight: int
    exact: bool
    norm: float


def survey(factors: Sequence[Factors]) -> list[Survey]:
    """Statistics of the distinct deltas of a target: A (rank, n_in), B (n_out, rank) each."""
    found = []
    for members in _distinct(factors):
        original = factors[members[0]]
        energy, norm = np.zeros(1), 0.0
        within = finite(original)
        if within:
            singular = delta_svd(original.A, original.B)[1]
            norm = float(np.linalg.norm(singular))
            within = within_range(norm)
            norm *= max(abs(factors[member].scale) for member in members)
            energy = np.square(singular / max(float(singular.max(initial=0.0)), 1e-300))
        found.append(
            Survey(
                energy,
                original.A.shape[1],
                original.B.shape[0],
                exact(original).n_bytes,
                len(members),
                not within,
                norm,
            )
        )
    return found


def halfway(
    before: Mapping[Hashable, Gains], after: Mapping[Hashable, Gains]
) -> dict[Hashable, Gains]:
    """Gains between those at some steps and those at the steps that they led to."""

    def mean(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
        return tuple(np.sqrt(np.multiply(one, other)).tolist())

    return {
        key: Gains(mean(before[key].rates, found.rates), mean(before[key].errors, found.errors))
        for key, found in after.items()
    }


def shares(gains: Mapping[Hashable, Gains]) -> bool:
    """Whether sharing does anything at any target."""
    return any(rate < 1 for found in gains.values() for rate in found.rates)


def spectra_of(surveys: Iterable[Survey], rates: Sequence[float] | None = None) -> Spectra:
    """Put surveys of many deltas side by side; `rates` are those of :class:`Gains`."""
    rows = list(surveys)
    return Spectra.collect(
        [row.energy for row in rows],
        [row.n_in for row in rows],
        [row.n_out for row in rows],
        [row.exact_bytes for row in rows],
        [row.weight for row in rows],
        [row.exact for row in rows],
        rates,
        [row.norm for row in rows],
    )


def plan_size(
    surveys: Sequence[tuple[Hashable, list[Survey]]],
    budget: float,
    gains: Mapping[Hashable, Gains] | None = None,
) -> dict[Hashable, SizePlan]:
    """Share a budget of bytes among the deltas of all targets.

    Parameters
    ----------
    surveys
        Of each target, in the order of the file.
    budget
        Bytes.
    gains
        What sharing does at about these steps (:func:`foresee`), where that is known: then a target
        where it makes bytes cheap gets fewer of them and finer steps, and the others get the rest.

    Raises
    ------
    OptionError
        There is no room for anything.
    """
    rates = None if gains is None else [r for key, _ in surveys for r in gains[key].rates]
    spectra = spectra_of((row for _, rows in surveys for row in rows), rates)
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
    # What prediction leaves over is given out in proportion, so that targets can use it.
    spare = min(budget / max(float(found.n_bytes.sum()), 1.0), 1.05)
    return divide(surveys, found, spare, share=gains is None or shares(gains))


def divide(
    surveys: Sequence[tuple[Hashable, list[Survey]]],
    found: Allocation,
    spare: float = 1.0,
    *,
    share: bool = True,
) -> dict[Hashable, SizePlan]:
    """Give each target its part; budgets are the foreseen bytes times `spare`."""
    plans: dict[Hashable, SizePlan] = {}
    first = 0
    for key, rows in surveys:
        part = slice(first, first + len(rows))
        first += len(rows)
        plans[key] = SizePlan(
            tuple(found.steps[part].tolist()),
            tuple(found.counts[part].tolist()),
            float(found.n_bytes[part].sum()) * spare,
            share,
        )
    return plans


def code_to_error(plan: ErrorPlan, factors: Sequence[Factors]) -> CodedTarget:
    """Code every delta of a target within an error: the bound is checked on decoded values."""
    groups, originals, deltas = _opened(factors)
    bound = plan.max_error
    coded = [within_error(original, bound) for original in originals]
    plans = _error_plans(bound, deltas, _candidates(groups, originals))
    shared = share_within(deltas, plans, bound, dict(enumerate(coded)))
    found: dict[int, Coded] = {}
    for number, frame in shared.frames.items():
        framed = shared.tried.get(number)
        if framed is None:
            framed = framed_within(deltas[number], frame, plans[number], bound)
        if framed.error <= bound and framed.n_bytes < coded[number].n_bytes:
            found[number] = framed
    for frame in once(shared.frames.values()):
        members = [number for number in found if shared.frames[number] is frame]
        if sum(coded[n].n_bytes - found[n].n_bytes for n in members) > frame.n_bytes:
            for number in members:
                coded[number] = found[number]
    return _assemble(factors, groups, coded, shared.frames)


def _error_plans(
    bound: float, deltas: Deltas, members: Sequence[int]
) -> dict[int, tuple[float, int]]:
    """Step and components of those that coding, not storing exactly, is cheaper for."""
    plans = {number: plan_error(deltas[number], bound) for number in members}
    return {number: planned for number, planned in plans.items() if planned[0] > 0}


def code_to_size(plan: SizePlan, factors: Sequence[Factors]) -> CodedTarget:
    """Code all deltas of a target in the bytes that its plan gives them.

    All steps of the target are scaled by one factor until the bytes are just below the budget, so
    that the plan's proportions stay.
    """
    groups, originals, deltas = _opened(factors)
    steps = {number: step for number, step in enumerate(plan.steps) if step > 0}
    fixed = {n: exact(o) for n, o in enumerate(originals) if n not in steps}
    budget = plan.budget - sum(coded.n_bytes for coded in fixed.values())

    def alone(factor: float) -> list[Coded]:
        return [deltas[n].code(step * factor, plan.counts[n]) for n, step in steps.items()]

    values = sum(
        n * (o.A.shape[1] + o.B.shape[0]) for o, n in zip(originals, plan.counts, strict=True)
    )
    best = fit_size(alone, budget, values / 8)[0] if values else alone(1.0)
    frames: Mapping[int, Frame] = {}
    factor = 1.0
    members = [n for n in _candidates(groups, originals) if n in steps]
    # What is saved goes into finer steps, for which other frames may be the best.
    for _ in range(_ROUNDS if values and plan.share else 0):
        shared = share_at(deltas, members, {n: steps[n] * factor for n in members})
        if not shared.frames:
            break
        trial, times = _fit_shared(shared, deltas, steps, budget, factor)
        if _sum_error(trial) >= _sum_error(best) * (_WORTH_A_ROUND if frames else 1.0):
            break
        best, factor, frames = trial, factor * times, shared.frames
    found = {**fixed, **dict(zip(steps, best, strict=True))}
    return _assemble(factors, groups, [found[n] for n in range(len(groups))], frames)


def _fit_shared(
    shared: Shared, deltas: Deltas, steps: Mapping[int, float], budget: float, factor: float
) -> tuple[list[Coded], float]:
    """Finest coding with frames that fits, and what the steps were multiplied by for it."""

    def attempt(times: float) -> list[Coded]:
        coded = []
        for number, planned in steps.items():
            delta, step = deltas[number], planned * factor * times
            n_components = count(delta, step)
            if number in shared.frames:
                delta = FramedDelta(delta, shared.frames[number])
            coded.append(delta.code(step, n_components))
        return coded

    values = 0
    for number, step in steps.items():
        delta = deltas[number]
        values += count(delta, step * factor) * (delta.V.shape[1] + delta.U.shape[0])
    return fit_size(attempt, budget - shared.n_bytes, max(values, 1) / 8)


def foresee(plans: Sequence[ErrorPlan | SizePlan], factors: Sequence[Factors]) -> list[Gains]:
    """Estimate what sharing does to each distinct delta of a target, under each of many plans."""
    groups, originals, deltas = _opened(factors)
    candidates = _candidates(groups, originals)
    found = []
    for plan in plans:
        if isinstance(plan, ErrorPlan):
            errors = _error_plans(plan.max_error, deltas, candidates)
            shared = share_within(deltas, errors, plan.max_error)
        else:
            steps = {number: plan.steps[number] for number in candidates if plan.steps[number] > 0}
            shared = share_at(deltas, list(steps), steps)
        found.append(
            Gains(
                tuple(shared.rates.get(number, 1.0) for number in range(len(groups))),
                tuple(shared.errors.get(number, 1.0) for number in range(len(groups))),
            )
        )
    return found


def _opened(
    factors: Sequence[Factors],
) -> tuple[list[list[int]], list[Factors], Deltas]:
    """Tasks grouped by equal deltas, one original of each, and their decompositions."""
    groups = _distinct(factors)
    originals = [factors[members[0]] for members in groups]
    return groups, originals, Deltas(originals)


def _candidates(groups: Sequence[Sequence[int]], originals: Sequence[Factors]) -> list[int]:
    """Deltas that may share: those of one task (equal ones are stored once as it is)."""
    found = []
    for number, (members, original) in enumerate(zip(groups, originals, strict=True)):
        if len(members) == 1 and finite(original):
            norm = float(np.linalg.norm(delta_svd(original.A, original.B)[1]))
            if norm > 0 and within_range(norm):
                found.append(number)
    return found


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
    shared: Mapping[int, Frame],
) -> CodedTarget:
    """Entries of all tasks; what several have becomes the mean of a frame of theirs."""
    used = once(shared[number] for number, item in enumerate(coded) if item.framed)
    clusters = {id(frame): place for place, frame in enumerate(used, 1)}
    frames = [frame.parts for frame in used]
    entries: dict[int, EntryData] = {}
    for number, (members, item) in enumerate(zip(groups, coded, strict=True)):
        cluster, own = (clusters[id(shared[number])] if item.framed else 0), (item.a, item.b)
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
        for task in members:
            entries[task] = EntryData(
                factors[task].scale,
                first.rank,
                cluster,
                item.coefficients_a,
                residual_a,
                item.coefficients_b,
                residual_b,
                *dtype_codes(factors[task]),
                error=item.error,
            )
    return CodedTarget(tuple(frames), tuple(entries[task] for task in range(len(factors))))
