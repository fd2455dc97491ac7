"""CRC32C against google_crc32c, and against published values."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest

from rmmformat import _native


def test_published_values() -> None:
    assert _native.crc32c(b"123456789") == 0xE3069283
    assert _native.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert _native.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _native.crc32c(bytes(range(32))) == 0x46DD794E
    assert _native.crc32c(b"") == 0


@pytest.mark.parametrize(
    "n", [*range(40), 255, 767, 768, 769, 1536, 12287, 12288, 12289, 100_003, 1 << 20]
)
def test_any_length_and_alignment(n: int) -> None:
    data = np.random.default_rng(n).bytes(n + 9)
    for start in (0, 1, 7):
        part = data[start : start + n]
        assert _native.crc32c(memoryview(data)[start : start + n]) == google_crc32c.value(part)


def test_continued() -> None:
    data = np.random.default_rng(3).bytes(50_000)
    for cut in (0, 1, 4097, 49_999):
        assert _native.crc32c(data[cut:], _native.crc32c(data[:cut])) == google_crc32c.value(data)


def test_other_buffers() -> None:
    array = np.arange(1000, dtype=np.float32)
    assert _native.crc32c(array) == google_crc32c.value(array.tobytes())
    with pytest.raises((TypeError, BufferError)):
        _native.crc32c("text")
    with pytest.raises((ValueError, BufferError)):
        _native.crc32c(array[::2])
