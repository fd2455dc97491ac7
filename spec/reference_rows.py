"""Rows of the fixed-size encodings, and the sum that makes a factor of rows (8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference_base import F32

# --- Encodings (8.2) -----------------------------------------------------------------------------


def row_bytes(code: int, n: int) -> int:
    """8.2, column *row_bytes(n)* of the fixed-size encodings."""
    return {0x00: 0, 0x01: 4 * n, 0x02: 2 * n, 0x03: 2 * n}.get(
        code, (2 + 4 * (code - 0x10)) * -(-n // 32)
    )


def q_blocks(code: int, raw: bytes) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """8.2: "a sequence of blocks of 32 values, each block an f16 scale d [...] and 32 codes"."""
    bits = code - 0x10
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, 2 + 4 * bits)
    scales, packed = blocks[:, :2].copy().view("<f2")[:, 0], blocks[:, 2:]
    if bits == 8:
        return scales, packed
    if bits == 4:  # "byte i holds the code of value i in its low and of value i + 16 in its high"
        return scales, np.concatenate([packed & 15, packed >> 4], axis=1)
    # "one little-endian integer of 32 · N bits in which value i has bits i·N … i·N + N − 1"
    split = np.unpackbits(packed, axis=1, bitorder="little").reshape(-1, 32, bits)
    return scales, (split << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)


def decode(code: int, raw: bytes, n: int) -> F32:
    """8.2, column *value*: a row of n values."""
    if code == 0x00:
        return np.zeros(n, np.float32)
    if code in (0x01, 0x02):
        return np.frombuffer(raw, "<f4" if code == 0x01 else "<f2").astype(np.float32)
    if code == 0x03:  # "the upper half of a binary32"
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    scales, codes = q_blocks(code, raw)
    u = codes.astype(np.int32)
    level = {0x18: codes.view(np.int8), 0x14: u - 8}.get(code, 2 * u - 2 ** (code - 0x10) + 1)
    return (scales.astype(np.float32)[:, None] * level.astype(np.float32)).reshape(-1)[:n]


# --- The sum (8.1) -------------------------------------------------------------------------------

Array = Callable[[int], F32]  # gives a row by its number


def factor(
    rank: int, length: int, part: Any, mean: Any, basis: Any, coefficients: Any, residual: Any
) -> F32:
    """8.1, row by row and term by term; numpy rounds each product and each sum to f32."""
    p, mixing, positions = part.n_components, part.flags & 1, -(-length // max(part.group, 1))

    def terms(k: int) -> Iterator[F32]:
        if mean:
            yield mean(k)
        for j in range(p):
            c, b = coefficients(j), basis(j if mixing else j * part.rank + k)
            own = c[k * positions :][:positions] if mixing else c
            yield np.repeat(own, part.group)[:length] * b
        if residual:
            yield residual(k)

    x = np.zeros((rank, length), np.float32)  # "If no term is present the value is +0"
    with np.errstate(all="ignore"):
        for k in range(rank if mean or p or residual else 0):
            x[k] = reduce(np.add, terms(k))  # "starts with the first term that is present"
    return x
