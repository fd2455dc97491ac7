"""Rows to the arrays that the container stores, and how they will be read back."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.format import layout
from rmmformat.format.encodings import decode_run, encode_run
from rmmformat.format.writer import EncodedArray, EntryData, FramePart
from rmmformat.merge.error import relative_error
from rmmformat.model import Factors
from rmmformat.threads import each

__all__ = [
    "CodedTarget",
    "InTurn",
    "common_dtype",
    "digest",
    "dtype_codes",
    "encode_rows",
    "exact_rows",
    "mean_bytes",
    "measure",
]

Float32 = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CodedTarget:
    """What the container stores of one target.

    Attributes
    ----------
    frames
        Shared parts, cluster 1 first: one part for A and one for B, or None.
    entries
        For each task, in the order given; `error` is measured on the decoded bytes.
    known_frames
        Frames that the file has of this target already: cluster numbers count them first.

    Frames are taken first.  Both may be made as they are taken (:class:`InTurn`), so that no more
    than a few are in memory.
    """

    frames: Iterable[tuple[FramePart | None, FramePart | None]]
    entries: Iterable[EntryData]
    known_frames: int = 0

    def whole(self) -> CodedTarget:
        """The same with everything made, to travel or to be kept."""
        return dataclasses.replace(self, frames=tuple(self.frames), entries=tuple(self.entries))


@dataclasses.dataclass(frozen=True)
class InTurn(Iterable[T]):
    """What a function of a number makes of so many bytes, on a few threads, as it is taken."""

    make: Callable[[int], T]
    count: int
    item_bytes: int

    def __iter__(self) -> Iterator[T]:
        return each(self.make, range(self.count), self.item_bytes)


def mean_bytes(factors: Sequence[Factors]) -> int:
    """Bytes of both factors of a task."""
    return sum(f.A.nbytes + f.B.nbytes for f in factors) // max(1, len(factors))


def encode_rows(rows: Float32, code: int) -> tuple[EncodedArray, Float32]:
    """Encode rows (n, length), all-zero ones as nothing, and give them as they will be read.

    A row that the encoding would turn into infinities (binary16 ends at 65,504) is kept as f32.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    decoded = decode_run(code, encode_run(code, rows), *rows.shape)
    codes = np.full(len(rows), code)
    overflow = ~np.isfinite(decoded).all(axis=1) & np.isfinite(rows).all(axis=1)
    codes[overflow] = layout.FACTOR_DTYPES["f32"]
    codes[(rows.view(np.uint32) == 0).all(axis=1)] = 0
    return _runs(rows, codes)


def _runs(rows: Float32, codes: npt.NDArray[np.int64]) -> tuple[EncodedArray, Float32]:
    """Encode row i as codes[i]: rows of equal code that follow one another make a run."""
    cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    runs, raws, decoded = [], [], []
    for start, stop in itertools.pairwise(cuts):
        code = int(codes[start])
        raws.append(encode_run(code, rows[start:stop]))
        runs.append((code, stop - start))
        decoded.append(decode_run(code, raws[-1], stop - start, rows.shape[1]))
    return EncodedArray(tuple(runs), tuple(raws)), np.concatenate(decoded)


def dtype_codes(factors: Factors) -> tuple[int, int]:
    """Codes of the dtypes of A and B.

    Raises
    ------
    ShapeError
        One is not among those that factors may have.
    """
    codes = layout.dtype_code(factors.A.dtype), layout.dtype_code(factors.B.dtype)
    if not all(code in layout.FACTOR_DTYPES.values() for code in codes):
        raise ShapeError(f"factors must be f32, f16 or bf16: {factors.A.dtype}, {factors.B.dtype}")
    return codes  # type: ignore[return-value]  # None is not among the values


def common_dtype(factors: Sequence[Factors]) -> int:
    """Code of the dtype that all factors have, that of f32 where they differ."""
    codes = {code for f in factors for code in dtype_codes(f)}
    return codes.pop() if len(codes) == 1 else layout.FACTOR_DTYPES["f32"]


def measure(original: Factors, A: Float32, B_rows: Float32) -> float:
    """Relative error of decoded rows, A (r, n_in) and B (r, n_out), against the original."""
    return relative_error(original.A, original.B, original.scale, A, B_rows.T, original.scale)


def exact_rows(rows: npt.NDArray[np.generic]) -> EncodedArray:
    """Rows such that every bit comes back: all-zero ones as nothing, others in their own dtype.

    Factors in f32 of which every value is one of bf16 or f16, as from adapters that were trained so
    and saved wide, are stored as that.
    """
    rows = _narrowest(np.ascontiguousarray(rows))
    code = layout.dtype_code(rows.dtype)
    assert code is not None  # checked with the dtypes of the entry  # noqa: S101
    bits = rows.view(np.uint32 if rows.dtype.itemsize == 4 else np.uint16)
    codes = np.where((bits == 0).all(axis=1), 0, code)
    cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    spans = list(itertools.pairwise(cuts))
    return EncodedArray(
        tuple((int(codes[start]), stop - start) for start, stop in spans),
        tuple(rows[start:stop].tobytes() if codes[start] else b"" for start, stop in spans),
    )


def _narrowest(rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    if rows.dtype != np.float32 or (len(rows) > 1 and _narrowest(rows[:1]).dtype == np.float32):
        return rows  # the first row alone tells of nearly all that cannot be narrower
    if not np.isfinite(rows).all():
        return rows
    if not (rows.view(np.uint32) & 0xFFFF).any():
        return rows.astype(layout.DTYPES[layout.FACTOR_DTYPES["bf16"]])
    with np.errstate(over="ignore", under="ignore"):
        half = rows.astype(np.float16)
    same = half.astype(np.float32).view(np.uint32) == rows.view(np.uint32)
    return half if same.all() else rows


def digest(array: EncodedArray) -> str | None:
    """Key of equal arrays; None for one that holds NaN or infinity, which only a residual keeps."""
    for (code, _), raw in zip(array.layout, array.runs, strict=True):
        if code and not np.isfinite(np.frombuffer(raw, layout.DTYPES[code])).all():
            return None
    return hashlib.sha256(repr(array.layout).encode() + b"".join(array.runs)).hexdigest()
