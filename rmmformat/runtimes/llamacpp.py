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
import dataclasses
import importlib.util
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from rmmformat.ahead import Ahead
from rmmformat.collection import Collection
from rmmformat.converters.base import Options
from rmmformat.converters.gguf_base import Base, open_base
from rmmformat.converters.gguf_layout import Layout, Plan, base_for, plan
from rmmformat.errors import OptionError, RmmError, UnsupportedError
from rmmformat.runtimes.llamacpp_file import MemoryAdapter, Recipe, recipe_for
from rmmformat.runtimes.llamacpp_switch import Switch

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
        self._plans: dict[str, tuple[Plan, Recipe]] = {}
        self._layouts: dict[Layout, Layout] = {}  # equal ones are one object
        self._free: dict[int, list[MemoryAdapter]] = collections.defaultdict(list)  # id of a layout
        self._ahead = Ahead()
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
            for free in self._free.values():
                for adapter in free:
                    adapter.file.close()
            self._free.clear()
        self._ahead.close()

    def plan(self, task: str) -> Plan:
        """Lay a task out: names, types, alpha, what is folded, and what a person should know.

        Raises
        ------
        NotFoundError
            No such task.
        LossyConversionError, UnsupportedError
            As the GGUF exporter.
        """
        return self._planned(task)[0]

    def _planned(self, task: str) -> tuple[Plan, Recipe]:
        with self._lock:
            if task in self._plans:
                return self._plans[task]
        source = self._collection.source(task)
        base = self._base if self._base is not None else base_for(source, None)
        planned = plan(source, base, options=self._options, alignment=_ALIGNMENT, uniform=True)
        with self._lock:
            # Hashing a layout takes as long as a switch, so it is done once a task.
            layout = self._layouts.setdefault(planned.layout, planned.layout)
        planned = dataclasses.replace(planned, layout=layout)
        recipe = recipe_for(self._collection, task, planned)
        with self._lock:
            return self._plans.setdefault(task, (planned, recipe))

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
        with self.lent(task, threads=threads) as adapter:
            path = AdapterPath(adapter.file.path)
            path.shared = adapter.file.shared_path
            yield path

    @contextlib.contextmanager
    def lent(self, task: str, *, threads: int = 1) -> Iterator[MemoryAdapter]:
        """As :meth:`file`, with the memory itself; for :class:`Switch`."""
        self._ahead.settle(task)
        with self._filled(task, threads) as adapter:
            yield adapter

    def prefetch(self, task: str) -> None:
        """Reconstruct a task on a thread, so that :meth:`file` finds it there.

        It is one of the unused files that are kept: with ``keep=0``, or with files of as many other
        tasks in between, nothing is gained.  If it cannot be reconstructed, :meth:`file` says so.
        """

        def fill() -> None:
            with self._filled(task, 1):
                pass

        self._ahead.begin(task, fill)

    @contextlib.contextmanager
    def _filled(self, task: str, threads: int) -> Iterator[MemoryAdapter]:
        recipe = self._planned(task)[1]
        adapter = self._take(recipe.layout, task)
        try:
            adapter.fill(self._collection, task, recipe, threads)
            yield adapter
        finally:
            self._give_back(recipe.layout, adapter)

    def _take(self, layout: Layout, task: str) -> MemoryAdapter:
        """Take a file that holds the task already, or that nobody has used for longest."""
        with self._lock:
            if self._closed:
                raise RmmError("the adapters are closed")
            free = self._free[id(layout)]
            for n, adapter in enumerate(free):
                if adapter.task == task:
                    return free.pop(n)
            if len(free) >= max(self._keep, 1):
                return free.pop(0)
        return MemoryAdapter(layout)

    def _give_back(self, layout: Layout, adapter: MemoryAdapter) -> None:
        with self._lock:
            if not self._closed and len(self._free[id(layout)]) < self._keep:
                self._free[id(layout)].append(adapter)
                return
        adapter.file.close()


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
