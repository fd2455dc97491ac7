"""Tasks of a collection as LoRA adapters of llama.cpp, without a file on disk.

llama.cpp takes adapters by path.  :class:`Adapters` lays a task out as the GGUF file that the
exporter would write (:mod:`rmmformat.converters.gguf`), but in memory that has a path: the header
is written once, and a task is reconstructed straight into the place of its values.

With llama-cpp-python::

    with rmmformat.open("skills.rmm") as collection, Adapters(collection, "base.gguf") as adapters:
        with adapters.file("sst2") as path:
            llama = llama_cpp.Llama("base.gguf", lora_path=path)

or, with a model that stays and changes its task, :class:`Switch`.  Any other program that wants a
path can have one: ``path.shared`` is for other processes of the same user, such as
``llama-server --lora``.  llama.cpp has read all of a file when its call returns, so the path is
needed no longer than that.

Needs the gguf package; llama-cpp-python for :class:`Switch` alone.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rmmformat.collection import Collection, LoadedTask
from rmmformat.converters.base import Options
from rmmformat.converters.gguf_base import Base, open_base
from rmmformat.converters.gguf_layout import Layout, Plan, base_for, plan
from rmmformat.converters.gguf_payload import header, payload
from rmmformat.converters.gguf_scales import is_exact
from rmmformat.errors import (
    InternalError,
    LossyConversionError,
    OptionError,
    RmmError,
    UnsupportedError,
)
from rmmformat.model import Factors
from rmmformat.runtimes._memory_file import MemoryFile

__all__ = ["AdapterPath", "Adapters", "Switch", "adapter_file"]

_ALIGNMENT = 64  # of factors in an arena: with it, an arena is the data section of a GGUF file
_DTYPES = ("f32", "f16", "bf16")


class AdapterPath(str):
    """Path of a GGUF adapter in memory.

    Attributes
    ----------
    shared
        The path for other processes of the same user.
    """

    shared: str

    __slots__ = ("shared",)


class Adapters:
    """Tasks of a collection as GGUF adapters in memory.

    Thread-safe: each :meth:`file` that is open has memory of its own, which is used again later.

    Parameters
    ----------
    collection
        Must stay open.
    base
        The base model: its GGUF file, its ``config.json``, or the folder of that.  None if the
        tasks came from GGUF files: then they say themselves what is needed.
    dtype
        ``"f32"``, ``"f16"`` or ``"bf16"``.  By default a task's own; float32 where its factors have
        several, or one of its scales could only be folded with rounding.
    drop_private
        Leave heads and other private tensors out instead of refusing tasks that have them.
    names
        Target to tensor, where llama.cpp's names cannot be told.
    keep
        How many unused memory files to keep for each layout.  Tasks with the same targets, ranks
        and alpha share a layout.

    Raises
    ------
    OptionError
        No such dtype.
    UnsupportedError
        The gguf package is not installed, or the base is of a kind that is not known.
    SourceError
        The base cannot be read.
    """

    def __init__(
        self,
        collection: Collection,
        base: str | Path | None = None,
        *,
        dtype: str | None = None,
        drop_private: bool = False,
        names: Mapping[str, str] | None = None,
        keep: int = 2,
    ) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise UnsupportedError(
                "llama.cpp adapters need gguf, which is not installed",
                hint="pip install 'rmmformat[gguf]'",
            )
        if dtype is not None and dtype not in _DTYPES:
            raise OptionError(f"dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
        self._collection = collection
        self._base: Base | None = None if base is None else open_base(Path(base))
        self._options = Options(dtype=dtype, drop_private=drop_private, names=dict(names or {}))
        self._keep = keep
        self._lock = threading.Lock()
        self._plans: dict[str, Plan] = {}
        self._layouts: dict[Layout, Layout] = {}  # equal ones are one object
        self._free: dict[int, list[_Template]] = collections.defaultdict(list)  # id of a layout
        self._closed = False

    def __enter__(self) -> Adapters:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory that is not in use; closing twice is fine."""
        with self._lock:
            self._closed = True
            for templates in self._free.values():
                for template in templates:
                    template.file.close()
            self._free.clear()

    def plan(self, task: str) -> Plan:
        """Lay a task out: names, types, alpha, what is folded, and what a person should know.

        Raises
        ------
        NotFoundError
            No such task.
        LossyConversionError, UnsupportedError
            As the GGUF exporter.
        """
        with self._lock:
            if task in self._plans:
                return self._plans[task]
        source = self._collection.source(task)
        base = self._base if self._base is not None else base_for(source, None)
        planned = plan(source, base, options=self._options, alignment=_ALIGNMENT, uniform=True)
        with self._lock:
            # Hashing a layout takes as long as a switch, so it is done once a task.
            layout = self._layouts.setdefault(planned.layout, planned.layout)
            return self._plans.setdefault(task, dataclasses.replace(planned, layout=layout))

    @contextlib.contextmanager
    def file(self, task: str, *, threads: int = 1) -> Iterator[AdapterPath]:
        """Lend the path of a file that holds a task.

        Parameters
        ----------
        task
            Its name.
        threads
            How many reconstruct.  One by default: where other threads are busy, several wait for
            one another.  0 chooses by the size of the task.

        Yields
        ------
        AdapterPath
            Valid until the context ends; the file is the caller's alone for so long.

        Raises
        ------
        NotFoundError
            No such task.
        LossyConversionError, UnsupportedError
            As the GGUF exporter: llama.cpp could not hold, or would misread, part of the task.
        FormatError
            The collection's file is damaged.
        """
        planned = self.plan(task)
        template = self._take(planned.layout, task)
        try:
            template.fill(self._collection, task, planned, threads)
            path = AdapterPath(template.file.path)
            path.shared = template.file.shared_path
            yield path
        finally:
            self._give_back(planned.layout, template)

    def _take(self, layout: Layout, task: str) -> _Template:
        """Take a file that holds the task already, or that nobody has used for longest."""
        with self._lock:
            if self._closed:
                raise RmmError("the adapters are closed")
            free = self._free[id(layout)]
            for n, template in enumerate(free):
                if template.task == task:
                    return free.pop(n)
            if len(free) >= max(self._keep, 1):
                return free.pop(0)
        return _Template(layout)

    def _give_back(self, layout: Layout, template: _Template) -> None:
        with self._lock:
            if not self._closed and len(self._free[id(layout)]) < self._keep:
                self._free[id(layout)].append(template)
                return
        template.file.close()


class _Template:
    """A file in memory with the header of a layout; only its values change."""

    def __init__(self, layout: Layout) -> None:
        head = header(layout)
        self.task: str | None = None  # whose values it has
        self.file = MemoryFile(len(head) + layout.n_bytes)
        self.file.bytes[: len(head)] = np.frombuffer(head, np.uint8)
        self.arena = self.file.bytes[len(head) :]

    def fill(self, collection: Collection, task: str, planned: Plan, threads: int) -> None:
        """Reconstruct a task in place, then see to the few factors that llama.cpp has otherwise."""
        if self.task == task:
            return
        self.task = None
        slots = planned.layout.slots
        loaded = collection.load(task, dtype=slots[0].dtype, out=self.arena, threads=threads)
        self._check_places(loaded, planned)
        own = collection.targets(task)
        for slot in slots:
            factors = loaded[slot.target]
            view: Any = factors.A if slot.factor == "A" else factors.B
            info = own[slot.target]
            narrowed = view.dtype != (info.dtype_a if slot.factor == "A" else info.dtype_b)
            if narrowed and view.dtype != np.float32 and not np.isfinite(view).all():
                raise LossyConversionError(
                    f"task {task!r}, tensor {slot.name!r}: values are too large for {slot.dtype}",
                    hint="Choose f32.",
                )
            fold = planned.folds[slot.target] if slot.factor == "B" else 1.0
            if narrowed and not is_exact(fold):
                # Round once, after the product, as the exporter does.
                wide = np.empty((info.shape.n_out, info.rank), info.dtype_b)
                collection.load_factor(task, slot.target, "B", wide)
                factors = Factors(factors.A, wide, info.scale)
            if slot.turned or slot.heads or fold != 1:
                flat = view.reshape(-1)
                flat[:] = payload(slot, factors, fold).reshape(-1)
        self.task = task

    def _check_places(self, loaded: LoadedTask, planned: Plan) -> None:
        """Hold the arena's places against the header's: they must be the same."""
        start = self.arena.ctypes.data
        for slot in planned.layout.slots:
            factors = loaded[slot.target]
            view = factors.A if slot.factor == "A" else factors.B
            if view.ctypes.data - start != slot.offset or view.nbytes != slot.n_bytes:
                raise InternalError(
                    f"tensor {slot.name!r}: the arena has it elsewhere than the header says"
                )


@contextlib.contextmanager
def adapter_file(
    collection: Collection,
    task: str,
    base: str | Path | None = None,
    *,
    dtype: str | None = None,
    drop_private: bool = False,
    names: Mapping[str, str] | None = None,
) -> Iterator[AdapterPath]:
    """Lend the path of one task's adapter, in memory; for more than one, make :class:`Adapters`.

    Parameters and errors are those of :class:`Adapters` and :meth:`Adapters.file`.

    Examples
    --------
    >>> with adapter_file(collection, "sst2", "base.gguf") as path:  # doctest: +SKIP
    ...     llama = llama_cpp.Llama("base.gguf", lora_path=path)
    """
    with (
        Adapters(
            collection, base, dtype=dtype, drop_private=drop_private, names=names, keep=0
        ) as adapters,
        adapters.file(task) as path,
    ):
        yield path


class Switch:
    """The task that a ``llama_cpp.Llama`` runs, changed in place.

    Parameters
    ----------
    llama
        A ``llama_cpp.Llama`` made without ``lora_path``.
    adapters
        Where the tasks come from.

    Attributes
    ----------
    task
        Name of the task that is on, or None for the base model alone.
    """

    def __init__(self, llama: Any, adapters: Adapters) -> None:
        self._llama = llama
        self._adapters = adapters
        self._handle: Any = None
        self.task: str | None = None

    def __enter__(self) -> Switch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.to(None)

    def to(self, task: str | None, *, scale: float = 1.0) -> None:
        """Switch to a task, or with None to the base model; what the model has read is forgotten.

        Parameters
        ----------
        scale
            Multiplies what the task adds.

        Raises
        ------
        NotFoundError, LossyConversionError, UnsupportedError, FormatError
            As :meth:`Adapters.file`; the task that was on stays on.
        RmmError
            llama.cpp does not take the adapter; its log says why.
        """
        llama_cpp: Any = importlib.import_module("llama_cpp")
        handle: Any = None
        if task is not None:
            with self._adapters.file(task) as path:
                handle = llama_cpp.llama_adapter_lora_init(self._llama.model, path.encode())
            if not handle:
                raise RmmError(
                    f"llama.cpp does not take task {task!r} as an adapter of this model",
                    hint="Its log says why: make the Llama with verbose=True.",
                )
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(handle)
        scales = (ctypes.c_float * 1)(scale)
        n = 0 if handle is None else 1
        if llama_cpp.llama_set_adapters_lora(self._llama.ctx, handles, n, scales):
            llama_cpp.llama_adapter_lora_free(handle)
            raise RmmError(f"llama.cpp does not apply task {task!r} to this context")
        # The old one goes last: llama.cpp tells adapters apart by their address.
        if self._handle is not None:
            llama_cpp.llama_adapter_lora_free(self._handle)
        self._handle, self.task = handle, task
        # Keys and values of what was read came from another task.
        self._llama.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)
