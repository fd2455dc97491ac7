"""One more task of a collection that was merged: coefficients on the basis that it has.

The basis was made without the task, so what it keeps of it depends on how alike it is; the error is
measured, and whoever adds it is told.  Reads and writes no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.coding import Published, code_target
from rmmformat.format.encodings import by_name
from rmmformat.format.parts import EncodedArray, EntryData, FramePart
from rmmformat.format.restore import sum_terms
from rmmformat.merge.gauge import align as align_factors
from rmmformat.merge.project import project
from rmmformat.merge.rmm import Shared
from rmmformat.model import Factors
from rmmformat.rows import CodedTarget, common_dtype, dtype_codes, encode_rows, measure

__all__ = ["Extension", "KnownFrame", "extend_target"]

Float32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class KnownFrame:
    """A frame that a file has, decoded: cluster number, largest rank, and both factors' share."""

    number: int
    rank: int
    a: Shared
    b: Shared


@dataclasses.dataclass(frozen=True)
class Extension:
    """How one target of new tasks is kept.

    Attributes
    ----------
    method
        What the collection was made with.
    frames
        Those of its frames that have directions.
    known_frames
        Number of all frames that the file has of the target.
    """

    method: Published
    frames: tuple[KnownFrame, ...]
    known_frames: int


def extend_target(job: Extension, factors: Sequence[Factors]) -> CodedTarget:
    """Code one target of tasks that join a collection.

    Each task goes to the frame that keeps most of it.  Where no frame has its rank, new tasks get a
    frame of their own together.

    Raises
    ------
    NonFiniteError
        A factor holds NaN or infinity.
    """
    entries: dict[int, EntryData] = {}
    left: list[int] = []
    for number, original in enumerate(factors):
        fitting = [frame for frame in job.frames if original.rank <= frame.rank]
        tried = [_projected(job.method, frame, original) for frame in fitting]
        if tried:
            entries[number] = min(tried, key=lambda entry: entry.error)
        else:
            left.append(number)
    frames: Iterable[tuple[FramePart | None, FramePart | None]] = ()
    if left:
        own = code_target(job.method, [factors[number] for number in left])
        frames = own.frames
        for number, entry in zip(left, own.entries, strict=True):
            cluster = entry.cluster + job.known_frames
            entries[number] = dataclasses.replace(entry, cluster=cluster)
    ordered = tuple(entries[number] for number in range(len(factors)))
    return CodedTarget(tuple(frames), ordered, job.known_frames)


def _projected(method: Published, frame: KnownFrame, original: Factors) -> EntryData:
    code = common_dtype([original]) if method.encoding is None else by_name(method.encoding).code
    A, B = _aligned(method, frame, original)
    arrays: list[EncodedArray] = []
    restored: list[Float32] = []
    for rows, shared in ((A, frame.a), (B.T, frame.b)):
        numbers = project(rows, shared)
        array, read = encode_rows(numbers.reshape(shared.components, -1), code)
        arrays.append(array)
        restored.append(
            sum_terms(
                original.rank,
                shared.length,
                mean=shared.mean,
                basis=shared.basis,
                coefficients=read,
                residual=None,
                group=shared.group,
                row_mixing=shared.row_mixing,
            )
        )
    return EntryData(
        original.scale,
        original.rank,
        frame.number,
        arrays[0],
        None,
        arrays[1],
        None,
        *dtype_codes(original),
        error=measure(original, restored[0], restored[1]),
    )


def _aligned(method: Published, frame: KnownFrame, original: Factors) -> tuple[F64, F64]:
    """Factors in the form that the collection's tasks were in when they were merged."""
    pair = [(original.A, original.B)]
    A, B = align_factors(pair, "none" if method.align == "none" else "svd")[0]
    if method.align != "procrustes" or frame.a.mean is None or frame.b.mean is None:
        return A, B
    # One step of procrustes, with the tasks' mean as the reference that stays.
    rank = original.rank
    goal = np.concatenate([frame.a.mean[:rank], frame.b.mean[:rank]], axis=1).astype(np.float64)
    u, _, vt = np.linalg.svd(goal @ np.concatenate([A, B.T], axis=1).T)
    turn = u @ vt
    return turn @ A, B @ turn.T
