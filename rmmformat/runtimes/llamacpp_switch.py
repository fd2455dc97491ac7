"""The task that a ``llama_cpp.Llama`` runs, changed in place."""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rmmformat.errors import OptionError, RmmError

if TYPE_CHECKING:
    from rmmformat.runtimes.llamacpp import Adapters
    from rmmformat.runtimes.llamacpp_file import MemoryAdapter

__all__ = ["Switch"]


class _Loaded(NamedTuple):
    """An adapter in llama.cpp's memory."""

    handle: Any
    n_bytes: int


class Switch:
    """The task that a ``llama_cpp.Llama`` runs, changed in place.

    For one thread at a time, which is that of the model.

    Parameters
    ----------
    llama
        A ``llama_cpp.Llama`` made without ``lora_path``.
    adapters
        Where the tasks come from.
    budget_bytes
        Memory for tasks that stay loaded in llama.cpp beside the one that is on, those used last
        first: switching to one of them reads nothing.  By default none stays.

    Attributes
    ----------
    task
        Name of the task that is on, or None for the base model alone.

    Raises
    ------
    OptionError
        The budget is negative.
    """

    def __init__(self, llama: Any, adapters: Adapters, *, budget_bytes: int = 0) -> None:
        if budget_bytes < 0:
            raise OptionError(f"a budget is at least 0 bytes, got {budget_bytes}")
        self._llama = llama
        self._adapters = adapters
        self._budget_bytes = budget_bytes
        # By task, the one used last at the end.
        self._loaded: collections.OrderedDict[str, _Loaded] = collections.OrderedDict()
        self.task: str | None = None

    def __enter__(self) -> Switch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Switch to the base model and give all memory back; closing twice is fine."""
        self.to(None)
        self._shrink(0)

    def to(self, task: str | None, *, scale: float = 1.0, next: str | None = None) -> None:  # noqa: A002
        """Switch to a task, or with None to the base model; what the model has read is forgotten.

        Parameters
        ----------
        scale
            Multiplies what the task adds.
        next
            The task that will probably come after it: it is reconstructed on a thread while this
            one is evaluated (:meth:`Adapters.prefetch`).

        Raises
        ------
        NotFoundError, LossyConversionError, UnsupportedError, FormatError
            As :meth:`Adapters.file`; the task that was on stays on.
        RmmError
            llama.cpp does not take the adapter; its log says why.
        """
        llama_cpp: Any = importlib.import_module("llama_cpp")
        kept = task is not None and task in self._loaded
        handle = None if task is None else self._handle(llama_cpp, task)
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(handle)
        scales = (ctypes.c_float * 1)(scale)
        n = 0 if handle is None else 1
        if llama_cpp.llama_set_adapters_lora(self._llama.ctx, handles, n, scales):
            if task is not None and not kept:
                llama_cpp.llama_adapter_lora_free(self._loaded.pop(task).handle)
            raise RmmError(f"llama.cpp does not apply task {task!r} to this context")
        self.task = task
        # The old one goes last: llama.cpp tells adapters apart by their address.
        self._shrink(self._budget_bytes)
        # Keys and values of what was read came from another task.
        self._llama.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)
        if next is not None and next not in self._loaded:
            self._adapters.prefetch(next)

    def _handle(self, llama_cpp: Any, task: str) -> Any:
        """Load a task into llama.cpp, unless it is there."""
        if task not in self._loaded:
            with self._adapters.lent(task) as adapter:
                handle = _init(llama_cpp, self._llama.model, adapter)
                n_bytes = adapter.file.bytes.nbytes
            if not handle:
                raise RmmError(
                    f"llama.cpp does not take task {task!r} as an adapter of this model",
                    hint="Its log says why: make the Llama with verbose=True.",
                )
            self._loaded[task] = _Loaded(handle, n_bytes)
        self._loaded.move_to_end(task)
        return self._loaded[task].handle

    def _shrink(self, budget_bytes: int) -> None:
        """Free the tasks used longest ago, but for the one that is on."""
        llama_cpp: Any = importlib.import_module("llama_cpp")
        others = [task for task in self._loaded if task != self.task]
        n_bytes = sum(self._loaded[task].n_bytes for task in others)
        for task in others:
            if n_bytes <= budget_bytes:
                return
            n_bytes -= self._loaded[task].n_bytes
            llama_cpp.llama_adapter_lora_free(self._loaded.pop(task).handle)


def _init(llama_cpp: Any, model: Any, adapter: MemoryAdapter) -> Any:
    """Let llama.cpp read an adapter: from memory, where it and the C library can."""
    from_stream = getattr(llama_cpp, "llama_adapter_lora_init_from_file_ptr", None)
    stdio = _stdio()
    if from_stream is None or stdio is None:
        return llama_cpp.llama_adapter_lora_init(model, adapter.file.path.encode())
    opening, closing = stdio
    memory: npt.NDArray[np.uint8] = adapter.file.bytes
    stream = opening(memory.ctypes.data, memory.nbytes, b"rb")
    if not stream:
        return llama_cpp.llama_adapter_lora_init(model, adapter.file.path.encode())
    try:
        return from_stream(model, stream)
    finally:
        closing(stream)


@functools.cache
def _stdio() -> tuple[Any, Any] | None:
    """C's fmemopen and fclose, where there are such: a stream spares a system call each tensor."""
    try:
        library = ctypes.CDLL(None)
        opening, closing = library.fmemopen, library.fclose
    except (OSError, TypeError, AttributeError):
        return None
    opening.restype, opening.argtypes = (
        ctypes.c_void_p,
        (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_char_p,
        ),
    )
    closing.restype, closing.argtypes = ctypes.c_int, (ctypes.c_void_p,)
    return opening, closing
