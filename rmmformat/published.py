"""RMM as published, one target at a time: merged position by position, then read task by task.

The merge goes over blocks of positions of all tasks' factors where they lie; coding and measuring
then go task by task.  What is held of a target is its mean and its basis, every task's
coefficients, and a few blocks: never a copy of all factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rmmformat.format.encodings import by_name
from rmmformat.format.restore import sum_terms
from rmmformat.format.writer import EncodedArray, EntryData, FramePart
from rmmformat.mapped import release
from rmmformat.merge.error import error_of_grams, row_gram
from rmmformat.merge.gauge import align as align_factors
from rmmformat.merge.rmm import Grouping, max_components, merge_tasks
from rmmformat.model import Array, Factors
from rmmformat.rows import CodedTarget, InTurn, common_dtype, dtype_codes, encode_rows, mean_bytes
from rmmformat.threads import each

__all__ = ["Align", "Published", "code_published"]

Float32 = npt.NDArray[np.float32]
Align = Literal["none", "svd", "procrustes"]


@dataclasses.dataclass(frozen=True)
class Published:
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

    def prepare(self, _targets: Any) -> Callable[[Hashable], Published]:
        """Give the job of each target: the same for all."""
        return lambda _key: self


@dataclasses.dataclass(frozen=True)
class _Side:
    """One factor of all tasks, merged: what is stored of it, and what a task needs to come back.

    ``originals`` are (r_t, L) each, ``coefficients`` (n, p, Kc, G), or None without directions.
    """

    part: FramePart
    mean: Float32
    basis: Float32 | None
    coefficients: Float32 | None
    originals: Sequence[Array]

    def task(self, t: int, rank: int, code: int) -> tuple[EncodedArray | None, Float32]:
        """Encode a task's coefficients, and give its factor as it will be read."""
        part, length = self.part, self.mean.shape[1]
        if self.basis is None or self.coefficients is None:
            return None, self.mean[:rank]
        # With row mixing a task has coefficients for each of its own rows (Kc = its rank).
        own = self.coefficients[t, :, : rank if part.row_mixing else 1]
        encoded, read = encode_rows(own.reshape(part.n_components, -1), code)
        factor = sum_terms(
            rank,
            length,
            mean=self.mean,
            basis=self.basis,
            coefficients=read,
            residual=None,
            group=part.group,
            row_mixing=part.row_mixing,
        )
        return encoded, factor


def code_published(method: Published, factors: Sequence[Factors]) -> CodedTarget:
    """Code one target; its entries are coded when they are asked for."""
    code = common_dtype(factors) if method.encoding is None else by_name(method.encoding).code
    pairs: Sequence[tuple[Array, Array]] = [(f.A, f.B) for f in factors]
    if method.align != "none":
        pairs = align_factors(pairs, method.align)
    a = _merged([a for a, _ in pairs], method, code)
    b = _merged([b.T for _, b in pairs], method, code)

    def entry(t: int) -> EntryData:
        original = factors[t]
        rank = original.rank
        numbers, grams = [], []
        for side in (a, b):
            own, read = side.task(t, rank, code)
            numbers.append(own)
            grams.append(row_gram(side.originals[t], read))
            release([side.originals[t]])
        return EntryData(
            original.scale,
            rank,
            1,
            numbers[0],
            None,
            numbers[1],
            None,
            *dtype_codes(original),
            error=error_of_grams(*grams) if original.scale else 0.0,
        )

    return CodedTarget(((a.part, b.part),), InTurn(entry, len(factors), mean_bytes(factors)))


def _merged(originals: Sequence[Array], method: Published, code: int) -> _Side:
    n, rank, length = len(originals), max(len(x) for x in originals), originals[0].shape[1]
    mixing = method.grouping == "row"
    group = {"position": 1}.get(str(method.grouping), length)
    if isinstance(method.grouping, int):
        group = method.grouping
    n_values = length if mixing else rank * min(group, length)
    p = min(method.components, max_components(n, n_values, rows=rank if mixing else 1))
    shared, numbers = merge_tasks(originals, p, method.grouping, each=each)
    release(originals)
    assert shared.mean is not None  # merged with centring  # noqa: S101
    mean, mean_read = encode_rows(shared.mean, code)
    if p == 0:
        part = FramePart(shared.group, 0, rank, mean, None, mixing)
        return _Side(part, mean_read, None, None, originals)
    basis, basis_read = encode_rows(shared.basis.reshape(-1, length), code)
    part = FramePart(shared.group, p, rank, mean, basis, mixing)
    return _Side(part, mean_read, basis_read.reshape(p, -1, length), numbers, originals)
