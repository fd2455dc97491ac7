"""Arrays that lie in files: mapped, not read, so that they take no memory of this process's own.

Pages of a mapped file are the system's, which drops them when it needs room; but as long as they
are mapped they count as this process's, so whoever is done with an array says so
(:func:`release`).  The array stays valid: pages come back when it is read again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from rmmformat._native import Map
from rmmformat.model import Array

__all__ = ["MappedFile", "is_mapped", "release"]


class MappedFile:
    """A file's bytes as arrays; it needs no open file, however many there are.

    Raises
    ------
    OSError
        The file cannot be opened, or is not a regular one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._map = Map(path)
        buffer: Any = self._map  # which no annotation can say before Python 3.12
        self._bytes = memoryview(buffer)

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self._map.size

    def array(self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """Values at an offset, row-major: a read-only view, a copy where they are not aligned.

        Raises
        ------
        ValueError
            The file ends before them.
        """
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return np.empty(shape, dtype)
        n_bytes = count * dtype.itemsize
        values: Array = np.frombuffer(self._bytes, np.uint8, n_bytes, offset).view(dtype)
        values = values.reshape(shape)
        return values if values.flags.aligned else values.copy()

    def bytes(self, offset: int, n_bytes: int) -> bytes:
        """Read some bytes; fewer where the file ends before them."""
        return bytes(self._bytes[offset : offset + n_bytes])


def is_mapped(array: Array) -> bool:
    """Whether an array lies in a :class:`MappedFile`."""
    return _map_of(array) is not None


def release(arrays: Iterable[Array]) -> None:
    """Take the pages of mapped arrays out of this process's memory; others stay as they are.

    Arrays are contiguous, be it transposed.
    """
    for array in arrays:
        found = _map_of(array)
        if found is not None and array.size:
            buffer: Any = found
            start = _address(np.frombuffer(buffer, np.uint8, 1))
            found.release(_address(array) - start, array.nbytes)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _map_of(array: Array) -> Map | None:
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, Map) else None
