"""What goes into a file, gathered and given its places: for a new file and for one that grows.

A merge goes target by target and a file is task by task, so what is added is spooled to an unnamed
temporary file first: memory stays bounded by one target, whatever the size of the collection, and
whatever the order in which targets arrive the bytes are the same.  :meth:`Assembly.plan` then knows
every offset and the whole index before a byte is written; :mod:`rmmformat.format.writer` puts the
plan into a new file, :mod:`rmmformat.format.growth` behind what a file has already.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from rmmformat.errors import UnsupportedError
from rmmformat.format import layout
from rmmformat.format.catalog import (
    Blob,
    Catalog,
    Entry,
    Extent,
    Form,
    Frame,
    Part,
    Private,
    TargetKey,
    Task,
    encode_sections,
    index_length,
)
from rmmformat.format.parts import EntryData, FramePart, catalog_part, check_name, pack
from rmmformat.format.pieces import Piece, Plan, Source, Spool
from rmmformat.model import Array, PrivateInfo

__all__ = ["Assembly", "extents_of"]

Self = TypeVar("Self", bound="Assembly")


class _Placer:
    """Gives places one behind the other (specification, section 7)."""

    def __init__(self, start: int) -> None:
        self.position = start
        self.pieces: list[tuple[int, Piece]] = []

    def reserve(self, length: int) -> int:
        offset = layout.ceil_to(self.position, layout.alignment(length))
        self.position = offset + length
        return offset

    def place(self, piece: Piece) -> Extent:
        if piece.length == 0:
            return Extent(0, 0, piece.crc)
        offset = self.reserve(piece.length)
        self.pieces.append((offset, piece))
        return Extent(offset, piece.length, piece.crc)


@dataclasses.dataclass
class _NewTask:
    entries: dict[TargetKey, tuple[Piece, Form, float]] = dataclasses.field(default_factory=dict)
    privates: dict[str, tuple[str, Private]] = dataclasses.field(default_factory=dict)


class Assembly:
    """The tasks of a file that is to be, those that stay where they are included.

    Parameters
    ----------
    folder
        Where what is added is spooled.
    kept
        What the file has already, and where; nothing for a new file.
    source
        The bytes of that file.
    """

    def __init__(
        self, folder: Path, kept: Catalog | None = None, source: Source | None = None
    ) -> None:
        self._kept = Catalog({}, {}, [], [], None) if kept is None else kept
        self._source = source
        self._tasks = dict(self._kept.tasks)
        self._spool = Spool(folder)
        self._frames: dict[TargetKey, list[tuple[Piece, Part | None, Part | None]]] = {}
        self._new: dict[str, _NewTask] = {}
        self._contents: dict[str, Piece] = {}
        self._kept_contents: dict[tuple[int, int], list[int]] = {}
        for number, blob in enumerate(self._kept.blobs):
            self._kept_contents.setdefault((blob.length, blob.crc), []).append(number)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget what was added; closing twice is fine."""
        self._spool.close()

    def add_task(self, name: str) -> None:
        """Make a task known; a task may be without targets."""
        check_name(name, "task")
        self._new.setdefault(name, _NewTask())

    def add_frame(self, target: TargetKey, a: FramePart | None, b: FramePart | None) -> int:
        """Add a shared part of a target; gives its cluster number for :class:`EntryData`."""
        arrays = tuple(
            array for part in (a, b) for array in ((part.mean, part.basis) if part else ())
        )
        frames = self._frames.setdefault(target, [])
        frames.append((self._spool.put(pack(arrays)), catalog_part(a), catalog_part(b)))
        return len(self._kept.frames.get(target, ())) + len(frames)

    def add_entry(self, task: str, target: TargetKey, data: EntryData) -> None:
        """Add what a task stores at a target."""
        check_name(target.name, "target")
        arrays = (data.coefficients_a, data.residual_a, data.coefficients_b, data.residual_b)
        ca, ra, cb, rb = (None if array is None else array.layout for array in arrays)
        dtypes = (data.dtype_a, data.dtype_b)
        form = Form(float(data.scale), data.rank, data.cluster, ca, ra, cb, rb, *dtypes)
        piece = self._spool.put(pack(arrays))
        self._new[task].entries[target] = (piece, form, float(data.error))

    def add_private(self, task: str, name: str, info: PrivateInfo, values: Array) -> None:
        """Add a private tensor; equal bytes are stored once.

        Raises
        ------
        UnsupportedError
            The format has no code for its dtype.
        """
        check_name(name, "private tensor")
        code = layout.dtype_code(info.dtype)
        if code is None:
            raise UnsupportedError(f"private tensor {name}: dtype {info.dtype} has no code")
        raw = np.ascontiguousarray(values).tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        if digest not in self._contents:
            self._contents[digest] = self._spool.put(raw)
        self._new[task].privates[name] = (digest, Private(int(info.role), code, info.shape, -1))

    def adopt(self, catalog: Catalog, source: Source) -> None:
        """Add all that another file has: as it is stored there, without a gap."""
        frames = {key: list(range(1, len(found) + 1)) for key, found in catalog.frames.items()}
        used = _used(catalog.tasks)
        for key, found in catalog.frames.items():
            for number, frame in enumerate(found, 1):
                if (key, number) in used:
                    new = self._frames.setdefault(key, [])
                    new.append((_piece(source, frame.extent), frame.a, frame.b))
                    frames[key][number - 1] = len(new)
        for name, task in catalog.tasks.items():
            new_task = self._new[name] = _NewTask()
            place = 0
            for key in sorted(task.entries, key=TargetKey.sort_key):
                entry, form = task.entries[key], task.entries[key].form
                if form.cluster:
                    form = dataclasses.replace(form, cluster=frames[key][form.cluster - 1])
                place = layout.ceil_to(place, layout.alignment(entry.length, 1))
                extent = Extent(task.offset + place, entry.length, entry.crc)
                new_task.entries[key] = (_piece(source, extent), form, entry.error)
                place += entry.length
            for private_name, private in task.privates.items():
                blob = catalog.blobs[private.blob]
                key_of = f"blob {private.blob}"
                self._contents[key_of] = Piece(source, blob.offset, blob.length, blob.crc)
                new_task.privates[private_name] = (key_of, private)

    @property
    def factor_bytes(self) -> int:
        """Bytes of all frames and entries added so far, without padding."""
        frames = (piece.length for group in self._frames.values() for piece, _, _ in group)
        entries = (p.length for task in self._new.values() for p, _, _ in task.entries.values())
        return sum(frames) + sum(entries)

    @property
    def private_bytes(self) -> int:
        """Bytes of all private tensors added so far, equal ones once."""
        return sum(piece.length for piece in self._contents.values())

    def plan(
        self,
        start: int,
        metadata: Mapping[str, Any] | None,
        free: Callable[[Catalog], list[Extent]] = lambda _catalog: [],
    ) -> Plan:
        """Give everything new its place, from `start` on.

        Parameters
        ----------
        start
            Offset of the first byte that may be written.
        metadata
            The metadata object.
        free
            From the new content (whose own list is empty) to the extents that nothing uses.

        Raises
        ------
        UnsupportedError
            A task would ask for more than the format allows in a file of this length.
        """
        placer = _Placer(start)
        frames, numbers = self._place_frames(placer)
        tasks: dict[str, Task] = {}
        blobs: list[Blob] = []
        ids: dict[Any, int] = {}
        for name in sorted(self._tasks.keys() | self._new.keys(), key=str.encode):
            if name not in self._new:
                tasks[name] = self._keep(self._tasks[name], numbers, blobs, ids)
                continue
            task = tasks[name] = self._place_run(placer, self._new[name], numbers)
            for private_name in sorted(self._new[name].privates, key=str.encode):
                content, private = self._new[name].privates[private_name]
                blob = self._place_content(placer, content, blobs, ids)
                task.privates[private_name] = dataclasses.replace(private, blob=blob)
        catalog = Catalog(tasks, frames, blobs, [], metadata)
        catalog.free = free(catalog)
        sections = encode_sections(catalog)
        index = placer.reserve(index_length(sections))
        _check_expansion(catalog, placer.position)
        return Plan(tuple(placer.pieces), catalog, sections, index, placer.position)

    def _place_frames(
        self, placer: _Placer
    ) -> tuple[dict[TargetKey, list[Frame]], dict[tuple[TargetKey, int], int]]:
        """Frames that some task uses, and their new numbers by their old ones."""
        new_forms = {
            name: {key: form for key, (_, form, _) in task.entries.items()}
            for name, task in self._new.items()
        }
        stay = {name: task for name, task in self._tasks.items() if name not in self._new}
        used = _used(stay) | {
            (key, form.cluster) for forms in new_forms.values() for key, form in forms.items()
        }
        frames: dict[TargetKey, list[Frame]] = {}
        numbers: dict[tuple[TargetKey, int], int] = {}
        keys = self._kept.frames.keys() | self._frames.keys()
        for key in sorted(keys, key=TargetKey.sort_key):
            kept, new = self._kept.frames.get(key, []), self._frames.get(key, [])
            for number in range(1, len(kept) + len(new) + 1):
                if (key, number) not in used:
                    continue
                if number <= len(kept):
                    frame = kept[number - 1]
                else:
                    piece, a, b = new[number - len(kept) - 1]
                    frame = Frame(placer.place(piece), a, b)
                frames.setdefault(key, []).append(frame)
                numbers[key, number] = len(frames[key])
        return frames, numbers

    def _keep(
        self,
        task: Task,
        numbers: Mapping[tuple[TargetKey, int], int],
        blobs: list[Blob],
        ids: dict[Any, int],
    ) -> Task:
        """Give a task that stays where it is the new numbers of what it refers to."""
        kept = Task(task.offset, task.length, {}, {})
        for key, entry in task.entries.items():
            form = _renumbered(entry.form, key, numbers)
            kept.entries[key] = dataclasses.replace(entry, form=form)
        for name in sorted(task.privates, key=str.encode):
            private = task.privates[name]
            blob = _intern(private.blob, lambda old: self._kept.blobs[old], blobs, ids)
            kept.privates[name] = dataclasses.replace(private, blob=blob)
        return kept

    def _place_run(
        self, placer: _Placer, task: _NewTask, numbers: Mapping[tuple[TargetKey, int], int]
    ) -> Task:
        order = sorted(task.entries, key=TargetKey.sort_key)
        places, length = [], 0
        for key in order:
            size = task.entries[key][0].length
            length = layout.ceil_to(length, layout.alignment(size, 1))
            places.append(length)
            length += size
        start = placer.reserve(length) if length else 0
        result = Task(start, length, {}, {})
        for key, place in zip(order, places, strict=True):
            piece, form, error = task.entries[key]
            if piece.length:
                placer.pieces.append((start + place, piece))
            form = _renumbered(form, key, numbers)
            result.entries[key] = Entry(form, piece.length, piece.crc, error)
        return result

    def _place_content(
        self, placer: _Placer, content: str, blobs: list[Blob], ids: dict[Any, int]
    ) -> int:
        """Id of a content: of an equal one that the file has, or of its own."""
        piece = self._contents[content]
        for number in self._kept_contents.get((piece.length, piece.crc), ()):
            if self._equal(self._kept.blobs[number], piece):
                return _intern(number, lambda old: self._kept.blobs[old], blobs, ids)

        def place(_content: Any) -> Blob:
            extent = placer.place(piece)
            return Blob(extent.offset, extent.length, extent.crc)

        return _intern(content, place, blobs, ids)

    def _equal(self, blob: Blob, piece: Piece) -> bool:
        assert self._source is not None  # there are kept blobs  # noqa: S101
        position = blob.offset
        for chunk in piece.chunks():
            if self._source.read(position, len(chunk)) != chunk:
                return False
            position += len(chunk)
        return True


def extents_of(catalog: Catalog) -> list[Extent]:
    """Extents of tasks, frames and blobs that have any bytes; the tasks' without a checksum."""
    frames = [frame.extent for group in catalog.frames.values() for frame in group]
    tasks = [Extent(task.offset, task.length, 0) for task in catalog.tasks.values()]
    blobs = [Extent(blob.offset, blob.length, blob.crc) for blob in catalog.blobs]
    return [extent for extent in (*frames, *tasks, *blobs) if extent.length]


def _piece(source: Source, extent: Extent) -> Piece:
    return Piece(source, extent.offset, extent.length, extent.crc)


def _used(tasks: Mapping[str, Task]) -> set[tuple[TargetKey, int]]:
    return {(key, e.form.cluster) for task in tasks.values() for key, e in task.entries.items()}


def _renumbered(form: Form, key: TargetKey, numbers: Mapping[tuple[TargetKey, int], int]) -> Form:
    cluster = numbers[key, form.cluster] if form.cluster else 0
    return form if cluster == form.cluster else dataclasses.replace(form, cluster=cluster)


def _intern(key: Any, make: Callable[[Any], Blob], blobs: list[Blob], ids: dict[Any, int]) -> int:
    if key not in ids:
        ids[key] = len(blobs)
        blobs.append(make(key))
    return ids[key]


def _check_expansion(catalog: Catalog, file_length: int) -> None:
    """RMM-062, RMM-063 and RMM-064: what a task may ask for in a file of this length."""
    for name, task in catalog.tasks.items():
        values = work = 0
        for key, entry in task.entries.items():
            form, sides = entry.form, (key.shape.n_in, key.shape.n_out)
            parts: tuple[Part | None, ...] = (None, None)
            if form.cluster:
                frame = catalog.frames[key][form.cluster - 1]
                parts = (frame.a, frame.b)
            for side, part in zip(sides, parts, strict=True):
                values += form.rank * side
                work += (1 + (part.n_components if part else 0)) * form.rank * side
        contents = sum(catalog.blobs[private.blob].length for private in task.privates.values())
        for what, amount, limit, rule in (
            ("values", values, layout.VALUES_PER_BYTE, "RMM-062"),
            ("products and sums to take", work, layout.TERMS_PER_BYTE, "RMM-063"),
            ("bytes of private tensors", contents, layout.PRIVATE_BYTES_PER_BYTE, "RMM-064"),
        ):
            if amount > limit * file_length:
                raise UnsupportedError(
                    f"task {name} would have {amount} {what} in a file of {file_length} bytes, "
                    f"the format allows {limit} a byte",
                    rule=rule,
                    hint="What is all zero or repeated is better left out of the collection.",
                )
