"""Which deltas of a target share a frame.

Deltas of one family (:mod:`rmmformat.merge.similarity`) are a *cluster*, those that belong to none
are one more, and all of them together are the other way to divide them: both are tried.  A frame
is made for each cluster, and kept only where it lowers the cost; who has no cluster stands alone.

Source: ``docs/sharing.md`` for what this gives on real adapters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from rmmformat.deltas import Coded, Delta, search, within_error
from rmmformat.merge.planner import SLOPE, Spectra, predict
from rmmformat.merge.similarity import LEAST, Sketch, affinity, families, sketch
from rmmformat.model import Factors
from rmmformat.shared import Frame, FramedDelta, frames

__all__ = ["Deltas", "Shared", "count", "framed_within", "once", "share_at", "share_within"]

T = TypeVar("T")

#: Most deltas, and bytes of them, that a frame is made of.
_SAMPLE, _SAMPLE_BYTES = 128, 32 << 20
#: Bytes of decompositions that are kept; what is beyond is computed again whenever it is needed.
_KEPT_BYTES = 32 << 20
#: Deltas of a cluster that a frame is tried on before it is kept.
_TRIED = 12
#: Members of a family that a delta outside the sample is held against.
_MODELS = 4


class Deltas:
    """Deltas of a target by number, decomposed when asked for; memory does not grow with them."""

    def __init__(self, originals: Sequence[Factors]) -> None:
        self._originals = originals
        self._kept: dict[int, Delta] = {}
        self._room = _KEPT_BYTES

    def __getitem__(self, number: int) -> Delta:
        found = self._kept.get(number)
        if found is None:
            found = Delta(self._originals[number])
            size = _n_bytes(found)
            if size <= self._room:
                self._room -= size
                self._kept[number] = found
        return found


@dataclasses.dataclass(frozen=True)
class Shared:
    """Frames of a target, and what they promise.

    Attributes
    ----------
    frames
        By the number of the delta; a delta that stands alone has none.
    rates, errors
        By the same numbers, estimated: bytes, the part in the frame included, over those alone,
        and error over that alone, coded with one step (:func:`share_at`) or to one bound
        (:func:`share_within`).
    tried
        Deltas that were coded with their frame to find that out.
    """

    frames: Mapping[int, Frame] = dataclasses.field(default_factory=dict)
    rates: Mapping[int, float] = dataclasses.field(default_factory=dict)
    errors: Mapping[int, float] = dataclasses.field(default_factory=dict)
    tried: Mapping[int, Coded] = dataclasses.field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of all frames."""
        return sum(frame.n_bytes for frame in once(self.frames.values()))


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A cluster's frame, with what it saves over the deltas coded alone."""

    saved: float
    frame: Frame
    rate: float
    error: float
    coded: Mapping[int, Coded]


#: Codes one delta, with a frame or alone.
_Coder = Callable[[int, Frame | None], Coded]


def share_at(deltas: Deltas, members: Sequence[int], steps: Mapping[int, float]) -> Shared:
    """Find frames that lower the cost of deltas coded with given steps.

    Parameters
    ----------
    deltas, members
        The target's deltas, and the numbers of those that may share.
    steps
        Relative to each delta's norm.
    """

    def code(number: int, frame: Frame | None) -> Coded:
        delta, step = deltas[number], steps[number]
        whole = delta if frame is None else FramedDelta(delta, frame)
        return whole.code(step, count(delta, step))

    def cost(number: int, coded: Coded) -> float:
        # In squares of the step, as in rmmformat.merge.sharing.
        return (coded.error / steps[number]) ** 2 + SLOPE * 8 * coded.n_bytes

    return _share(deltas, members, steps, code, cost, SLOPE * 8, {})


def share_within(
    deltas: Deltas,
    plans: Mapping[int, tuple[float, int]],
    bound: float,
    alone: Mapping[int, Coded] | None = None,
) -> Shared:
    """Find frames that lower the bytes of deltas coded to an error.

    Parameters
    ----------
    deltas, plans
        The target's deltas; step and components, for those that may share.
    bound
        The error.
    alone
        All of them coded alone, if they have been.
    """

    def code(number: int, frame: Frame | None) -> Coded:
        if frame is None:
            return within_error(deltas[number].original, bound)
        return framed_within(deltas[number], frame, plans[number], bound)

    def cost(_number: int, coded: Coded) -> float:
        return coded.n_bytes if coded.error <= bound else np.inf

    steps = {number: step for number, (step, _) in plans.items()}
    return _share(deltas, list(plans), steps, code, cost, 1.0, dict(alone or {}), choose=True)


def framed_within(delta: Delta, frame: Frame, plan: tuple[float, int], bound: float) -> Coded:
    """Code one delta with a frame in the fewest bytes that keep the bound; check that they do."""
    return search(FramedDelta(delta, frame), bound, *plan)


def _share(
    deltas: Deltas,
    members: Sequence[int],
    steps: Mapping[int, float],
    code: _Coder,
    cost: Callable[[int, Coded], float],
    unit: float,
    alone: dict[int, Coded],
    *,
    choose: bool = False,
) -> Shared:
    """Take the division into clusters, and for each the frame, that saves most.

    `unit` is the cost of a byte; with `choose` a member whose frame does not pay stays alone.
    """
    best, most = Shared(), 0.0
    for clusters in _divisions(deltas, members):
        found: dict[int, _Trial] = {}
        for cluster in clusters:
            trials = []
            for frame in _frames(deltas, cluster, steps):
                some = _spread(cluster, _TRIED)
                for number in some:
                    if number not in alone:
                        alone[number] = code(number, None)
                trials.append(_tried(frame, cluster, some, alone, code, cost, unit, choose))
            trial = max(trials, key=lambda trial: trial.saved, default=None)
            if trial is not None and trial.saved > 0:
                found.update(dict.fromkeys(cluster, trial))
        saved = sum(trial.saved for trial in once(found.values()))
        if saved > most:
            most = saved
            best = Shared(
                {number: trial.frame for number, trial in found.items()},
                {number: trial.rate for number, trial in found.items()},
                {number: trial.error for number, trial in found.items()},
                {n: coded for trial in once(found.values()) for n, coded in trial.coded.items()},
            )
    return best


def _tried(
    frame: Frame,
    cluster: Sequence[int],
    some: Sequence[int],
    alone: Mapping[int, Coded],
    code: _Coder,
    cost: Callable[[int, Coded], float],
    unit: float,
    choose: bool,
) -> _Trial:
    """Code some of a cluster with a frame, and conclude for all of it."""
    times = len(cluster) / len(some)
    saved, n_bytes, error = -unit * frame.n_bytes, float(frame.n_bytes), 0.0
    tried = {number: code(number, frame) for number in some}
    for number, framed in tried.items():
        own = alone[number]
        less = cost(number, own) - cost(number, framed)
        if choose and not less > 0:
            framed, less = own, 0.0
        saved += times * less
        n_bytes += times * framed.n_bytes
        error += framed.error
    before = times * sum(alone[number].n_bytes for number in some)
    error /= max(sum(alone[number].error for number in some), 1e-30)
    return _Trial(saved, frame, n_bytes / max(before, 1.0), error, tried)


def _divisions(deltas: Deltas, members: Sequence[int]) -> list[list[list[int]]]:
    """Ways to divide deltas into clusters: all in one; and families, with the rest in one.

    Families are looked for in a sample; the others are held against some members of each, so the
    time is in proportion to the number of deltas times that of families.
    """
    if len(members) < 2:
        return []
    whole = [list(members)]
    sample = _spread(members, _SAMPLE)
    sketches = {number: _sketched(deltas[number]) for number in sample}
    groups = [[sample[i] for i in group] for group in families(list(sketches.values()))]
    models = [[sketches[number] for number in group[:_MODELS]] for group in groups]
    rest: list[int] = []
    of_family = {number for group in groups for number in group}
    for number in members:
        if number in of_family:
            continue
        place = None if number in sketches else _nearest(_sketched(deltas[number]), models)
        (rest if place is None else groups[place]).append(number)
    clusters = [sorted(group) for group in groups] + ([rest] if len(rest) > 1 else [])
    return [whole] if not groups or clusters == whole else [whole, clusters]


def _sketched(delta: Delta) -> Sketch:
    return sketch(delta.V, delta.U, delta.s)


def _nearest(own: Sketch, models: Sequence[Sequence[Sketch]]) -> int | None:
    if not models:
        return None
    means = [float(np.mean([affinity(own, other) for other in group])) for group in models]
    place = int(np.argmax(means))
    return place if means[place] >= LEAST else None


def _frames(deltas: Deltas, cluster: Sequence[int], steps: Mapping[int, float]) -> list[Frame]:
    most = max(2, min(_SAMPLE, _SAMPLE_BYTES // max(_n_bytes(deltas[cluster[0]]), 1)))
    sample = _spread(cluster, most)
    return frames([deltas[n] for n in sample], [steps[n] for n in sample], len(cluster))


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly spread."""
    places = np.linspace(0, len(numbers) - 1, min(len(numbers), most)).round().astype(int)
    return [numbers[place] for place in places]


def _n_bytes(delta: Delta) -> int:
    return int(delta.U.nbytes + delta.V.nbytes)


def once(items: Iterable[T]) -> list[T]:
    """Each object once, in the order of first appearance."""
    return list({id(item): item for item in items}.values())


def count(delta: Delta, step: float) -> int:
    """Components worth coding at a step."""
    if not np.isfinite(step):
        return 0
    spectra = Spectra.collect([delta.energy], [delta.V.shape[1]], [delta.U.shape[0]], [2**60])
    return int(predict(spectra, np.array([step])).counts[0])
