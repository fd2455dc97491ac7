"""A task with its factors in another dtype, for exporters that are asked for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from rmmformat.converters.wrapped import WrappedTask
from rmmformat.errors import LossyConversionError, OptionError
from rmmformat.model import (
    Array,
    Factors,
    SourceTask,
    TargetInfo,
)

__all__ = ["FLOATS", "CastTask", "cast_task"]

FLOATS: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def cast_task(task: SourceTask, dtype: str | None) -> SourceTask:
    """Give ``task`` with its factors in ``dtype``, or as it is where that is None.

    Raises
    ------
    OptionError
        ``dtype`` is none of f32, f16 and bf16.
    """
    if dtype is None:
        return task
    if dtype not in FLOATS:
        raise OptionError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    return CastTask(task, FLOATS[dtype])


class CastTask(WrappedTask):
    """A task whose factors come in one dtype; all else is as it was.

    Rounding is to the nearest.  A finite value that becomes infinite is an error.
    """

    def __init__(self, task: SourceTask, dtype: np.dtype[Any]) -> None:
        super().__init__(task)
        self.dtype = dtype

    @cached_property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Targets, in the new dtype."""
        return {
            name: dataclasses.replace(info, dtype_a=self.dtype, dtype_b=self.dtype)
            for name, info in self.task.targets.items()
        }

    def factors(self, target: str) -> Factors:
        """Read one target's factors and cast them.

        Raises
        ------
        LossyConversionError
            A value is too large for the dtype.
        """
        factors = self.task.factors(target)
        return Factors(
            self._cast(factors.A, f"{target}, factor A"),
            self._cast(factors.B, f"{target}, factor B"),
            factors.scale,
        )

    def _cast(self, array: Array, what: str) -> Array:
        with np.errstate(over="ignore"):
            cast: Array = array.astype(self.dtype)
        if not np.isfinite(cast).all() and np.isfinite(array).all():
            raise LossyConversionError(
                f"{what} of task {self.name!r} has values too large for {self.dtype.name}",
                hint="Export in f32 or bf16.",
            )
        return cast
