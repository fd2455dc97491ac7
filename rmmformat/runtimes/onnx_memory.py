"""A task as an ``.onnx_adapter`` file that is in memory only."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from rmmformat.collection import Collection, LoadedTask, StoredTask
from rmmformat.converters.base import Options
from rmmformat.converters.casting import FLOATS, CastTask
from rmmformat.converters.onnx_adapter import adapter_parameters, write_adapter
from rmmformat.converters.onnx_names import read_interface
from rmmformat.errors import OptionError
from rmmformat.model import Factors

__all__ = ["adapter_file"]


class _Reconstructed(CastTask):
    """A task with factors as a file gives them, not rounded to the dtypes of their source."""

    def factors(self, target: str) -> Factors:
        return self._loaded[target]

    @cached_property
    def _loaded(self) -> LoadedTask:
        assert isinstance(self.task, StoredTask)  # noqa: S101  # made below only
        return self.task.collection.load(self.task.name)


@contextlib.contextmanager
def adapter_file(
    collection: Collection,
    task: str,
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    names: Mapping[str, str] | None = None,
    drop_private: bool = False,
) -> Iterator[Path]:
    """Lend a task as an ``.onnx_adapter`` file, for all that wants a path; nothing touches a disk.

    The file is gone afterwards; an :class:`onnxruntime.LoraAdapter` that has loaded it stays good.
    Where the system has no files in memory it is a temporary one.

    Parameters
    ----------
    model
        The prepared model, against which names, dtypes and shapes are checked.
    dtype, names, drop_private
        As for export (:class:`~rmmformat.converters.base.Options`).

    Raises
    ------
    LossyConversionError, NotFoundError, OptionError, SourceError
        As :class:`~rmmformat.converters.onnx_adapter.OnnxAdapterExporter`.

    Examples
    --------
    >>> with onnx.adapter_file(collection, "sst2", "base.lora.onnx") as path:  # doctest: +SKIP
    ...     adapter = onnxruntime.LoraAdapter()
    ...     adapter.Load(str(path))
    """
    interface = None if model is None else read_interface(Path(model))
    if model is not None and interface is None:
        raise OptionError("the model has no inputs for factors", path=str(model))
    options = Options(dtype=dtype, names=names or {}, drop_private=drop_private)
    held = _Reconstructed(collection.source(task), FLOATS["f32"])
    parameters, _ = adapter_parameters(held, interface, options)
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task.onnx_adapter"
            write_adapter(parameters, path)
            yield path
        return
    descriptor = os.memfd_create("task.onnx_adapter")
    try:
        path = Path(f"/proc/self/fd/{descriptor}")
        write_adapter(parameters, path)
        yield path
    finally:
        os.close(descriptor)
