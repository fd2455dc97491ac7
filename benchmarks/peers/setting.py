"""What every part of a run gets: how much to do, and where."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run.

    Attributes
    ----------
    quick
        Tiny shapes and few rounds: shows that everything works, and measures nothing.
    root
        A folder that is gone after the run, in memory where the system has such a place.
    rounds
        How often everybody gets a turn where a turn is short.
    """

    quick: bool
    root: Path
    rounds: int

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path
