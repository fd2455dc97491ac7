"""One target's factors of all tasks, to what the container stores of them.

Joins the mathematics (:mod:`rmmformat.merge`) to the encodings of rows; reads and writes no file.
A *method* is what the user asked for; :meth:`prepare` makes of it a *job* for each target, having
looked at all targets first where it has to.  :func:`code_target` is a pure function of a job and
the target's factors, so targets can be coded anywhere and in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.format.encodings import by_name
from rmmformat.format.restore import sum_terms
from rmmformat.format.writer import EncodedArray, EntryData, FramePart
from rmmformat.merge.gauge import align as align_factors
from rmmformat.merge.rmm import Grouping, max_components, merge, pad_rank
from rmmformat.model import Factors
from rmmformat.planned import ErrorPlan, SizePlan, code_to_error, code_to_size, plan_size, survey
from rmmformat.rows import (
    CodedTarget,
    common_dtype,
    digest,
    dtype_codes,
    encode_rows,
    exact_rows,
    measure,
)

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
]

Float32 = npt.NDArray[np.float32]
Align = Literal["none", "svd", "procrustes"]


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


class _Uniform:
    """A method that does the same to every target."""

    def prepare(self, _targets: Targets) -> Callable[[Hashable], Job]:
        """Give the job of each target."""
        return lambda _key: self  # type: ignore[return-value]  # every subclass is a Job


@dataclasses.dataclass(frozen=True)
class Published(_Uniform):
    """RMM as published: a mean, p directions, and every task's coefficients (arXiv 2510.14163).

    Without an encoding rows are kept in the dtype of the originals, so that a merge of f16 adapters
    is not twice as wide as they are; f32 where they differ.
    """

    components: int
    grouping: Grouping = "position"
    align: Align = "none"
    encoding: str | None = None

    def describe(self) -> dict[str, object]:
        """Name and parameters for the metadata."""
        return {"name": "rmm", **dataclasses.asdict(self)}


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
        """Survey all targets, and share the budget out among them.

        Raises
        ------
        OptionError
            Nothing fits.
        """
        found = dict(targets.map(survey))
        ordered = [(key, found[key]) for key in targets.keys]
        return plan_size(ordered, self.size * targets.original_bytes).__getitem__


Method = Published | Plain | Exact | MaxError | Size
Job = Published | Plain | Exact | ErrorPlan | SizePlan


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
        Published: _published,
        Plain: _plain,
        Exact: _exact,
        ErrorPlan: code_to_error,
        SizePlan: code_to_size,
    }
    return coders[type(job)](job, factors)


def _published(method: Published, factors: Sequence[Factors]) -> CodedTarget:
    code = common_dtype(factors) if method.encoding is None else by_name(method.encoding).code
    pairs = [(f.A, f.B) for f in factors]
    if method.align != "none":
        pairs = list(align_factors(pairs, method.align))
    ranks = [f.rank for f in factors]
    parts, coefficients, restore = [], [], []
    for side in ([a for a, _ in pairs], [b.T for _, b in pairs]):
        # The stack is twice the factors of all tasks or more: one at a time, and gone after use.
        stack: npt.NDArray[np.float64] = pad_rank(side, np.float64)  # type: ignore[assignment]
        part, numbers, terms = _shared(stack, ranks, method, code)
        del stack
        parts.append(part)
        coefficients.append(numbers)
        restore.append(terms)
    entries = []
    for t, original in enumerate(factors):
        rows = [terms(t, original.rank) for terms in restore]
        own = [None if numbers is None else numbers[t] for numbers in coefficients]
        entries.append(
            EntryData(
                original.scale,
                original.rank,
                1,
                own[0],
                None,
                own[1],
                None,
                *dtype_codes(original),
                error=measure(original, rows[0], rows[1]),
            )
        )
    return CodedTarget(((parts[0], parts[1]),), tuple(entries))


def _shared(
    stack: npt.NDArray[np.float64], ranks: Sequence[int], method: Published, code: int
) -> tuple[FramePart, list[EncodedArray] | None, Callable[[int, int], Float32]]:
    """Shared part of one factor, every task's coefficients, and how a task comes back."""
    n, rank, length = stack.shape
    mixing = method.grouping == "row"
    group = {"position": 1}.get(str(method.grouping), length)
    if isinstance(method.grouping, int):
        group = method.grouping
    n_values = length if mixing else rank * min(group, length)
    p = min(method.components, max_components(n, n_values, rows=rank if mixing else 1))
    shared, numbers = merge(stack, p, method.grouping)
    assert shared.mean is not None  # merged with centring  # noqa: S101
    mean, mean_read = encode_rows(shared.mean, code)
    if p == 0:
        part = FramePart(shared.group, 0, rank, mean, None, mixing)
        return part, None, lambda _t, r: mean_read[:r]
    basis, basis_read = encode_rows(shared.basis.reshape(-1, length), code)
    directions = basis_read.reshape(p, -1, length)
    encoded, read = zip(
        # With row mixing a task has coefficients for each of its own rows (Kc = its rank).
        *(
            encode_rows(task[:, : r if mixing else 1].reshape(p, -1), code)
            for task, r in zip(numbers, ranks, strict=True)
        ),
        strict=True,
    )
    part = FramePart(shared.group, p, rank, mean, basis, mixing)

    def restore(t: int, r: int) -> Float32:
        return sum_terms(
            r,
            length,
            mean=mean_read,
            basis=directions,
            coefficients=read[t],
            residual=None,
            group=shared.group,
            row_mixing=mixing,
        )

    return part, list(encoded), restore


def _plain(method: Plain, factors: Sequence[Factors]) -> CodedTarget:
    code = by_name(method.encoding).code
    pairs = align_factors([(f.A, f.B) for f in factors], method.align)
    entries = []
    for original, (a, b) in zip(factors, pairs, strict=True):
        (coded_a, read_a), (coded_b, read_b) = (
            encode_rows(rows.astype(np.float32), code) for rows in (a, b.T)
        )
        error = measure(original, read_a, read_b)
        codes = dtype_codes(original)
        entries.append(
            EntryData(
                original.scale, original.rank, 0, None, coded_a, None, coded_b, *codes, error=error
            )
        )
    return CodedTarget((), tuple(entries))


def _exact(_method: Exact, factors: Sequence[Factors]) -> CodedTarget:
    sides = [[exact_rows(f.A) for f in factors], [exact_rows(f.B.T) for f in factors]]
    keys = [[digest(array) for array in side] for side in sides]
    shared_keys = [
        tuple(key if key is not None and side.count(key) > 1 else None for side, key in
              zip(keys, pair, strict=True))
        for pair in zip(*keys, strict=True)
    ]  # fmt: skip
    clusters: dict[tuple[str | None, ...], int] = {}
    frames: list[tuple[FramePart | None, FramePart | None]] = []
    entries = []
    for t, original in enumerate(factors):
        key, arrays = shared_keys[t], [side[t] for side in sides]
        if any(key) and key not in clusters:
            lengths = (original.A.shape[1], original.B.shape[0])
            parts = [
                None if name is None else FramePart(length, 0, original.rank, array, None)
                for name, length, array in zip(key, lengths, arrays, strict=True)
            ]
            frames.append((parts[0], parts[1]))
            clusters[key] = len(frames)
        residual = [
            array if name is None else None for name, array in zip(key, arrays, strict=True)
        ]
        entries.append(
            EntryData(
                original.scale,
                original.rank,
                clusters.get(key, 0),
                None,
                residual[0],
                None,
                residual[1],
                *dtype_codes(original),
                error=0.0,
            )
        )
    return CodedTarget(tuple(frames), tuple(entries))
