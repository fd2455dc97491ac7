"""Safetensors files written one tensor at a time.

The safetensors library writes a file from arrays that are all in memory, and several metadata keys
in random order.  Here tensors are asked for when their place in the file comes, and the same
content gives the same bytes: those of the library where it has one metadata key or none.

Source: the format's description in the safetensors repository (README, "Format").
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rmmformat.errors import InternalError, UnsupportedError
from rmmformat.model import Array, Factors, SourceTask

__all__ = ["FactorReader", "Planned", "header_bytes", "write_safetensors"]

# In the order in which the library lays tensors out: widest first, so that all are aligned.
_CODES: dict[np.dtype[Any], str] = {
    np.dtype(np.uint64): "U64",
    np.dtype(np.int64): "I64",
    np.dtype(np.complex64): "C64",
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.uint32): "U32",
    np.dtype(np.int32): "I32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.uint16): "U16",
    np.dtype(np.int16): "I16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_CODES)}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that is to be written: what it is, and how to get it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def n_bytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * math.prod(self.shape)

    @classmethod
    def of(cls, array: Array) -> Planned:
        """Plan an array that is in memory."""
        return cls(array.dtype, array.shape, lambda: array)


class FactorReader:
    """Plans the factors of a task; the target that was read last is kept, for its other factor.

    Parameters
    ----------
    task
        Whose factors are written.
    """

    def __init__(self, task: SourceTask) -> None:
        self._task = task
        self._last: tuple[str, Factors] | None = None

    def planned(
        self, target: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
    ) -> tuple[Planned, Planned]:
        """Plan factors A and B of one target in the shapes that the file is to have."""
        info = self._task.targets[target]
        return (
            Planned(info.dtype_a, shape_a, lambda: self._factors(target).A.reshape(shape_a)),
            Planned(info.dtype_b, shape_b, lambda: self._factors(target).B.reshape(shape_b)),
        )

    def private(self, name: str) -> Planned:
        """Plan one private tensor."""
        info = self._task.privates[name]
        return Planned(info.dtype, info.shape, lambda: self._task.private_tensor(name))

    def _factors(self, target: str) -> Factors:
        if self._last is None or self._last[0] != target:
            self._last = (target, self._task.factors(target))
        return self._last[1]


def _order(tensors: Mapping[str, Planned]) -> list[str]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _RANK:
            raise UnsupportedError(
                f"tensor {name!r} has dtype {tensor.dtype}, which safetensors does not know"
            )
    return sorted(tensors, key=lambda name: (_RANK[tensors[name].dtype], name.encode()))


def header_bytes(tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file, padded so that the values start at a multiple of eight.

    Raises
    ------
    UnsupportedError
        The format has no such dtype.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in _order(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.n_bytes
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file; one tensor at a time is in memory.

    Parameters
    ----------
    path
        The file, usually a temporary one of :mod:`~rmmformat.converters.files`.
    tensors
        Name to what is to be written.
    metadata
        Text by key.

    Raises
    ------
    UnsupportedError
        The format has no such dtype.
    InternalError
        A tensor is not what was announced.
    OSError
        The file cannot be written; what is there of it is worthless.
    """
    with path.open("wb") as file:
        file.write(header_bytes(tensors, metadata or {}))
        for name in _order(tensors):
            tensor = tensors[name]
            array = np.asarray(tensor.read())
            if array.dtype != tensor.dtype or array.shape != tensor.shape:
                raise InternalError(
                    f"tensor {name!r} came as {array.dtype} {array.shape}, announced were "
                    f"{tensor.dtype} {tensor.shape}"
                )
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            file.write(raw.data)
