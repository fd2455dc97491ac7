"""Weights of whole models (bases and fine-tunes), one tensor at a time.

A :class:`Checkpoint` is what ``save_pretrained`` of transformers or diffusers leaves: safetensors
files or pickled ``.bin`` files, one or sharded with an index, and a ``config.json``.  A single
weight file is one, too.  Tensor data is read by position, not through a mapping, so that the pages
of a file of many gigabytes never count as this process's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.files import read_json_object
from rmmformat.converters.names import check_name, task_name_of
from rmmformat.converters.tensors import (
    SafetensorsStore,
    TensorMeta,
    TensorStore,
    check_index,
    open_sharded,
)
from rmmformat.errors import NotFoundError, SourceError, UnsupportedError
from rmmformat.mapped import MappedFile
from rmmformat.model import Action, Array, LedgerLine

__all__ = [
    "CONFIG_NAME",
    "Checkpoint",
    "file_lines",
    "find_checkpoints",
    "find_weights",
    "open_checkpoint",
]

CONFIG_NAME = "config.json"

#: In the order of preference: a pickle beside a safetensors file is the older of the two.
_WEIGHTS = tuple(
    stem + ending
    for ending in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for stem in ("model", "pytorch_model", "diffusion_pytorch_model")
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json")
_NOT_WEIGHTS = ("adapter_model", "training_args", "optimizer", "scheduler", "rng_state", "scaler")
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Last parts of the names that quantised checkpoints give their tensors.
_QUANTISED = frozenset(
    {"qweight", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "weight_scale", "weight_packed"}
)
_RELEASE_AFTER = 256 << 20  # bytes read from a pickled file before its pages are given back


class Checkpoint:
    """The tensors of one model.  Reading is thread-safe.

    Attributes
    ----------
    path
        The folder or file that it was opened from.
    name
        After the folder, or after the file.
    config
        The parsed ``config.json``; empty where there is none.
    config_text
        Its text, character for character.
    files
        Every file that it consists of, the config first.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        store: TensorStore,
        config_text: str,
        config: Mapping[str, Any],
        files: tuple[Path, ...],
    ) -> None:
        self.path = path
        self.name = name
        self.config_text = config_text
        self.config = config
        self.files = files
        self._store = store
        self._keys = _inside_names(store.metas, path)
        self._unreleased = 0
        self._lock = threading.Lock()
        self.metas: Mapping[str, TensorMeta] = {
            inside: store.metas[key] for inside, key in sorted(self._keys.items())
        }
        _refuse_other_kinds(self.metas, config, path)

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {len(self.metas)} tensors>"

    @property
    def model_id(self) -> str:
        """Name of the model: of its repository if it lies in the Hub's cache, else :attr:`name`."""
        folder = self.path if self.path.is_dir() else self.path.parent
        for part in folder.absolute().parts:
            if part.startswith("models--"):
                return "/".join(part.split("--")[1:])
        return self.name

    def key_of(self, name: str) -> str:
        """Give the name that the file has for a tensor, with what training wrapped around it."""
        self._check(name)
        return self._keys[name]

    def read(self, name: str) -> Array:
        """Read one tensor in its stored dtype and shape; the caller owns the array.

        Parameters
        ----------
        name
            A key of ``metas``.

        Raises
        ------
        NotFoundError
            There is no such tensor.
        SourceError
            The file can no longer be read, or is not the one that was opened.
        """
        self._check(name)
        release = getattr(self._store, "release", None)
        if release is None:
            return self._store.read(self._keys[name])
        with self._lock:
            array = self._store.read(self._keys[name])
            self._unreleased += array.nbytes
            if self._unreleased > _RELEASE_AFTER:
                release()
                self._unreleased = 0
        return array

    def read_parts(self, name: str, parts: Sequence[tuple[int, int]]) -> bytes:
        """Read parts of one tensor's bytes, which lie row-major and little-endian.

        Parameters
        ----------
        parts
            Start and length of each.

        Raises
        ------
        NotFoundError, SourceError
            As :meth:`read`.
        """
        self._check(name)
        if isinstance(self._store, _PositionedStore):
            return self._store.read_parts(self._keys[name], parts)
        flat = np.ascontiguousarray(self.read(name)).reshape(-1).view(np.uint8)
        return b"".join(flat[start : start + length].tobytes() for start, length in parts)

    def _check(self, name: str) -> None:
        if name not in self._keys:
            raise NotFoundError(f"no tensor is called {name!r}", path=str(self.path))


class _PositionedStore(SafetensorsStore):
    """Safetensors files whose tensors are read by position, each file opened for each read.

    The library has checked the header, offsets included, before they are taken from it here.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        stamps = {path: _stamp(path) for path in paths if path.is_file()}
        super().__init__(paths)
        self._stamps = stamps

    def _keep(self, path: Path, mapped: MappedFile) -> None:
        """Keep no mapping: pages once read would count as this process's memory."""

    def read(self, name: str) -> Array:
        meta = self.metas[name]
        array: Array = np.empty(meta.shape, meta.dtype)
        if array.nbytes:
            self._fill(name, array.reshape(-1).view(np.uint8).data, 0)
        return array

    def read_parts(self, name: str, parts: Sequence[tuple[int, int]]) -> bytes:
        buffer = bytearray(sum(length for _, length in parts))
        done = 0
        for start, length in parts:
            self._fill(name, memoryview(buffer)[done : done + length], start)
            done += length
        return bytes(buffer)

    def _fill(self, name: str, buffer: memoryview, start: int) -> None:
        path = self.metas[name].path
        try:
            with path.open("rb", buffering=0) as stream:
                if _stamp(path) != self._stamps[path]:
                    raise SourceError("has changed since it was opened", path=str(path))
                stream.seek(self._offsets[name] + start)
                done = 0
                while done < len(buffer):
                    count = stream.readinto(buffer[done:])
                    if not count:
                        raise SourceError(f"ends within tensor {name!r}", path=str(path))
                    done += count
        except OSError as error:
            raise SourceError(f"tensor {name!r}: {error.strerror}", path=str(path)) from error


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _n_bytes(meta: TensorMeta) -> int:
    count = meta.dtype.itemsize
    for side in meta.shape:
        count *= side
    return count


def find_weights(path: Path) -> Path | None:
    """Find the weight file or index of a checkpoint, None if ``path`` is not one."""
    if path.is_dir():
        return next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if path.name.endswith(_SUFFIXES) and not path.name.startswith(_NOT_WEIGHTS) and path.is_file():
        return path
    return None


def find_checkpoints(path: Path) -> list[tuple[str | None, Path]]:
    """Find the checkpoints at ``path``, with the task name that the place suggests.

    A folder with weights is one checkpoint, whatever its subfolders hold; otherwise each of its
    subfolders that has weights is one.
    """
    if find_weights(path) is not None:
        return [(None, path)]
    if not path.is_dir():
        return []
    return [
        (child.name, child)
        for child in sorted(path.iterdir())
        if child.is_dir() and not child.name.startswith(".") and find_weights(child) is not None
    ]


def open_checkpoint(path: Path, options: Options = DEFAULTS) -> Checkpoint:
    """Open a checkpoint; its headers are read, its tensors are not.

    Parameters
    ----------
    path
        A folder as ``save_pretrained`` writes it, a weight file, or the index of a sharded one.
    options
        ``allow_pickle`` lets ``.bin`` files be read, with torch's restricted unpickler.

    Raises
    ------
    SourceError
        There is no such thing, or it is broken.
    UnsupportedError
        A pickled file that is not allowed, a quantised checkpoint, or an adapter.
    """
    weights = find_weights(path)
    if weights is None:
        what = "no model weights here" if path.exists() else "no such file or folder"
        hint = f"Expected {_WEIGHTS[0]}, pytorch_model.bin, the .index.json of either, or one file."
        raise SourceError(what, path=str(path), hint=hint)
    indexed = weights.name.endswith(".index.json")
    paths = open_sharded(weights) if indexed else (weights,)
    store = _open_store(weights, paths, options)
    if indexed:
        check_index(weights, store.metas)
    # A config beside a file of another name may be of another model.
    config_path = weights.with_name(CONFIG_NAME)
    text = ""
    config: dict[str, Any] = {}
    has_config = weights.name in _WEIGHTS and config_path.is_file()
    if has_config:
        text, config = read_json_object(config_path)
        _check_config(config, config_path)
    files = (*((config_path,) if has_config else ()), *((weights,) if indexed else ()), *paths)
    return Checkpoint(path, _name_of(path, weights), store, text, config, files)


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Check the types of the fields that are read."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else [architectures]
    if architectures is not None and not all(isinstance(name, str) for name in names):
        raise SourceError("field architectures is not a list of strings", path=str(path))
    if not isinstance(config.get("model_type", ""), (str, type(None))):
        raise SourceError("field model_type is not a string", path=str(path))


def _open_store(weights: Path, paths: tuple[Path, ...], options: Options) -> TensorStore:
    if ".safetensors" in weights.name:
        return _PositionedStore(paths)
    if not options.allow_pickle:
        raise UnsupportedError(
            "a pickled file, and pickles are not allowed",
            path=str(weights),
            hint="Use --allow-pickle (torch's restricted unpickler reads it), or save the "
            "model as safetensors.",
        )
    from rmmformat.converters.torch_pickle import TorchStore

    return TorchStore(paths)


def _name_of(path: Path, weights: Path) -> str:
    if path.is_dir():
        name = task_name_of(path)
    elif weights.name in _WEIGHTS:
        name = task_name_of(weights.parent)
    else:
        name = next(weights.name.removesuffix(s) for s in _SUFFIXES if weights.name.endswith(s))
    return check_name(name, "task name", str(path))


def _inside_names(metas: Mapping[str, TensorMeta], path: Path) -> dict[str, str]:
    """Name inside the model to name in the file, without what torch wraps around a model."""
    wrapped = bool(metas) and all(key.startswith("module.") for key in metas)
    inside: dict[str, str] = {}
    for key in metas:
        name = key.removeprefix("module.") if wrapped else key
        name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        name = check_name(name, "tensor name", str(path))
        if name in inside:
            raise SourceError(f"tensors {inside[name]!r} and {key!r} are the same", path=str(path))
        inside[name] = key
    return inside


def _refuse_other_kinds(
    metas: Mapping[str, TensorMeta], config: Mapping[str, Any], path: Path
) -> None:
    if not metas:
        raise SourceError("holds no tensors", path=str(path))
    for name, meta in metas.items():
        parts = name.split(".")
        if any(part.startswith("lora_") or part == "base_layer" for part in parts):
            raise UnsupportedError(
                f"tensor {name!r} belongs to an adapter, and whole weights were expected",
                path=str(path),
                hint="Give the adapter's folder as a source of its own, or merge the adapter.",
            )
        if parts[-1] in _QUANTISED or (meta.dtype.itemsize == 1 and meta.dtype.kind in "Vf"):
            raise UnsupportedError(
                f"tensor {name!r} is of a quantised model",
                path=str(path),
                hint="Save the model in float32, float16 or bfloat16.",
            )
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{CONFIG_NAME} has a quantization_config: the weights are not what they stand for",
            path=str(path),
            hint="Save the model in float32, float16 or bfloat16.",
        )


def file_lines(model: Checkpoint) -> list[LedgerLine]:
    """Account for every file that is there, beside those that hold the model."""
    around = sorted(model.path.iterdir()) if model.path.is_dir() else list(model.files)
    lines = []
    for entry in around:
        label = f"file {entry.name}{'/' if entry.is_dir() else ''}"
        if entry not in model.files:
            lines.append(LedgerLine(label, Action.IGNORED, "not part of the weights"))
        elif entry.name == CONFIG_NAME:
            lines.append(LedgerLine(label, Action.STORED, "as text"))
        else:
            lines.append(LedgerLine(label, Action.USED))
    return lines
