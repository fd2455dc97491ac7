"""Tensors of safetensors files, one at a time, without torch.

The safetensors library validates the header, offsets included; tensors are then views of the
mapped file, which take no memory and can be read in parts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from rmmformat.converters.files import read_json_object
from rmmformat.errors import NonFiniteError, SourceError, UnsupportedError
from rmmformat.mapped import MappedFile, release
from rmmformat.model import Array

__all__ = [
    "SafetensorsStore",
    "TensorMeta",
    "TensorStore",
    "check_index",
    "open_sharded",
    "read_finite",
]

_TENSOR_LIMIT = 1 << 18  # tensors in one file; the largest adapters have some ten thousand

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}


@dataclasses.dataclass(frozen=True)
class TensorMeta:
    """Dtype and shape of a tensor, and the file that it is in."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    path: Path


class TensorStore(Protocol):
    """Named tensors, read one at a time."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files behind it."""

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's dtype and shape, in the order of the names."""

    def read(self, name: str) -> Array:
        """Read one tensor; the array may be a read-only view of the file."""


class SafetensorsStore:
    """Tensors of one safetensors file or of several that share no name.

    Files are mapped on construction, so that one replaced in the meantime is not mixed with the one
    that was described; mappings are dropped when pickled.

    Raises
    ------
    SourceError
        A file is not readable or not a valid safetensors file.
    UnsupportedError
        A tensor has a dtype that the container does not know.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._texts: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        self._maps: dict[Path, MappedFile] = {}
        metas: dict[str, TensorMeta] = {}
        for path in paths:
            for name, meta in self._describe(path).items():
                if name in metas:
                    raise SourceError(
                        f"tensor {name!r} is also in {metas[name].path.name}", path=str(path)
                    )
                metas[name] = meta
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
        """Give one tensor in its stored dtype and shape: a read-only view of the mapped file.

        Raises
        ------
        SourceError
            The file can no longer be read.
        """
        meta = self._metas[name]
        if meta.path not in self._maps and self._describe(meta.path).get(name) != meta:
            raise SourceError("has changed since it was opened", path=str(meta.path))
        try:
            return self._maps[meta.path].array(self._offsets[name], meta.dtype, meta.shape)
        except ValueError as error:
            raise SourceError(f"ends within tensor {name!r}", path=str(meta.path)) from error

    def metadata(self) -> dict[str, str]:
        """Texts of the files' headers, by key; the later file's where both have one."""
        return dict(self._texts)

    def _describe(self, path: Path) -> dict[str, TensorMeta]:
        """Map a file, check its header, and learn where its tensors lie."""
        from safetensors import SafetensorError, safe_open

        opener: Any = safe_open
        try:
            if not path.is_file():  # the library would wait for ever on a pipe
                raise SourceError("not a file", path=str(path))
            mapped = MappedFile(path)
            with opener(str(path), framework="numpy") as handle:
                names = handle.keys()
                if len(names) > _TENSOR_LIMIT:
                    raise SourceError(
                        f"{len(names)} tensors, expected at most {_TENSOR_LIMIT}", path=str(path)
                    )
                slices = {name: handle.get_slice(name) for name in names}
                codes = {name: str(view.get_dtype()) for name, view in slices.items()}
                shapes = {name: tuple(view.get_shape()) for name, view in slices.items()}
                self._texts.update(handle.metadata() or {})
        except SafetensorError as error:
            raise SourceError(f"not a safetensors file: {error}", path=str(path)) from error
        except OSError as error:
            raise SourceError(f"cannot read the file: {error}", path=str(path)) from error
        for name, code in codes.items():
            if code not in _DTYPES:
                raise UnsupportedError(
                    f"tensor {name!r} has dtype {code}, which cannot be stored", path=str(path)
                )
        self._offsets.update(_offsets(mapped, codes, shapes, path))
        self._keep(path, mapped)
        return {name: TensorMeta(_DTYPES[code], shapes[name], path) for name, code in codes.items()}

    def _keep(self, path: Path, mapped: MappedFile) -> None:
        self._maps[path] = mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _offsets(
    mapped: MappedFile,
    codes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
) -> dict[str, int]:
    """Where the tensors of a file begin, from a header that the library has found to be valid.

    Raises
    ------
    SourceError
        It is not the header that the library has seen.
    """
    length = int.from_bytes(mapped.bytes(0, 8), "little")
    try:
        header: dict[str, Any] = json.loads(mapped.bytes(8, length))
        header.pop("__metadata__", None)
        found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        if found == {name: (codes[name], shapes[name]) for name in codes}:
            return {
                name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items()
            }
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise SourceError("has changed while it was opened", path=str(path))


def read_finite(store: TensorStore, key: str, *, allow: bool) -> Array:
    """Read a tensor and refuse NaN and infinity in it, unless they are allowed.

    Raises
    ------
    NonFiniteError
        It holds some; the message names the tensor and says how many.
    """
    array = store.read(key)
    if not allow and array.dtype.kind not in "biu":
        n_bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if n_bad:
            raise NonFiniteError(
                f"tensor {key!r}: {n_bad} of {array.size} values are NaN or infinite",
                path=str(store.metas[key].path),
                hint="The adapter is broken. Allow non-finite values to look into it.",
            )
        release([array])
    return array


def open_sharded(index_path: Path) -> tuple[Path, ...]:
    """List the shard files that an index names.

    Raises
    ------
    SourceError
        The index is not of the known form, or names a file that is elsewhere or missing.
    """
    _, index = read_json_object(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("no weight_map in the index", path=str(index_path))
    shards: set[Path] = set()
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise SourceError(
                f"tensor {tensor!r} is said to be in {shard!r}, which is not a plain file name",
                path=str(index_path),
            )
        shards.add(index_path.with_name(shard))
    for path in sorted(shards):
        if not path.is_file():
            raise SourceError(
                f"shard {path.name!r} is missing",
                path=str(index_path),
                hint="Fetch the whole adapter again.",
            )
    return tuple(sorted(shards))


def check_index(index_path: Path, metas: Mapping[str, TensorMeta]) -> None:
    """Compare an index with the tensors that its shards hold.

    Raises
    ------
    SourceError
        They disagree; the message names the first tensor.
    """
    _, index = read_json_object(index_path)
    weight_map: dict[str, str] = index["weight_map"]
    for name in sorted(weight_map.keys() | metas.keys()):
        said = weight_map.get(name, "no file")
        found = metas[name].path.name if name in metas else "no file"
        if said != found:
            raise SourceError(
                f"tensor {name!r}: the index says {said}, found in {found}",
                path=str(index_path),
                hint="Fetch the whole adapter again.",
            )
