"""The logical content of an index, and its bytes.

A :class:`Catalog` is what a writer has once every extent has its place: :func:`encode_index` gives
the bytes of the index (specification, section 6), :func:`decode_catalog` reads them back.  The same
catalog gives the same bytes, whatever the order in which tasks and targets were added.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rmmformat.errors import UnsupportedError
from rmmformat.format import layout
from rmmformat.format.reader import Extent, Index
from rmmformat.model import TargetKind, TargetShape

__all__ = [
    "Blob",
    "Catalog",
    "EncodedSection",
    "Entry",
    "Extent",
    "Form",
    "Frame",
    "Layout",
    "Part",
    "Private",
    "TargetKey",
    "Task",
    "encode_index",
    "encode_metadata",
    "encode_sections",
    "index_length",
]

#: Runs of an array: pairs of encoding code and number of rows.
Layout = tuple[tuple[int, int], ...]


def n_rows(array: Layout) -> int:
    """Number of rows that a layout describes."""
    return sum(count for _, count in array)


@dataclasses.dataclass(frozen=True, order=True)
class TargetKey:
    """A target: its name, and its shape where tasks differ in it."""

    name: str
    shape: TargetShape

    def sort_key(self) -> tuple[Any, ...]:
        """Order of the targets in the file (RMM-035)."""
        shape = self.shape
        kernel = shape.kernel + (0,) * (3 - len(shape.kernel))
        flags = int(shape.transposed)
        return (self.name.encode(), shape.n_in, shape.n_out, int(shape.kind), flags, kernel)


@dataclasses.dataclass(frozen=True)
class Part:
    """One factor's side of a frame."""

    group: int
    n_components: int
    rank: int
    mean: Layout | None
    basis: Layout | None
    row_mixing: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
    """The shared part of one target for one cluster of tasks."""

    extent: Extent
    a: Part | None
    b: Part | None


@dataclasses.dataclass(frozen=True)
class Form:
    """What many entries have in common."""

    scale: float
    rank: int
    cluster: int
    coefficients_a: Layout | None
    residual_a: Layout | None
    coefficients_b: Layout | None
    residual_b: Layout | None
    dtype_a: int
    dtype_b: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one task stores at one target; `error` is NaN where not measured."""

    form: Form
    length: int
    crc: int
    error: float


@dataclasses.dataclass(frozen=True)
class Blob:
    """Where the bytes of a private tensor are, and their number."""

    offset: int
    length: int
    crc: int


@dataclasses.dataclass(frozen=True)
class Private:
    """A private tensor; `blob` indexes :attr:`Catalog.blobs`.

    The role is a number, so that one that this version does not know survives a change of the file.
    """

    role: int
    dtype: int
    shape: tuple[int, ...]
    blob: int


@dataclasses.dataclass
class Task:
    """One task: its run and what the run holds, by target."""

    offset: int
    length: int
    entries: dict[TargetKey, Entry]
    privates: dict[str, Private]


@dataclasses.dataclass
class Catalog:
    """Everything that an index says."""

    tasks: dict[str, Task]
    frames: dict[TargetKey, list[Frame]]
    blobs: list[Blob]
    free: list[Extent]
    metadata: Mapping[str, Any] | None


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Canonical JSON (section 9).

    Raises
    ------
    UnsupportedError
        It holds what the format cannot: NaN or infinity, half of a surrogate pair.
    """
    try:
        return json.dumps(
            metadata, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode()
    except ValueError as error:
        raise UnsupportedError(f"metadata cannot be stored: {error}", rule="RMM-090") from None


class _Interner:
    """Give equal things one id, in order of first use."""

    def __init__(self) -> None:
        self.ids: dict[Any, int] = {}

    def __call__(self, thing: Any) -> int:
        return layout.NONE if thing is None else self.ids.setdefault(thing, len(self.ids))


def _table(name: str, rows: Iterable[tuple[Any, ...]]) -> npt.NDArray[np.void]:
    return np.array(list(rows), dtype=layout.RECORDS[name])


@dataclasses.dataclass(frozen=True)
class EncodedSection:
    """One section of an index, before it has a place."""

    type: str
    coding: int
    raw: bytes
    count: int
    crc: int


def encode_sections(catalog: Catalog) -> list[EncodedSection]:
    """Sections of an index, without those that would be empty."""
    from rmmformat._native import crc32c  # the format can be read without the native module

    coded = [(name, 0, table.tobytes(), len(table)) for name, table in _tables(catalog).items()]
    if catalog.metadata is not None:
        raw = encode_metadata(catalog.metadata)
        coded.append(("meta", *_deflate(raw), len(raw)))
    return [EncodedSection(*section, crc32c(section[2])) for section in coded if section[3]]


def index_length(sections: list[EncodedSection]) -> int:
    """Bytes of the index that holds these sections."""
    length = len(sections) * layout.SECTION.itemsize
    for section in sections:
        length = layout.ceil_to(length, 8) + len(section.raw)
    return length


def encode_index(sections: list[EncodedSection], offset: int) -> tuple[bytes, int]:
    """Bytes of the index at `offset`, and the CRC32C of its section table."""
    from rmmformat._native import crc32c

    records = np.zeros(len(sections), layout.SECTION)
    body = bytearray()
    for record, section in zip(records, sections, strict=True):
        body += bytes(-len(body) % 8)
        record["type"], record["coding"] = section.type.encode(), section.coding
        record["offset"] = offset + records.nbytes + len(body)
        record["length"], record["count"] = len(section.raw), section.count
        record["record_size"] = layout.RECORDS[section.type].itemsize
        record["crc"] = section.crc
        body += section.raw
    head = records.tobytes()
    return head + bytes(body), crc32c(head)


def _deflate(raw: bytes) -> tuple[int, bytes]:
    """Coding and bytes: deflated where that is smaller and within the limit (RMM-026)."""
    small = zlib.compress(raw, 9)
    within = len(raw) <= layout.DEFLATE_RATIO * len(small) + layout.DEFLATE_FLOOR
    return (1, small) if within and len(small) < len(raw) else (0, raw)


def _tables(catalog: Catalog) -> dict[str, npt.NDArray[np.void]]:
    names = sorted(catalog.tasks, key=str.encode)
    keys = sorted(
        {key for task in catalog.tasks.values() for key in task.entries}, key=TargetKey.sort_key
    )
    target_ids = {key: i for i, key in enumerate(keys)}
    strings = sorted(
        {name.encode() for name in names}
        | {key.name.encode() for key in keys}
        | {name.encode() for task in catalog.tasks.values() for name in task.privates}
    )
    string_ids = {string: i for i, string in enumerate(strings)}
    layouts, forms = _Interner(), _Interner()

    def form_record(form: Form) -> tuple[Any, ...]:
        arrays = (form.coefficients_a, form.residual_a, form.coefficients_b, form.residual_b)
        ids = tuple(layouts(array) for array in arrays)
        dtypes = (form.dtype_a, form.dtype_b)
        return (form.scale, form.rank, form.cluster, *ids, *dtypes, (0,) * 6)

    def part_record(part: Part | None) -> tuple[int, ...]:
        if part is None:
            return (0, 0, 0, layout.NONE, layout.NONE, 0, 0)
        ids = (layouts(part.mean), layouts(part.basis))
        return (part.group, part.n_components, part.rank, *ids, int(part.row_mixing), 0)

    frames = [
        (f.extent.offset, f.extent.length, target_ids[key], f.extent.crc, part_record(f.a),
         part_record(f.b))
        for key in keys
        for f in catalog.frames.get(key, ())
    ]  # fmt: skip
    tasks, errors = [], []
    entries: list[tuple[int, int, int]] = []
    privates: list[tuple[int, ...]] = []
    dims: list[int] = []
    targets_of: list[int] = []
    first_of: dict[tuple[int, ...], int] = {}
    for name in names:
        task = catalog.tasks[name]
        own = sorted(task.entries, key=lambda key: target_ids[key])
        ids = tuple(target_ids[key] for key in own)
        if ids not in first_of:
            first_of[ids] = len(targets_of)
            targets_of.extend(ids)
        tasks.append(
            (task.offset, task.length, len(entries), len(own), first_of[ids], len(privates),
             len(task.privates), string_ids[name.encode()], 0)
        )  # fmt: skip
        for key in own:
            entry = task.entries[key]
            entries.append((entry.length, forms(entry.form), entry.crc))
            errors.append((entry.error,))
        for private_name in sorted(task.privates, key=str.encode):
            private = task.privates[private_name]
            privates.append(
                (string_ids[private_name.encode()], private.blob, private.dtype,
                 len(private.shape), int(private.role), 0, 0, len(dims))
            )  # fmt: skip
            dims.extend(private.shape)
    form_records = [form_record(form) for form in forms.ids]
    runs: list[tuple[int, int, tuple[int, int, int]]] = []
    layout_records = []
    for array in layouts.ids:
        layout_records.append((len(runs), len(array), n_rows(array)))
        runs.extend((count, code, (0, 0, 0)) for code, count in array)

    def target_record(key: TargetKey) -> tuple[Any, ...]:
        shape = key.shape
        kernel = shape.kernel + (0,) * (3 - len(shape.kernel))
        flags = int(shape.transposed)
        name_id = string_ids[key.name.encode()]
        return (shape.n_in, shape.n_out, kernel, int(shape.kind), flags, name_id, 0)

    measured = any(not np.isnan(error) for (error,) in errors)
    raw_strings = b"".join(string + b"\0" for string in strings)
    return {
        "STRS": np.frombuffer(raw_strings, layout.RECORDS["STRS"]),
        "TARG": _table("TARG", map(target_record, keys)),
        "RUNS": _table("RUNS", runs),
        "LAYO": _table("LAYO", layout_records),
        "FORM": _table("FORM", form_records),
        "FRAM": _table("FRAM", frames),
        "TLST": _table("TLST", ((i,) for i in targets_of)),
        "TASK": _table("TASK", tasks),
        "ENTR": _table("ENTR", entries),
        "DIMS": _table("DIMS", ((dim,) for dim in dims)),
        "PRIV": _table("PRIV", privates),
        "BLOB": _table("BLOB", ((b.offset, b.length, b.crc, 0) for b in catalog.blobs)),
        "erro": _table("erro", errors if measured else ()),
        "free": _table("free", ((e.offset, e.length, e.crc, 0) for e in catalog.free)),
    }


def decode_catalog(index: Index, metadata: Mapping[str, Any] | None) -> Catalog:
    """Read the logical content of an index whose rules have been checked.

    Parameters
    ----------
    index
        As :func:`~rmmformat.format.reader.read_index` gives it.
    metadata
        The metadata object, parsed; None where the file has none.
    """
    keys = [target_key(index, record) for record in index.table("TARG")]
    layouts = [tuple(index.layout_runs(i)) for i in range(len(index.table("LAYO")))]

    def at(number: int) -> Layout | None:
        return None if number == layout.NONE else layouts[number]

    def part(record: Any) -> Part | None:
        group, n_components, rank, mean, basis, flags, _ = record
        return Part(group, n_components, rank, at(mean), at(basis), bool(flags)) if rank else None

    frames: dict[TargetKey, list[Frame]] = {}
    for offset, length, target, crc, a, b in index.table("FRAM").tolist():
        frame = Frame(Extent(offset, length, crc), part(a), part(b))
        frames.setdefault(keys[target], []).append(frame)
    forms = [
        Form(scale, rank, cluster, at(ca), at(ra), at(cb), at(rb), *dtypes)
        for scale, rank, cluster, ca, ra, cb, rb, *dtypes, _ in index.table("FORM").tolist()
    ]
    entries, privates = index.table("ENTR").tolist(), index.table("PRIV").tolist()
    errors = index.table("erro")["error"].tolist() or [float("nan")] * len(entries)
    dims = index.table("DIMS")["dim"].tolist()
    blobs = [Blob(offset, length, crc) for offset, length, crc, _ in index.table("BLOB").tolist()]
    free = [Extent(offset, length, crc) for offset, length, crc, _ in index.table("free").tolist()]
    tasks: dict[str, Task] = {}
    for number, record in enumerate(index.table("TASK").tolist()):
        offset, length, first, _, _, first_private, n_privates, name, _ = record
        task = tasks[index.strings[name]] = Task(offset, length, {}, {})
        for i, target in enumerate(index.task_targets(number).tolist(), first):
            size, form, crc = entries[i]
            task.entries[keys[target]] = Entry(forms[form], size, crc, errors[i])
        for i in range(first_private, first_private + n_privates):
            name, blob, dtype, n_dims, role, _, _, dim = privates[i]
            shape = tuple(dims[dim : dim + n_dims])
            task.privates[index.strings[name]] = Private(role, dtype, shape, blob)
    return Catalog(tasks, frames, blobs, free, metadata)


def target_key(index: Index, record: Any) -> TargetKey:
    """Key of a record of the table TARG."""
    kernel = tuple(int(size) for size in record["kernel"] if size)
    shape = TargetShape(
        int(record["n_in"]),
        int(record["n_out"]),
        TargetKind(int(record["kind"])),
        bool(record["flags"] & 1),
        kernel,
    )
    return TargetKey(index.strings[record["name"]], shape)
