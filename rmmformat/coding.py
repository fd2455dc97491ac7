"""One target's factors of all tasks, to what the container stores of them.

Joins the mathematics (:mod:`rmmformat.merge`) to the encodings of rows; reads and writes no file.
A *method* is what the user asked for; :meth:`prepare` makes of it a *job* for each target, having
looked at all targets first where it has to.  :func:`code_target` is a pure function of a job and
the target's factors, so targets can be coded anywhere and in any order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from rmmformat._native import crc32c
from rmmformat.errors import ShapeError
from rmmformat.format.encodings import by_name
from rmmformat.format.writer import EntryData, FramePart
from rmmformat.mapped import release
from rmmformat.merge.error import error_of_grams, row_gram
from rmmformat.merge.gauge import align as align_factors
from rmmformat.model import Array, Factors
from rmmformat.planned import (
    GAIN_ROUNDS,
    ErrorPlan,
    Gains,
    SizePlan,
    code_to_error,
    code_to_size,
    foresee,
    halfway,
    plan_size,
    shares,
    survey,
)
from rmmformat.published import Align, Published, code_published
from rmmformat.rows import (
    CodedTarget,
    InTurn,
    digest,
    dtype_codes,
    encode_rows,
    exact_rows,
    mean_bytes,
)
from rmmformat.threads import each

__all__ = [
    "Align",
    "CodedTarget",
    "Exact",
    "Job",
    "MaxError",
    "Method",
    "Plain",
    "Published",
    "Size",
    "Targets",
    "code_target",
    "code_target_whole",
    "hardly_works",
]


class Targets(Protocol):
    """All targets of a collection, as a method sees them before it codes any."""

    @property
    def keys(self) -> Sequence[Hashable]:
        """The targets, in the order of the file."""

    @property
    def original_bytes(self) -> int:
        """Bytes of all factors as stored by the sources."""

    def map(self, function: Callable[[Sequence[Factors]], Any]) -> Iterable[tuple[Hashable, Any]]:
        """Apply a pure function to every target's factors; results come in any order."""

    def map_each(
        self, function_of: Callable[[Any], Callable[[Sequence[Factors]], Any]]
    ) -> Iterable[tuple[Hashable, Any]]:
        """Apply to every target's factors the function that is given for its key."""


class _Uniform:
    """A method that does the same to every target."""

    def prepare(self, _targets: Targets) -> Callable[[Hashable], Job]:
        """Give the job of each target."""
        return lambda _key: self  # type: ignore[return-value]  # every subclass is a Job


@dataclasses.dataclass(frozen=True)
class Plain(_Uniform):
    """Every task on its own, all rows in one encoding."""

    encoding: str
    align: Literal["none", "svd"] = "none"

    def describe(self) -> dict[str, object]:
        """Name and parameters for the metadata."""
        return {"name": "plain", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Exact(_Uniform):
    """Every factor bit for bit in its own dtype; one that several tasks have is stored once."""

    def describe(self) -> dict[str, object]:
        """Name and parameters for the metadata."""
        return {"name": "exact"}


@dataclasses.dataclass(frozen=True)
class MaxError:
    """Every delta within a relative error, in as few bytes as can be."""

    max_error: float

    def describe(self) -> dict[str, object]:
        """Name and parameters for the metadata."""
        return {"name": "planned", "max_error": self.max_error}

    def prepare(self, _targets: Targets) -> Callable[[Hashable], Job]:
        """Give the job of each target: the bound is each delta's own."""
        return lambda _key: ErrorPlan(self.max_error)


@dataclasses.dataclass(frozen=True)
class Size:
    """All factors in this part of their bytes, with errors as small and even as can be."""

    size: float

    def describe(self) -> dict[str, object]:
        """Name and parameters for the metadata."""
        return {"name": "planned", "size": self.size}

    def prepare(self, targets: Targets) -> Callable[[Hashable], Job]:
        """Survey all targets, and share the budget out among them, in view of what sharing saves.

        Raises
        ------
        OptionError
            Nothing fits.
        """
        found = dict(targets.map(survey))
        ordered = [(key, found[key]) for key in targets.keys]
        budget = self.size * targets.original_bytes
        plans = plan_size(ordered, budget)
        if all(len(rows) < 2 for _, rows in ordered):
            return plans.__getitem__
        gains = _gains(targets, plans)
        # What sharing saves goes into finer steps, at which it saves another part.
        for _ in range(GAIN_ROUNDS if shares(gains) else 0):
            gains = halfway(gains, _gains(targets, plan_size(ordered, budget, gains)))
        return plan_size(ordered, budget, gains).__getitem__


def _gains(targets: Targets, plans: Mapping[Hashable, SizePlan]) -> dict[Hashable, Gains]:
    """What sharing does at each target under its plan."""
    found = targets.map_each(lambda key: functools.partial(foresee, [plans[key]]))
    return {key: gains for key, (gains,) in found}


Method = Published | Plain | Exact | MaxError | Size
Job = Published | Plain | Exact | ErrorPlan | SizePlan


def hardly_works(method: Method) -> bool:
    """Whether a method takes little longer than reading, so that sending factors away is no use."""
    if isinstance(method, Published):
        return method.align == "none" and method.grouping == "position"
    return isinstance(method, Exact)


def code_target(job: Job, factors: Sequence[Factors]) -> CodedTarget:
    """Code one target of a collection.

    Parameters
    ----------
    job
        How: what the method's ``prepare`` gives for this target.
    factors
        The tasks' factors, A (rank, n_in) and B (n_out, rank); ranks may differ, sides may not.

    Raises
    ------
    ShapeError
        Sides differ, or there are no factors.
    NonFiniteError
        A factor holds NaN or infinity and the method cannot keep it.
    """
    if not factors:
        raise ShapeError("a target without tasks cannot be coded")
    sides = {(f.A.shape[1], f.B.shape[0]) for f in factors}
    if len(sides) > 1:
        raise ShapeError(f"tasks disagree about the sides of a target: {sorted(sides)}")
    coders: dict[type, Callable[..., CodedTarget]] = {
        Published: code_published,
        Plain: _plain,
        Exact: _exact,
        ErrorPlan: code_to_error,
        SizePlan: code_to_size,
    }
    return coders[type(job)](job, factors)


def code_target_whole(job: Job, factors: Sequence[Factors]) -> CodedTarget:
    """Code one target, all of its entries at once: what can be sent back from elsewhere."""
    return code_target(job, factors).whole()


def _plain(method: Plain, factors: Sequence[Factors]) -> CodedTarget:
    code = by_name(method.encoding).code

    def entry(t: int) -> EntryData:
        original = factors[t]
        ((a, b),) = align_factors([(original.A, original.B)], method.align)
        (coded_a, read_a), (coded_b, read_b) = (
            encode_rows(rows.astype(np.float32), code) for rows in (a, b.T)
        )
        # Against what was coded, which is the original in this form to float64 rounding.
        error = error_of_grams(row_gram(a, read_a), row_gram(b.T, read_b))
        release([original.A, original.B])
        return EntryData(
            original.scale,
            original.rank,
            0,
            None,
            coded_a,
            None,
            coded_b,
            *dtype_codes(original),
            error=error if original.scale else 0.0,
        )

    return CodedTarget((), InTurn(entry, len(factors), mean_bytes(factors)))


def _exact(_method: Exact, factors: Sequence[Factors]) -> CodedTarget:
    keys = _equal_keys(factors)
    clusters: dict[tuple[str | None, ...], int] = {}
    first: list[int] = []
    for t, key in enumerate(keys):
        if any(key) and key not in clusters:
            first.append(t)
            clusters[key] = len(first)

    def frame(number: int) -> tuple[FramePart | None, FramePart | None]:
        t = first[number]
        a, b = (
            None if name is None else FramePart(rows.shape[1], 0, len(rows), exact_rows(rows), None)
            for name, rows in zip(keys[t], (factors[t].A, factors[t].B.T), strict=True)
        )
        return a, b

    def entry(t: int) -> EntryData:
        original = factors[t]
        residual = [
            exact_rows(rows) if name is None else None
            for name, rows in zip(keys[t], (original.A, original.B.T), strict=True)
        ]
        release([original.A, original.B])
        return EntryData(
            original.scale,
            original.rank,
            clusters.get(keys[t], 0),
            None,
            residual[0],
            None,
            residual[1],
            *dtype_codes(original),
            error=0.0,
        )

    return CodedTarget(
        InTurn(frame, len(first), mean_bytes(factors)),
        InTurn(entry, len(factors), mean_bytes(factors)),
    )


def _equal_keys(factors: Sequence[Factors]) -> list[tuple[str | None, str | None]]:
    """For each task's A and B a key of its bits, where another task has the same; else None."""
    sides = []
    for arrays, turned in (([f.A for f in factors], False), ([f.B for f in factors], True)):
        # Only among equal checksums can there be equal arrays; bytes of unlike dtypes do not tell.
        if len({array.dtype for array in arrays}) == 1:
            sums = list(each(_checksum, arrays, arrays[0].nbytes))
        else:
            sums = [0] * len(arrays)
        seen = collections.Counter(sums)
        candidates = [t for t, own in enumerate(sums) if seen[own] > 1]
        rows = [arrays[t].T if turned else arrays[t] for t in candidates]
        digests = dict(zip(candidates, each(_digest, rows, arrays[0].nbytes), strict=True))
        often = collections.Counter(digests.values())
        keys = [digests.get(t) for t in range(len(arrays))]
        sides.append([key if often[key] > 1 else None for key in keys])
    return list(zip(*sides, strict=True))


def _checksum(array: Array) -> int:
    found = crc32c(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    release([array])
    return found


def _digest(rows: Array) -> str | None:
    return digest(exact_rows(rows))
