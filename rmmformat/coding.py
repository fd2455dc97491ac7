"""One target's factors of all tasks, to what the container stores of them.

Joins the mathematics (:mod:`rmmformat.merge`) to the encodings of rows; reads and writes no file.
:func:`code_target` is a pure function of its arguments, so targets can be coded anywhere and in any
order.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError
from rmmformat.format import layout
from rmmformat.format.encodings import by_name, decode_run, encode_run
from rmmformat.format.restore import sum_terms
from rmmformat.format.writer import EncodedArray, EntryData, FramePart
from rmmformat.merge.error import relative_error
from rmmformat.merge.gauge import align as align_factors
from rmmformat.merge.rmm import Grouping, max_components, merge, pad_rank
from rmmformat.model import Factors

__all__ = ["Align", "CodedTarget", "Exact", "Method", "Plain", "Published", "code_target"]

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


@dataclasses.dataclass(frozen=True)
class Plain:
    """Every task on its own, all rows in one encoding."""

    encoding: str
    align: Literal["none", "svd"] = "none"

    def describe(self) -> dict[str, object]:
        """Name and parameters for the metadata."""
        return {"name": "plain", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Exact:
    """Every factor bit for bit in its own dtype; one that several tasks have is stored once."""

    def describe(self) -> dict[str, object]:
        """Name and parameters for the metadata."""
        return {"name": "exact"}


Method = Published | Plain | Exact


@dataclasses.dataclass(frozen=True)
class CodedTarget:
    """What the container stores of one target.

    Attributes
    ----------
    frames
        Shared parts, cluster 1 first: one part for A and one for B, or None.
    entries
        For each task, in the order given; `error` is measured on the decoded bytes.
    """

    frames: tuple[tuple[FramePart | None, FramePart | None], ...]
    entries: tuple[EntryData, ...]


def code_target(method: Method, factors: Sequence[Factors]) -> CodedTarget:
    """Code one target of a collection.

    Parameters
    ----------
    method
        How.
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
    }
    return coders[type(method)](method, factors)


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
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        code = int(codes[start])
        raws.append(encode_run(code, rows[start:stop]))
        runs.append((code, stop - start))
        decoded.append(decode_run(code, raws[-1], stop - start, rows.shape[1]))
    return EncodedArray(tuple(runs), tuple(raws)), np.concatenate(decoded)


def _dtype_codes(factors: Factors) -> tuple[int, int]:
    codes = layout.dtype_code(factors.A.dtype), layout.dtype_code(factors.B.dtype)
    if not all(code in layout.FACTOR_DTYPES.values() for code in codes):
        raise ShapeError(f"factors must be f32, f16 or bf16: {factors.A.dtype}, {factors.B.dtype}")
    return codes  # type: ignore[return-value]  # None is not among the values


def _common_dtype(factors: Sequence[Factors]) -> int:
    codes = {code for f in factors for code in _dtype_codes(f)}
    return codes.pop() if len(codes) == 1 else layout.FACTOR_DTYPES["f32"]


def _error(original: Factors, A: Float32, B_rows: Float32) -> float:
    return relative_error(original.A, original.B, original.scale, A, B_rows.T, original.scale)


def _published(method: Published, factors: Sequence[Factors]) -> CodedTarget:
    code = _common_dtype(factors) if method.encoding is None else by_name(method.encoding).code
    pairs = [(f.A, f.B) for f in factors]
    if method.align != "none":
        pairs = list(align_factors(pairs, method.align))
    sides = (
        pad_rank([a.astype(np.float64) for a, _ in pairs]),
        pad_rank([np.ascontiguousarray(b.T).astype(np.float64) for _, b in pairs]),
    )
    parts, coefficients, restore = [], [], []
    for stack in sides:
        part, numbers, terms = _shared(stack, method, code)
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
                *_dtype_codes(original),
                error=_error(original, rows[0], rows[1]),
            )
        )
    return CodedTarget(((parts[0], parts[1]),), tuple(entries))


def _shared(
    stack: npt.NDArray[np.float64], method: Published, code: int
) -> tuple[FramePart, list[EncodedArray] | None, Callable[[int, int], Float32]]:
    """Shared part of one factor, every task's coefficients, and how a task comes back."""
    n, rank, length = stack.shape
    mixing = method.grouping == "row"
    group = {"position": 1, "factor": length, "row": length}.get(
        method.grouping, method.grouping  # type: ignore[arg-type]
    )
    n_values = length if mixing else rank * min(int(group), length)
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
        *(encode_rows(task.reshape(p, -1), code) for task in numbers), strict=True
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
        error = _error(original, read_a, read_b)
        codes = _dtype_codes(original)
        entries.append(
            EntryData(
                original.scale, original.rank, 0, None, coded_a, None, coded_b, *codes, error=error
            )
        )
    return CodedTarget((), tuple(entries))


def _exact(_method: Exact, factors: Sequence[Factors]) -> CodedTarget:
    sides = [[_exact_rows(f.A) for f in factors], [_exact_rows(f.B.T) for f in factors]]
    keys = [[_digest(array) for array in side] for side in sides]
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
                *_dtype_codes(original),
                error=0.0,
            )
        )
    return CodedTarget(tuple(frames), tuple(entries))


def _exact_rows(rows: npt.NDArray[np.generic]) -> EncodedArray:
    """Rows in their own dtype, all-zero ones as nothing; bytes are copied, never converted."""
    rows = np.ascontiguousarray(rows)
    code = layout.dtype_code(rows.dtype)
    assert code is not None  # checked with the dtypes of the entry  # noqa: S101
    bits = rows.view(np.uint32 if rows.dtype.itemsize == 4 else np.uint16)
    codes = np.where((bits == 0).all(axis=1), 0, code)
    cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))
    return EncodedArray(
        tuple((int(codes[start]), stop - start) for start, stop in spans),
        tuple(rows[start:stop].tobytes() if codes[start] else b"" for start, stop in spans),
    )


def _digest(array: EncodedArray) -> str | None:
    """Key of equal arrays; None for one that holds NaN or infinity, which only a residual keeps."""
    for (code, _), raw in zip(array.layout, array.runs, strict=True):
        if code and not np.isfinite(np.frombuffer(raw, layout.DTYPES[code])).all():
            return None
    return hashlib.sha256(repr(array.layout).encode() + b"".join(array.runs)).hexdigest()


