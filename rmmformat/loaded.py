"""One task in memory, as a collection gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from rmmformat.errors import NotFoundError
from rmmformat.format.reader import nearest
from rmmformat.model import Factors

__all__ = ["LoadedTask"]


class LoadedTask(Mapping[str, Factors]):
    """One task in memory: target name to its factors, as views on one arena.

    Attributes
    ----------
    name
        Name of the task.
    arena
        (n_bytes,) uint8, 64-byte aligned: all factors, each at a multiple of 64.
    """

    def __init__(self, name: str, arena: npt.NDArray[np.uint8], factors: dict[str, Factors]):
        self.name = name
        self.arena = arena
        self._factors = factors

    def __getitem__(self, target: str) -> Factors:
        try:
            return self._factors[target]
        except KeyError:
            raise NotFoundError(
                f"task {self.name!r} has no target {target!r}",
                hint=nearest(target, tuple(self._factors)),
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __repr__(self) -> str:
        return f"<LoadedTask {self.name!r}: {len(self)} targets, {self.arena.nbytes} bytes>"
