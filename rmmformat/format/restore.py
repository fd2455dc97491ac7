"""Reconstruction in numpy, term by term as the specification's section 8.1 has it.

The native module does the same for speed; the two agree bit for bit.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rmmformat.errors import FormatError
from rmmformat.format import layout
from rmmformat.format.encodings import by_code, decode_blocks
from rmmformat.format.reader import Index

__all__ = ["Rows", "entry_factors", "frame_arrays", "read_arrays", "sum_terms"]

Float32 = npt.NDArray[np.float32]


class Rows:
    """Rows of an array; those without bytes in the file take no memory until they are asked for.

    Parameters
    ----------
    blocks
        (n, length) each, at least one.
    """

    def __init__(self, blocks: Sequence[Float32]) -> None:
        self._blocks = list(blocks)
        self._ends = list(itertools.accumulate(len(block) for block in self._blocks))

    def __len__(self) -> int:
        return self._ends[-1]

    def between(self, start: int, stop: int) -> Float32:
        """Rows start … stop − 1, (stop − start, length)."""
        number = bisect.bisect_right(self._ends, start)
        found = []
        while start < stop:
            first = self._ends[number] - len(self._blocks[number])
            end = min(stop, self._ends[number])
            found.append(self._blocks[number][start - first : end - first])
            start, number = end, number + 1
        if not found:
            return self._blocks[0][:0]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def steps(self, size: int) -> Iterator[Float32]:
        """So many rows at a time."""
        return (self.between(at, at + size) for at in range(0, len(self), size))

    def all(self) -> Float32:
        """All rows."""
        return self.between(0, len(self))


def sum_terms(
    rank: int,
    length: int,
    *,
    mean: Float32 | None,
    basis: Iterable[Float32] | None,
    coefficients: Iterable[Float32] | None,
    residual: Float32 | None,
    group: int = 1,
    row_mixing: bool = False,
) -> Float32:
    """Evaluate the formula of section 8.1 for one factor.

    Parameters
    ----------
    rank, length
        Rows and row length of the result.
    mean
        (R, length) with R >= rank, or None.
    basis
        (p, R, length), with row mixing (p, 1, length), or None.
    coefficients
        (p, K * ceil(length / group)), K = rank with row mixing and 1 otherwise.
    residual
        (rank, length) or None.

    Returns
    -------
    (rank, length) float32: each product and each sum rounded on its own.
    """
    total: Float32 | None = None if mean is None else mean[:rank].copy()
    if basis is not None and coefficients is not None:
        n_groups = -(-length // group)
        spread = np.repeat(np.arange(n_groups), group)[:length]
        for direction, numbers in zip(basis, coefficients, strict=True):
            weight = numbers.reshape(rank if row_mixing else 1, n_groups)
            if group > 1:
                weight = weight[:, spread]
            rows = direction if row_mixing else direction[:rank]
            with np.errstate(over="ignore", invalid="ignore"):  # stored infinities are legal
                product = weight * rows
                total = product if total is None else np.add(total, product, out=total)
    if residual is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            total = residual if total is None else total + residual
    return np.zeros((rank, length), np.float32) if total is None else total


def read_arrays(
    index: Index,
    start: int,
    end: int,
    arrays: list[tuple[int, int]],
    rule: str = "RMM-061",
    wanted: list[npt.NDArray[np.int64]] | None = None,
) -> list[Rows | None]:
    """Decode the arrays of one entry or frame.

    Parameters
    ----------
    start, end
        Offsets of its bytes.
    arrays
        Layout id and row length of each array.
    rule
        The rule that is broken if the arrays do not end at `end`: RMM-061, of a frame RMM-052.
    wanted
        Ordinals of the rows to give of each array, ascending; by default all.

    Raises
    ------
    FormatError
        The arrays do not end at `end`, or a run is not well formed (RMM-087).
    """
    position, decoded = 0, []
    for number, (layout_id, row_length) in enumerate(arrays):
        rows, first = [], 0
        for code, count in index.layout_runs(layout_id):
            encoding = by_code(code, start)
            at = start + position
            try:
                n_bytes = encoding.run_bytes(index.data[at:end], count, row_length)
                if encoding.row_bytes is not None:
                    position = layout.ceil_to(position, layout.alignment(n_bytes, 1))
                    at = start + position
                if at + n_bytes > end:
                    raise FormatError("an array ends behind its extent", rule=rule)
                raw = index.data[at : at + n_bytes]
                chosen = None
                if wanted is not None:
                    here = np.searchsorted(wanted[number], [first, first + count])
                    chosen = wanted[number][here[0] : here[1]] - first
                rows += decode_blocks(code, raw, count, row_length, chosen)
            except FormatError as error:
                error.offset = at
                raise
            position += n_bytes
            first += count
        decoded.append(Rows(rows) if rows else None)
    if start + position != end:
        raise FormatError(
            f"arrays take {position} bytes, their extent has {end - start}",
            rule=rule,
            offset=start,
        )
    return decoded


def frame_arrays(index: Index, frame: Any, rank: int | None = None) -> list[Rows | None]:
    """Mean and basis of A, mean and basis of B, as flat lists of rows.

    With `rank`, only the rows that a task of that rank uses: the first of the mean and of each
    vector of the basis.
    """
    wanted = None
    if rank is not None:
        wanted = [rows for f in ("a", "b") for rows in _rows_of_rank(frame[f], rank)]
    start = int(frame["offset"])
    end = start + int(frame["length"])
    return read_arrays(index, start, end, index.frame_arrays(frame), "RMM-052", wanted)


def _rows_of_rank(part: Any, rank: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ordinals of the rows of mean and basis."""
    components, rows = np.arange(int(part["n_components"])), np.arange(rank)
    if part["flags"] & 1:
        return rows, components
    return rows, (components[:, None] * int(part["rank"]) + rows).reshape(-1)


def entry_factors(
    index: Index, task: int, entry: int, offset: int | None = None
) -> tuple[Float32, Float32]:
    """Factors A (rank, n_in) and B (n_out, rank) of one entry of a task.

    Parameters
    ----------
    task
        Ordinal of the task.
    entry
        Ordinal of the entry within the task.
    offset
        Offset of the entry's bytes, where the caller knows it already.
    """
    record = index.table("TASK")[task]
    entry_record = index.table("ENTR")[int(record["first_entry"]) + entry]
    form = index.table("FORM")[entry_record["form"]]
    target_id = int(index.task_targets(task)[entry])
    target = index.table("TARG")[target_id]
    rank = int(form["rank"])
    frame = index.frame_of(form, target_id)
    shared: list[Rows | None] = [None] * 4
    if frame is not None:
        shared = frame_arrays(index, frame, rank)
    shapes = []
    for f, side in (("a", "n_in"), ("b", "n_out")):
        length = int(target[side])
        group, mixing = length, False
        if frame is not None and frame[f]["rank"]:
            group, mixing = int(frame[f]["group"]), bool(frame[f]["flags"] & 1)
        shapes.append((length, group, mixing))
    start = index.entry_offsets(task)[entry] if offset is None else offset
    arrays = index.entry_arrays(int(entry_record["form"]), target_id)
    own = read_arrays(index, start, start + int(entry_record["length"]), arrays)
    factors = []
    for number, (length, group, mixing) in enumerate(shapes):
        mean, basis = shared[2 * number : 2 * number + 2]
        coefficients, residual = own[2 * number : 2 * number + 2]
        factors.append(
            sum_terms(
                rank,
                length,
                mean=None if mean is None else mean.all(),
                basis=None if basis is None else basis.steps(1 if mixing else rank),
                coefficients=None if coefficients is None else coefficients.steps(1),
                residual=None if residual is None else residual.all(),
                group=group,
                row_mixing=mixing,
            )
        )
    return factors[0], np.ascontiguousarray(factors[1].T)
