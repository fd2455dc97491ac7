"""Tensors of a file that ``torch.save`` wrote, read with torch's restricted unpickler.

A pickle can run code when it is read.  torch's ``weights_only`` unpickler builds tensors and
nothing else; before 2.6 it could be got round (CVE-2025-32434), so an older torch is refused.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rmmformat.converters.tensors import TensorMeta
from rmmformat.errors import SourceError, UnsupportedError
from rmmformat.model import Array

__all__ = ["TorchStore", "require_safe_torch"]

_SAFE = (2, 6)
_DTYPES: dict[str, np.dtype[Any]] = {
    **{
        word: np.dtype(word)
        for word in (
            *("float64", "float32", "float16", "complex64", "bool"),
            *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        )
    },
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_INSTALL = 'pip install "torch>=2.6", or save the adapter as safetensors.'


def require_safe_torch() -> Any:
    """Import torch, if it is there and its restricted unpickler is sound.

    Raises
    ------
    UnsupportedError
        torch is not installed or older than 2.6.
    """
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError("a pickled adapter needs torch", hint=_INSTALL) from error
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE:
        raise UnsupportedError(
            f"torch {torch.__version__} can be made to run code by a pickled file (CVE-2025-32434)",
            hint=_INSTALL,
        )
    return torch


class TorchStore:
    """Tensors of one or more pickled files; the files are mapped, not read.

    Raises
    ------
    SourceError
        A file is not a plain dictionary of dense tensors, wants to run code, or would expand.
    UnsupportedError
        torch is missing or too old, or a tensor has a dtype that the container does not know.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._tensors: dict[str, Any] | None = None
        metas: dict[str, TensorMeta] = {}
        for path in paths:
            for name, tensor in _load(path).items():
                if name in metas:
                    raise SourceError(
                        f"tensor {name!r} is also in {metas[name].path.name}", path=str(path)
                    )
                metas[name] = TensorMeta(_dtype_of(name, tensor, path), tuple(tensor.shape), path)
        self._metas = dict(sorted(metas.items()))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files behind it."""
        return self._paths

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's dtype and shape, in the order of the names."""
        return self._metas

    def read(self, name: str) -> Array:
        """Read one tensor in its stored dtype and shape; the caller owns the array."""
        if self._tensors is None:
            self._tensors = {}
            for path in self._paths:
                self._tensors.update(_load(path))
        torch = require_safe_torch()
        meta = self._metas[name]
        # numpy() knows neither bfloat16 nor 8-bit floats, so the bits travel as integers.
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        dense = self._tensors[name].detach().resolve_conj().resolve_neg().contiguous()
        if meta.dtype.kind in "biuc":
            return np.array(dense.numpy())
        bits = dense.view(same_size[meta.dtype.itemsize]).numpy()
        array: Array = np.array(bits).view(meta.dtype)
        return array

    def release(self) -> None:
        """Unmap the files until the next read, so that pages once read no longer count as used.

        Files from before torch 1.6, which cannot be mapped, are held as they are.
        """
        if all(zipfile.is_zipfile(path) for path in self._paths):
            self._tensors = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": None}


def _load(path: Path) -> dict[str, Any]:
    torch = require_safe_torch()
    try:
        n_bytes = path.stat().st_size
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED:
                        # torch never compresses; a compressed entry is a way to expand without end.
                        raise SourceError(f"entry {entry.filename!r} is compressed", path=str(path))
        with warnings.catch_warnings():  # about pickles of other kinds, which are refused or not
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except SourceError:
        raise
    except pickle.UnpicklingError as error:
        # The first lines advise to read it without restrictions.
        lines = [line for line in str(error).splitlines() if "WeightsUnpickler error" in line]
        reason = lines[0].partition("WeightsUnpickler error:")[2].strip() if lines else ""
        raise SourceError(
            f"holds more than tensors{': ' if reason else ''}{reason}",
            path=str(path),
            hint="Save the adapter as safetensors.",
        ) from error
    except MemoryError as error:
        raise SourceError("asks for more memory than there is", path=str(path)) from error
    except Exception as error:  # torch answers damaged files with many kinds
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"not a file of torch.save: {first}", path=str(path)) from error
    if not isinstance(state, dict):
        raise SourceError(f"expected a dict of tensors, got {type(state).__name__}", path=str(path))
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SourceError(
                f"expected a dict of tensors, got {type(tensor).__name__} under {name!r}",
                path=str(path),
                hint="If this is a whole training checkpoint, save the adapter alone.",
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UnsupportedError(f"tensor {name!r} is not a plain dense tensor", path=str(path))
        if tensor.numel() * tensor.element_size() > n_bytes:
            # Strides of 0 let a small file stand for a tensor of any size.
            raise SourceError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} is larger than its file",
                path=str(path),
            )
    return state


def _dtype_of(name: str, tensor: Any, path: Path) -> np.dtype[Any]:
    word = str(tensor.dtype).removeprefix("torch.")
    if word not in _DTYPES:
        raise UnsupportedError(
            f"tensor {name!r} has dtype {word}, which cannot be stored", path=str(path)
        )
    return _DTYPES[word]
