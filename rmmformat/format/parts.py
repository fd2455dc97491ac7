"""Values that a writer takes: encoded rows, shared parts, entries; and how they become bytes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from rmmformat.errors import ShapeError, UnsupportedError
from rmmformat.format import layout
from rmmformat.format.catalog import Layout, Part
from rmmformat.format.encodings import ENCODINGS

__all__ = ["EncodedArray", "EntryData", "FramePart", "catalog_part", "check_name", "pack"]


@dataclasses.dataclass(frozen=True)
class EncodedArray:
    """Rows as bytes: pairs of encoding and number of rows, and the bytes of each such run.

    Successive runs of one fixed-size encoding become one (RMM-041).
    """

    layout: Layout
    runs: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not self.layout or len(self.layout) != len(self.runs):
            raise ShapeError(f"{len(self.runs)} runs of bytes for {len(self.layout)} in the layout")
        if all(a[0] != b[0] for a, b in pairwise(self.layout)):
            return
        merged: list[tuple[int, int]] = []
        raws: list[list[bytes]] = []
        for (code, count), raw in zip(self.layout, self.runs, strict=True):
            if merged and merged[-1][0] == code and ENCODINGS[code].row_bytes is not None:
                merged[-1] = (code, merged[-1][1] + count)
                raws[-1].append(raw)
            else:
                merged.append((code, count))
                raws.append([raw])
        object.__setattr__(self, "layout", tuple(merged))
        object.__setattr__(self, "runs", tuple(b"".join(parts) for parts in raws))


@dataclasses.dataclass(frozen=True)
class FramePart:
    """One factor's side of a shared part (specification, FRAM)."""

    group: int
    n_components: int
    rank: int
    mean: EncodedArray | None
    basis: EncodedArray | None
    row_mixing: bool = False


@dataclasses.dataclass(frozen=True)
class EntryData:
    """What one task stores at one target."""

    scale: float
    rank: int
    cluster: int
    coefficients_a: EncodedArray | None
    residual_a: EncodedArray | None
    coefficients_b: EncodedArray | None
    residual_b: EncodedArray | None
    dtype_a: int
    dtype_b: int
    error: float = float("nan")


def check_name(name: str, what: str) -> None:
    """Refuse a name that the format cannot hold (RMM-030).

    Raises
    ------
    UnsupportedError
        Empty, too long, not encodable, or with control characters.
    """
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raw = b""
    if not 1 <= len(raw) <= layout.MAX_NAME or any(byte < 32 or byte == 127 for byte in raw):
        raise UnsupportedError(
            f"{what} name {name[:80]!r} cannot be stored: names are 1 to {layout.MAX_NAME} bytes "
            "of UTF-8 without control characters",
            rule="RMM-030",
            hint="Rename it.",
        )


def pack(arrays: tuple[EncodedArray | None, ...]) -> bytes:
    """Bytes of an entry or a frame: its arrays in order, large runs aligned (section 7.2)."""
    parts: list[bytes] = []
    length = 0
    for array in arrays:
        if array is None:
            continue
        for (code, _), run in zip(array.layout, array.runs, strict=True):
            if ENCODINGS[code].row_bytes is not None:
                parts.append(bytes(-length % layout.alignment(len(run), 1)))
                length += len(parts[-1])
            parts.append(run)
            length += len(run)
    return b"".join(parts)


def catalog_part(part: FramePart | None) -> Part | None:
    """What the index says of a part."""
    if part is None:
        return None
    return Part(
        part.group,
        part.n_components,
        part.rank,
        None if part.mean is None else part.mean.layout,
        None if part.basis is None else part.basis.layout,
        part.row_mixing,
    )
