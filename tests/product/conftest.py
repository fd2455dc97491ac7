"""Synthetic tasks for tests of the product as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from rmmformat.model import (
    Factors,
    LedgerLine,
    PrivateInfo,
    Role,
    SourceFile,
    TargetInfo,
    TargetShape,
)


class MemoryTask:
    """A task in memory that obeys the contract of importers."""

    def __init__(
        self,
        name: str,
        factors: Mapping[str, Factors],
        *,
        shapes: Mapping[str, TargetShape] | None = None,
        privates: Mapping[str, np.ndarray] | None = None,
        base_model: str = "tiny/base",
    ) -> None:
        self.name, self.path, self.base_model = name, f"memory:{name}", base_model
        self.config_text = ""
        self._factors, self._privates = dict(factors), dict(privates or {})
        self.targets = {
            target: TargetInfo(
                (shapes or {}).get(target, TargetShape(f.A.shape[1], f.B.shape[0])),
                f.rank, f.scale, f.A.dtype, f.B.dtype,
            )
            for target, f in self._factors.items()
        }  # fmt: skip
        self.privates = {
            key: PrivateInfo(Role.MODULE, value.dtype, value.shape)
            for key, value in self._privates.items()
        }
        self.ledger: tuple[LedgerLine, ...] = ()
        self.files: tuple[SourceFile, ...] = ()

    def factors(self, target: str) -> Factors:
        return self._factors[target]

    def private_tensor(self, name: str) -> np.ndarray:
        return self._privates[name]


def make_tasks(
    n: int = 3,
    *,
    rank: int | Callable[[int], int] = 4,
    sides: tuple[tuple[int, int], ...] = ((40, 24), (17, 33)),
    dtype: Any = np.float32,
    seed: int = 0,
    **options: Any,
) -> list[MemoryTask]:
    rng = np.random.default_rng(seed)
    tasks = []
    for t in range(n):
        r = rank(t) if callable(rank) else rank
        factors = {
            f"layer.{i}": Factors(
                rng.standard_normal((r, n_in)).astype(dtype),
                rng.standard_normal((n_out, r)).astype(dtype),
                2.0,
            )
            for i, (n_in, n_out) in enumerate(sides)
        }
        tasks.append(MemoryTask(f"task{t}", factors, **options))
    return tasks


@pytest.fixture
def tasks() -> list[MemoryTask]:
    return make_tasks()
