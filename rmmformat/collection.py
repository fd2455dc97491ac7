"""An open ``.rmm`` file: its tasks, and any of them as factors in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rmmformat._native import Entry as NativeEntry
from rmmformat._native import File
from rmmformat.arena import ArenaPool
from rmmformat.errors import NotFoundError, RmmError, ShapeError
from rmmformat.format import layout
from rmmformat.format.reader import Extent, Index, nearest, read_index, while_growing
from rmmformat.format.validate import Report, read_metadata, validate_bytes
from rmmformat.loaded import LoadedTask
from rmmformat.model import (
    Array,
    Factors,
    TargetInfo,
    TargetKind,
    TargetShape,
)
from rmmformat.remote import is_url
from rmmformat.stored import StoredTask

__all__ = ["Collection", "LoadedTask", "StoredTask", "open_collection"]


class Remote(Protocol):
    """Where the payload of a file is that is not here."""

    def bring(self, extents: Sequence[Extent]) -> None:
        """Have these extents in memory, with the bytes that their checksums say."""

    def validate(self) -> Report:
        """Check the whole file."""


class Collection:
    """An open file.  Use :func:`rmmformat.open`.

    Reading is thread-safe, and several processes that open one file share its pages.  Views that
    were handed out stay valid after :meth:`close`.  When the file grows, a collection that is open
    stays as it was.

    Attributes
    ----------
    path
        The file, or the empty string for bytes in memory.
    """

    def __init__(
        self,
        native: File,
        path: str,
        header: bytes | None = None,
        remote: Remote | None = None,
    ) -> None:
        self._native = native
        #: Brings payload into the memory that `native` reads, where it is not all there.
        self._remote = remote
        self._pool = ArenaPool()
        self._last_entries: tuple[int, Mapping[str, tuple[int, NativeEntry]]] | None = None
        self._header = header
        self.path = path

    def __enter__(self) -> Collection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._native.closed else f"{len(self.tasks)} tasks"
        return f"<Collection {self.path!r}: {state}>"

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._native.close()

    @property
    def _live(self) -> File:
        """The native handle, or an error that says that there is none any more."""
        if self._native.closed:
            raise RmmError("the collection is closed", path=self.path or None)
        return self._native

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the file (ascending)."""
        return tuple(self._live.task_names())

    @cached_property
    def index(self) -> Index:
        """The tables of the file, as the Python reader has them."""
        return read_index(self._live.buffer, self.path or None, self._header)

    @property
    def buffer(self) -> memoryview:
        """All bytes of the file, read-only.

        Raises
        ------
        RmmError
            The file is remote: not all of its bytes are here.
        """
        if self._remote is not None:
            raise RmmError(
                "a remote file has no buffer",
                path=self.path,
                hint="Only what tasks need is fetched; download the file to have it all.",
            )
        return self._live.buffer

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The metadata object (specification, section 9); empty where the file has none.

        Raises
        ------
        FormatError
            It breaks the rules of section 9.
        """
        return read_metadata(self.index) or {}

    @property
    def recovered(self) -> bool:
        """True if one of the two header slots is damaged, so that the other one was used."""
        return self._native.damaged_slot

    def targets(self, task: str) -> Mapping[str, TargetInfo]:
        """What a task adds, by target name, without its values."""
        entries, _ = self._native.entries(self._task(task), 1)
        return {entry.target: _info(entry) for entry in entries}

    def load(
        self,
        task: str,
        *,
        dtype: str | np.dtype[Any] | type[np.generic] = "f32",
        out: npt.NDArray[np.uint8] | None = None,
        threads: int = 0,
    ) -> LoadedTask:
        """Reconstruct every factor of a task natively.

        Parameters
        ----------
        task
            Name of the task.
        dtype
            ``"f32"``, ``"f16"`` or ``"bf16"`` (or the numpy dtype): what the factors come as.
        out
            Memory to reconstruct into: writable, contiguous uint8 of at least :meth:`arena_bytes`
            bytes, aligned to 64.  By default memory of the collection's own, which is used again
            once no view of it is left.
        threads
            How many to use; 0 chooses by the size of the task.

        Returns
        -------
        LoadedTask
            For each target A (rank, n_in), B (n_out, rank) and the scale, which is not folded in.

        Raises
        ------
        NotFoundError
            No such task.
        FormatError, UnsupportedError
            An array cannot be decoded.
        ShapeError
            `out` is too small, not aligned or not writable.

        Source: specification, section 8.
        """
        code, number = _factor_code(dtype), self._task(task)
        entries, n_bytes = self._native.entries(number, code)
        arena = self._pool.lend(n_bytes) if out is None else _checked(out, n_bytes)
        self._load(number, code, arena, threads)
        kind = layout.DTYPES[code]
        factors = {
            entry.target: Factors(
                _view(arena, entry.offset_a, (entry.rank, entry.n_in), kind),
                _view(arena, entry.offset_b, (entry.n_out, entry.rank), kind),
                entry.scale,
            )
            for entry in entries
        }
        return LoadedTask(task, arena, factors)

    def load_into(
        self, task: str, out: npt.NDArray[np.uint8], *, dtype: Any = "f32", threads: int = 0
    ) -> None:
        """Reconstruct a task where :meth:`load` would put it in `out`, without making views.

        For those who have views, of another task of the same shapes.  Raises as :meth:`load`.
        """
        self._load(self._task(task), _factor_code(dtype), _checked(out, 0), threads)

    def _load(self, number: int, code: int, out: npt.NDArray[np.uint8], threads: int) -> None:
        self._need(Index.payload_of, number)
        self._native.load_task(number, code, out, threads)

    def places(
        self, task: str, *, dtype: str | np.dtype[Any] = "f32"
    ) -> Mapping[str, tuple[int, int]]:
        """Where :meth:`load` puts A and B of each target: bytes from the start of the arena."""
        entries, _ = self._native.entries(self._task(task), _factor_code(dtype))
        return {entry.target: (entry.offset_a, entry.offset_b) for entry in entries}

    def arena_bytes(self, task: str, *, dtype: str | np.dtype[Any] = "f32") -> int:
        """Bytes of memory that :meth:`load` needs for a task."""
        return self._native.entries(self._task(task), _factor_code(dtype))[1]

    def load_factor(self, task: str, target: str, factor: str, out: Array) -> Array:
        """Reconstruct one factor into the caller's array.

        Parameters
        ----------
        factor
            ``"A"`` or ``"B"``.
        out
            (rank, n_in) for A, (n_out, rank) for B; float32, float16 or bfloat16, contiguous and
            writable.

        Raises
        ------
        NotFoundError, ShapeError, FormatError
            As :meth:`load`.
        """
        if factor not in ("A", "B"):
            raise ShapeError(f"a factor is 'A' or 'B', got {factor!r}")
        number = self._task(task)
        entries = self._entries(number)
        if target not in entries:
            raise NotFoundError(
                f"task {task!r} has no target {target!r}", hint=nearest(target, tuple(entries))
            )
        position, entry = entries[target]
        want = (entry.rank, entry.n_in) if factor == "A" else (entry.n_out, entry.rank)
        if out.shape != want or not out.flags.c_contiguous or not out.flags.writeable:
            raise ShapeError(
                f"factor {factor} of {target} wants a writable contiguous {want}, got {out.shape}"
            )
        code = _factor_code(out.dtype)
        self._need(Index.payload_of, number)
        raw = out.reshape(-1).view(np.uint8)
        self._native.load_factor(number, position, "AB".index(factor), code, raw)
        return out

    def _entries(self, number: int) -> Mapping[str, tuple[int, NativeEntry]]:
        """Number and description of each of a task's entries; the last task's are kept."""
        kept = self._last_entries  # callers take a task's targets one after the other
        if kept is None or kept[0] != number:
            entries, _ = self._native.entries(number, 1)
            by_name = {entry.target: (place, entry) for place, entry in enumerate(entries)}
            self._last_entries = kept = (number, by_name)
        return kept[1]

    def privates(self, task: str) -> Mapping[str, Array]:
        """Private tensors of a task by name: read-only views on the file."""
        views = {}
        number = self._task(task)
        self._need(Index.privates_of, number)
        for item in self._native.privates(number):
            raw = np.frombuffer(self._live.buffer, np.uint8, item.n_bytes, item.offset)
            views[item.name] = raw.view(layout.DTYPES[item.dtype]).reshape(item.shape)
        return views

    def source(self, task: str) -> StoredTask:
        """Give a task in the form that importers give, for exporters and for measuring."""
        return StoredTask(self, task)

    def validate(self) -> Report:
        """Check every rule of the specification over every byte; a remote file is downloaded."""
        if self._remote is not None:
            return self._remote.validate()
        return validate_bytes(self.buffer, header=self._header)

    def _need(self, extents: Callable[[Index, int], list[Extent]], task: int) -> None:
        """Have those extents of a task in memory."""
        if self._remote is not None:
            self._remote.bring(extents(self.index, task))

    def _task(self, name: str) -> int:
        try:
            return self._live.find_task(name)
        except NotFoundError:
            raise NotFoundError(
                f"no task is called {name!r}",
                path=self.path or None,
                hint=nearest(name, self.tasks),
            ) from None


def open_collection(
    source: str | os.PathLike[str] | bytes | memoryview,
    *,
    copy: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Collection:
    """Open an ``.rmm`` file: header and index are read and checked, payload is only mapped.

    Parameters
    ----------
    source
        A path, the bytes of a file (used in place, not copied), or a URL (``https://``, ``s3://``,
        ...: :mod:`rmmformat.remote`), of which only what is asked for is fetched.
    copy
        Read the file into memory instead of mapping it: for files that someone may cut short or
        overwrite while they are open, which a mapping cannot survive.  Of a URL that is so anyway.
    storage_options
        Of a URL: what fsspec wants to know to reach it (headers, credentials, ...).

    Raises
    ------
    FormatError
        The file breaks the specification; ``rule`` and ``offset`` say where.
    UnsupportedError
        The file needs a newer reader.
    OSError
        The file cannot be opened.
    RemoteError
        A URL cannot be read.

    Examples
    --------
    >>> with rmmformat.open("skills.rmm") as collection:  # doctest: +SKIP
    ...     task = collection.load("sst2")
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Collection(File.from_buffer(bytes(source) if copy else source), "")
    path = os.fspath(source)
    if is_url(path):
        from rmmformat.remote.file import open_remote

        return open_remote(path, storage_options)
    return while_growing(path, lambda: _read(path) if copy else _map(path))


def _read(path: str) -> Collection:
    # Header first: a change that comes in between only adds to what it describes.
    with Path(path).open("rb") as file:
        header = file.read(layout.HEADER_LENGTH)
        return Collection(File.from_buffer(header + file.read()), path)


def _map(path: str) -> Collection:
    while True:
        with Path(path).open("rb") as file:
            header = file.read(layout.HEADER_LENGTH)
        native = File.open(path)
        # The mapping shows what writers do to the header; what the native reader has seen is kept.
        if bytes(native.buffer[: layout.HEADER_LENGTH]) == header:
            return Collection(native, path, header)
        native.close()


def _factor_code(dtype: Any) -> int:
    if isinstance(dtype, str) and dtype in layout.FACTOR_DTYPES:
        return layout.FACTOR_DTYPES[dtype]
    try:
        code = layout.dtype_code(np.dtype(dtype))
    except TypeError:
        code = None
    if code not in layout.FACTOR_DTYPES.values():
        raise ShapeError(f"factors come as f32, f16 or bf16, not {dtype}")
    assert code is not None  # noqa: S101  # for the type checker: None is not among the values
    return code


def _checked(out: npt.NDArray[np.uint8], n_bytes: int) -> npt.NDArray[np.uint8]:
    good = (
        isinstance(out, np.ndarray)
        and out.dtype == np.uint8
        and out.ndim == 1
        and out.flags.c_contiguous
        and out.flags.writeable
        and out.nbytes >= n_bytes
        and out.ctypes.data % 64 == 0
    )
    if not good:
        raise ShapeError(
            f"out must be writable, contiguous, 64-byte aligned uint8 of at least {n_bytes} bytes"
        )
    return out


def _view(
    arena: npt.NDArray[np.uint8], offset: int, shape: tuple[int, int], dtype: np.dtype[Any]
) -> Array:
    n_bytes = shape[0] * shape[1] * dtype.itemsize
    # As a plain ndarray whose base is the arena: that is what returns the memory to the pool.
    view: Array = arena[offset : offset + n_bytes].view(np.ndarray).view(dtype).reshape(shape)
    return view


def _info(entry: NativeEntry) -> TargetInfo:
    shape = TargetShape(
        entry.n_in, entry.n_out, TargetKind(entry.kind), bool(entry.flags & 1), entry.kernel
    )
    return TargetInfo(
        shape,
        entry.rank,
        entry.scale,
        layout.DTYPES[entry.dtype_a],
        layout.DTYPES[entry.dtype_b],
    )
