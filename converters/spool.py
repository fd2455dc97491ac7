"""Arrays that were computed once and are read several times, kept in a file without a name."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator

import numpy as np

from rmmformat.errors import RmmError
from rmmformat.model import Array

__all__ = ["Spool"]


class Spool:
    """A temporary file of arrays by key.

    The file is gone from its folder as soon as it is open (on Windows: as soon as it is closed), so
    it leaves nothing behind, whatever ends the process.  Reading is thread-safe.
    """

    def __init__(self) -> None:
        with _explained():
            self._file = tempfile.TemporaryFile(prefix="rmm-")  # noqa: SIM115  # lives as long
        self._places: dict[tuple[str, ...], tuple[int, tuple[int, ...], np.dtype[np.generic]]] = {}
        self._lock = threading.Lock()

    def put(self, key: tuple[str, ...], array: Array) -> None:
        """Keep an array.

        Raises
        ------
        RmmError
            The disk is full, or the like.
        """
        with self._lock, _explained():
            start = self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(array).data)
            self._places[key] = start, array.shape, array.dtype

    def get(self, key: tuple[str, ...]) -> Array:
        """Read an array; the caller owns it."""
        start, shape, dtype = self._places[key]
        array: Array = np.empty(shape, dtype)
        with self._lock, _explained():
            self._file.seek(start)
            self._file.readinto(array.reshape(-1).view(np.uint8).data)
        return array


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RmmError(
            f"cannot keep factors in a temporary file: {error.strerror or error}",
            path=tempfile.gettempdir(),
            hint="Set TMPDIR to a folder with more room.",
        ) from error
