"""Codes of rows: how values become bytes and bytes values (specification, 8.2).

An encoding works on a *run*: successive rows of one length.  Adding one is one entry of
:data:`ENCODINGS` and its row in the specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from rmmformat.errors import FormatError, OptionError, RmmError, ShapeError, UnsupportedError
from rmmformat.format import trellis

__all__ = [
    "BLOCK",
    "ENCODINGS",
    "Encoding",
    "by_code",
    "by_name",
    "decode_blocks",
    "decode_run",
    "encode_run",
]

Float32 = npt.NDArray[np.float32]
BLOCK = 32
_UINT8 = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """One way to store rows.

    Parameters
    ----------
    code, name
        As in the specification's registry.
    row_bytes
        Bytes of a row of n values; None where the size of a run depends on its values.
    encode
        (rows, n) float32 to bytes.
    decode
        bytes, number of rows and n to (rows, n) float32.
    check
        bytes, number of rows and n to None, or what breaks RMM-086 (of a run without a fixed size
        RMM-087).
    own_length
        Where the size of a run depends on its values: bytes that start with a run to the run's
        length, 0 if they cannot hold one.
    """

    code: int
    name: str
    row_bytes: Callable[[int], int] | None
    encode: Callable[[Float32], bytes]
    decode: Callable[[bytes | memoryview, int, int], Float32]
    check: Callable[[bytes | memoryview, int, int], str | None] = lambda _data, _rows, _n: None
    own_length: Callable[[bytes | memoryview], int] | None = None

    def run_bytes(self, data: bytes | memoryview, n_rows: int, n: int) -> int:
        """Length of the run that `data` starts with; `data` may go on behind it, or be too short.

        Raises
        ------
        FormatError
            The run tells its length itself, and wrongly (RMM-087).
        """
        if self.row_bytes is not None:
            return n_rows * self.row_bytes(n)
        length = 0 if self.own_length is None else self.own_length(data)
        if length == 0:
            raise FormatError(
                f"a run of encoding {self.name} does not fit into {len(data)} bytes", rule="RMM-087"
            )
        return length


def _plain(code: int, name: str, dtype: Any) -> Encoding:
    stored = np.dtype(dtype)

    def encode(rows: Float32) -> bytes:
        with np.errstate(over="ignore"):  # callers look for infinities in what comes back
            return rows.astype(stored).tobytes()

    def decode(data: bytes | memoryview, n_rows: int, n: int) -> Float32:
        return np.frombuffer(data, stored).reshape(n_rows, n).astype(np.float32)

    return Encoding(code, name, lambda n: n * stored.itemsize, encode, decode)


def _blocks(rows: Float32) -> Float32:
    """(rows, n) to (rows, blocks, 32), the last block filled with zeros."""
    n_rows, n = rows.shape
    whole = -(-n // BLOCK) * BLOCK
    if whole != n:
        rows = np.concatenate([rows, np.zeros((n_rows, whole - n), np.float32)], axis=1)
    return rows.reshape(n_rows, -1, BLOCK)


def _fit_scale(
    blocks: Float32, start: Float32, levels: Callable[[Float32, Float32], Float32]
) -> npt.NDArray[np.float16]:
    """Scale of each block: the best of several around `start`, as the f16 that is stored.

    Searching beats taking the scale from the largest value by about 0.1 bit at low widths, since
    clipping one outlier costs less than coarser steps for 31 others.
    """
    largest = np.float32(np.finfo(np.float16).max)
    best = np.clip(start, -largest, largest).astype(np.float16)
    best_error: Float32 | None = None
    for factor in np.linspace(1.0, 0.4, 19, dtype=np.float32):
        scale = np.clip(start * factor, -largest, largest).astype(np.float16)
        wide = scale.astype(np.float32)
        error = np.square(blocks - levels(blocks, wide)).sum(axis=-1, keepdims=True)
        if best_error is None:
            best, best_error = scale, error
        else:
            better = error < best_error
            best = np.where(better, scale, best)
            best_error = np.where(better, error, best_error)
    return best


def _safe(scale: Float32) -> Float32:
    return np.where(scale != 0, scale, np.float32(1))


def _odd_codes(blocks: Float32, scale: Float32, bits: int) -> npt.NDArray[np.int64]:
    top = (1 << bits) - 1
    codes = np.floor((blocks / _safe(scale) + top) / 2 + np.float32(0.5))
    return np.clip(codes, 0, top).astype(np.int64)


def _odd(bits: int) -> Encoding:
    """N-bit codes whose levels are the odd multiples of the block's scale."""
    top = (1 << bits) - 1
    block_bytes = 2 + 4 * bits

    def levels(blocks: Float32, scale: Float32) -> Float32:
        return (scale * (2 * _odd_codes(blocks, scale, bits) - top)).astype(np.float32)

    def encode(rows: Float32) -> bytes:
        n_rows, n = rows.shape
        blocks = _blocks(rows)
        peak = np.abs(blocks).max(axis=-1, keepdims=True)
        scale = _fit_scale(blocks, peak if bits == 1 else peak / np.float32(top), levels)
        codes = _odd_codes(blocks, scale.astype(np.float32), bits)
        codes.reshape(n_rows, -1)[:, n:] = 0
        planes = (codes[..., None] >> np.arange(bits)) & 1
        packed = np.packbits(
            planes.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little"
        )
        return np.concatenate([scale.view(np.uint8), packed], axis=-1).tobytes()

    def split(data: bytes | memoryview, n_rows: int, n: int) -> tuple[Any, Any]:
        raw = np.frombuffer(data, _UINT8).reshape(n_rows, -(-n // BLOCK), block_bytes)
        scale = raw[..., :2].copy().view("<f2").astype(np.float32)
        planes = np.unpackbits(raw[..., 2:], axis=-1, bitorder="little")
        planes = planes.reshape(*raw.shape[:-1], BLOCK, bits).astype(np.int64)
        return scale, (planes << np.arange(bits)).sum(axis=-1)

    def decode(data: bytes | memoryview, n_rows: int, n: int) -> Float32:
        scale, codes = split(data, n_rows, n)
        values = scale * (2 * codes - top).astype(np.float32)
        return np.ascontiguousarray(values.reshape(n_rows, -1)[:, :n])

    def check(data: bytes | memoryview, n_rows: int, n: int) -> str | None:
        scale, codes = split(data, n_rows, n)
        return _verdict(scale, codes.reshape(n_rows, -1)[:, n:])

    return Encoding(
        0x10 + bits,
        f"q{bits}",
        lambda n: block_bytes * -(-n // BLOCK),
        encode,
        decode,
        check,
    )


def _verdict(scale: Float32, spare: npt.NDArray[np.generic]) -> str | None:
    if not np.isfinite(scale).all():
        return "block scale is not finite"
    if np.any(spare != 0):
        return "codes beyond the row's end are not zero"
    return None


def _ggml(code: int, bits: int) -> Encoding:
    """The block layouts of ggml's Q4_0 (bits 4) and Q8_0 (bits 8)."""
    half = 1 << (bits - 1)
    low, high = (-half, half - 1) if bits == 4 else (1 - half, half - 1)
    block_bytes = 2 + BLOCK * bits // 8

    def quantise(blocks: Float32, scale: Float32) -> Float32:
        codes: Float32 = np.clip(np.rint(blocks / _safe(scale)), low, high).astype(np.float32)
        return codes

    def levels(blocks: Float32, scale: Float32) -> Float32:
        return scale * quantise(blocks, scale)

    def encode(rows: Float32) -> bytes:
        n_rows, n = rows.shape
        blocks = _blocks(rows)
        # The lowest level of Q4_0 has no positive twin: its scale takes the sign that puts the
        # block's largest value there.
        place = np.abs(blocks).argmax(axis=-1)[..., None]
        peak = np.take_along_axis(blocks, place, axis=-1)
        scale = _fit_scale(blocks, peak / np.float32(low if bits == 4 else high), levels)
        codes = quantise(blocks, scale.astype(np.float32)).astype(np.int64)
        if bits == 8:
            packed = codes.astype(np.int8).view(np.uint8)
        else:
            codes = codes + half
            codes.reshape(n_rows, -1)[:, n:] = 0
            packed = (codes[..., :16] | codes[..., 16:] << 4).astype(np.uint8)
        return np.concatenate([scale.view(np.uint8), packed], axis=-1).tobytes()

    def split(data: bytes | memoryview, n_rows: int, n: int) -> tuple[Any, Any]:
        raw = np.frombuffer(data, _UINT8).reshape(n_rows, -(-n // BLOCK), block_bytes)
        scale = raw[..., :2].copy().view("<f2").astype(np.float32)
        body = raw[..., 2:]
        if bits == 8:
            return scale, body.copy().view(np.int8).astype(np.int64)
        return scale, np.concatenate([body & 15, body >> 4], axis=-1).astype(np.int64)

    def decode(data: bytes | memoryview, n_rows: int, n: int) -> Float32:
        scale, codes = split(data, n_rows, n)
        values = scale * (codes - (half if bits == 4 else 0)).astype(np.float32)
        return np.ascontiguousarray(values.reshape(n_rows, -1)[:, :n])

    def check(data: bytes | memoryview, n_rows: int, n: int) -> str | None:
        scale, codes = split(data, n_rows, n)
        return _verdict(scale, codes.reshape(n_rows, -1)[:, n:])

    return Encoding(
        code, f"q{bits}_0", lambda n: block_bytes * -(-n // BLOCK), encode, decode, check
    )


def _trellis() -> Encoding:
    # The native module is imported when it is needed: all else can be read without it.
    def encode(rows: Float32) -> bytes:
        # One step, a quarter of the rows' root mean square; a row that lies below the error which
        # that makes is closer to zero than to anything it can be coded as.
        squares = np.square(rows.astype(np.float64)).mean(axis=1)
        step = float(np.sqrt(squares.mean())) / 4
        if step == 0:
            raise OptionError("rows that are all zero have no trellis run; store them as zero")
        kept = np.where((squares > step * step)[:, None], rows, np.float32(0))
        return trellis.encode_rows(kept, np.full(len(rows), step), tied=False)[0]

    def decode(data: bytes | memoryview, n_rows: int, n: int) -> Float32:
        from rmmformat._native import trellis_decode

        rows, length = trellis_decode(data, n_rows, n)
        if length != len(data):
            raise FormatError(f"a trellis run of {length} bytes in {len(data)}", rule="RMM-087")
        return rows

    def check(data: bytes | memoryview, n_rows: int, n: int) -> str | None:
        from rmmformat._native import trellis_check

        try:
            trellis_check(data, n_rows, n)
        except RmmError as error:
            return error.message
        return None

    def own_length(data: bytes | memoryview) -> int:
        from rmmformat._native import trellis_run_bytes

        return trellis_run_bytes(data)

    return Encoding(trellis.CODE, "trellis", None, encode, decode, check, own_length)


ENCODINGS: dict[int, Encoding] = {
    encoding.code: encoding
    for encoding in (
        Encoding(
            0,
            "zero",
            lambda _n: 0,
            lambda _rows: b"",
            lambda _data, n_rows, n: np.zeros((n_rows, n), np.float32),
        ),
        _plain(0x01, "f32", "<f4"),
        _plain(0x02, "f16", "<f2"),
        _plain(0x03, "bf16", ml_dtypes.bfloat16),
        _odd(1),
        _odd(2),
        _odd(3),
        _ggml(0x14, 4),
        _odd(5),
        _odd(6),
        _odd(7),
        _ggml(0x18, 8),
        _trellis(),
    )
}
_BY_NAME = {encoding.name: encoding for encoding in ENCODINGS.values()}
# What the command line calls 4 and 8 bits are ggml's blocks.
_BY_NAME |= {"q4": _BY_NAME["q4_0"], "q8": _BY_NAME["q8_0"]}


def by_code(code: int, offset: int | None = None) -> Encoding:
    """Encoding of a code; `offset` is where it is used, for the message.

    Raises
    ------
    UnsupportedError
        The code is not known (RMM-088).
    """
    try:
        return ENCODINGS[code]
    except KeyError:
        raise UnsupportedError(
            f"encoding {code:#04x} is not known to this version",
            rule="RMM-088",
            offset=offset,
            hint="A newer rmmformat may read it.",
        ) from None


def by_name(name: str) -> Encoding:
    """Encoding of a name such as ``f32``, ``q3``, ``q8`` or ``q8_0``."""
    try:
        return _BY_NAME[name]
    except KeyError:
        known = ", ".join(_BY_NAME)
        raise UnsupportedError(f"no encoding is called {name!r}", hint=f"Known: {known}.") from None


def encode_run(code: int, rows: Float32) -> bytes:
    """Encode rows (n_rows, n) float32 as one run."""
    if rows.ndim != 2 or rows.dtype != np.float32:
        raise ShapeError(f"a run wants (rows, n) float32, got {rows.shape} {rows.dtype}")
    return by_code(code).encode(np.ascontiguousarray(rows))


def decode_run(code: int, data: bytes | memoryview, n_rows: int, n: int) -> Float32:
    """Decode a run to (n_rows, n) float32; `data` is exactly the run's bytes."""
    encoding = by_code(code)
    if encoding.row_bytes is not None and len(data) != n_rows * encoding.row_bytes(n):
        raise FormatError(
            f"a run of {n_rows} rows of {n} values as {encoding.name} takes "
            f"{n_rows * encoding.row_bytes(n)} bytes, got {len(data)}",
            rule="RMM-061",
        )
    return encoding.decode(data, n_rows, n)


def decode_blocks(
    code: int,
    data: bytes | memoryview,
    n_rows: int,
    n: int,
    wanted: npt.NDArray[np.int64] | None = None,
) -> list[Float32]:
    """Decode rows of a run, in memory that is in proportion to the run's bytes.

    Parameters
    ----------
    data, n_rows, n
        The run, as for :func:`decode_run`.
    wanted
        Ordinals of the rows to give, ascending; by default all.

    Returns
    -------
    Blocks of (rows, n) float32, the rows in order.  One of zeros is a view of a single zero.
    """
    encoding = by_code(code)
    if wanted is None:
        wanted = np.arange(n_rows)
    if len(wanted) == 0:
        return []
    if encoding.row_bytes is not None:
        size = encoding.row_bytes(n)
        if size == 0:
            return [_zeros(len(wanted), n)]
        rows = np.frombuffer(data, np.uint8).reshape(n_rows, size)[wanted]
        return [encoding.decode(rows.tobytes(), len(wanted), n)]
    dense, coded = trellis.without_zero_rows(data, n_rows)
    values = encoding.decode(dense, len(coded), n)
    place = np.searchsorted(coded, wanted)
    there = place < len(coded)
    there[there] = coded[place[there]] == wanted[there]
    # Where rows of zeros and others take turns.
    turns = np.flatnonzero(np.diff(there)) + 1
    blocks = []
    for part in np.split(np.arange(len(wanted)), turns):
        kept = place[part]
        blocks.append(values[kept] if there[part[0]] else _zeros(len(part), n))
    return blocks


def _zeros(n_rows: int, n: int) -> Float32:
    return np.broadcast_to(np.float32(0), (n_rows, n))
