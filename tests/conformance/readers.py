"""Readers under test, behind one small protocol; another reader joins as one more adapter.

An adapter translates: it opens bytes, loads a task into `TaskValues`, validates, and turns its
reader's refusals into `Refusal`.  Any other exception is a fault of the reader and fails the test.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Refusal(Exception):  # noqa: N818
    """A reader's answer to a broken or unsupported file."""

    def __init__(self, rule: str | None, offset: int | None, status: str) -> None:
        super().__init__(f"{rule} at {offset} ({status})")
        self.rule, self.offset, self.status = rule, offset, status


@dataclass(frozen=True)
class EntryValues:
    """One entry of a task; A is (rank, n_in) and B (n_out, rank), float32."""

    target: str
    n_in: int
    n_out: int
    kind: int
    transposed: bool
    kernel: tuple[int, ...]
    rank: int
    scale: float
    dtypes: tuple[int, int]
    A: npt.NDArray[np.float32]
    B: npt.NDArray[np.float32]


@dataclass(frozen=True)
class PrivateValue:
    """One private tensor: registry codes, shape, bytes."""

    name: str
    dtype: int
    role: int
    shape: tuple[int, ...]
    content: bytes


@dataclass(frozen=True)
class TaskValues:
    """What a task holds, in the order of the file."""

    entries: list[EntryValues]
    privates: list[PrivateValue]


class Reader(Protocol):
    """A reader and validator; `opened` is whatever its `open` returns."""

    name: str
    #: Gives the very offset of the manifest, not just one within the ranges that it allows.
    exact: bool

    def open(self, data: bytes) -> Any:
        """Return an open file, or raise `Refusal`."""

    def tasks(self, opened: Any) -> list[str]:
        """Return the names of the tasks, in the order of the file."""

    def load(self, opened: Any, task: str) -> TaskValues:
        """Return the values of a task, or raise `Refusal`."""

    def metadata(self, opened: Any) -> Any:
        """Return the parsed metadata, None where there is none, Ellipsis if this is not read."""

    def validate(self, data: bytes) -> list[tuple[str, int]]:
        """Return rule and offset of what is broken."""


class ReferenceReader:
    """`spec/reference.py`."""

    name = "reference"
    exact = True

    def __init__(self) -> None:
        self._module = importlib.import_module("reference")

    def _refusal(self, fault: Any) -> Refusal:
        return Refusal(fault.rule, fault.offset, fault.status)

    def open(self, data: bytes) -> Any:
        try:
            return self._module.open_file(data)
        except self._module.Refused as fault:
            raise self._refusal(fault) from fault

    def tasks(self, opened: Any) -> list[str]:
        return list(opened.tasks)

    def load(self, opened: Any, task: str) -> TaskValues:
        try:
            factors = opened.load(task)
        except self._module.Refused as fault:
            raise self._refusal(fault) from fault
        entries = []
        for m in opened.tasks[task]:
            name, t, f = opened.names[m.target.name], m.target, m.form
            kernel = tuple(size for size in (t.k0, t.k1, t.k2) if size)
            A, B, scale = factors[name]
            dtypes = (f.dtype_a, f.dtype_b)
            entries.append(
                EntryValues(
                    name, t.n_in, t.n_out, t.kind, bool(t.flags & 1), kernel, f.rank, scale,
                    dtypes, A, B,
                )
            )  # fmt: skip
        privates = [PrivateValue(name, *rest) for name, rest in opened.privates(task).items()]
        return TaskValues(entries, privates)

    def metadata(self, opened: Any) -> Any:
        return opened.metadata()

    def validate(self, data: bytes) -> list[tuple[str, int]]:
        return [(rule, offset) for rule, offset, _ in self._module.validate(data)]


class NativeReader:
    """The compiled core, `rmmformat._native`; it does not read metadata."""

    name = "native"
    exact = False
    _F32 = 1

    def __init__(self) -> None:
        self._native = importlib.import_module("rmmformat._native")
        self._errors = importlib.import_module("rmmformat.errors")

    def _refusal(self, error: Any) -> Refusal:
        unsupported = isinstance(error, self._errors.UnsupportedError)
        return Refusal(error.rule, error.offset, "unsupported" if unsupported else "malformed")

    def _refusals(self) -> tuple[type[Exception], ...]:
        return (self._errors.FormatError, self._errors.UnsupportedError)

    def open(self, data: bytes) -> Any:
        try:
            return self._native.File.from_buffer(data)
        except self._refusals() as error:
            raise self._refusal(error) from error

    def tasks(self, opened: Any) -> list[str]:
        return list(opened.task_names())

    def load(self, opened: Any, task: str) -> TaskValues:
        number = opened.find_task(task)
        try:
            described, n_bytes = opened.entries(number, self._F32)
            arena = np.zeros(n_bytes, np.uint8)
            opened.load_task(number, self._F32, arena)
        except self._refusals() as error:
            raise self._refusal(error) from error

        def factor(offset: int, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
            n = shape[0] * shape[1]
            return arena[offset : offset + 4 * n].view(np.float32).reshape(shape)

        entries = [
            EntryValues(
                e.target, e.n_in, e.n_out, e.kind, bool(e.flags & 1), tuple(e.kernel), e.rank,
                e.scale, (e.dtype_a, e.dtype_b), factor(e.offset_a, (e.rank, e.n_in)),
                factor(e.offset_b, (e.n_out, e.rank)),
            )
            for e in described
        ]  # fmt: skip
        whole = opened.buffer
        privates = [
            PrivateValue(
                p.name,
                p.dtype,
                p.role,
                tuple(p.shape),
                bytes(whole[p.offset : p.offset + p.n_bytes]),
            )
            for p in opened.privates(number)
        ]
        return TaskValues(entries, privates)

    def metadata(self, opened: Any) -> Any:
        return ...

    def validate(self, data: bytes) -> list[tuple[str, int]]:
        return [(f"RMM-{v.rule:03d}", v.offset) for v in self._native.validate_bytes(data)]


class PythonReader:
    """The Python reader, `rmmformat.format`."""

    name = "python"
    exact = False

    def __init__(self) -> None:
        self._reader = importlib.import_module("rmmformat.format.reader")
        self._restore = importlib.import_module("rmmformat.format.restore")
        self._checks = importlib.import_module("rmmformat.format.validate")
        self._errors = importlib.import_module("rmmformat.errors")

    def _refusal(self, error: Any) -> Refusal:
        unsupported = isinstance(error, self._errors.UnsupportedError)
        return Refusal(error.rule, error.offset, "unsupported" if unsupported else "malformed")

    def _refusals(self) -> tuple[type[Exception], ...]:
        return (self._errors.FormatError, self._errors.UnsupportedError)

    def open(self, data: bytes) -> Any:
        try:
            return self._reader.read_index(data)
        except self._refusals() as error:
            raise self._refusal(error) from error

    def tasks(self, opened: Any) -> list[str]:
        return list(opened.task_names)

    def load(self, opened: Any, task: str) -> TaskValues:
        number = opened.find_task(task)
        record = opened.table("TASK")[number]
        entries = []
        for position, target_id in enumerate(opened.task_targets(number)):
            entry = opened.table("ENTR")[int(record["first_entry"]) + position]
            form, target = opened.table("FORM")[entry["form"]], opened.table("TARG")[target_id]
            try:
                A, B = self._restore.entry_factors(opened, number, position)
            except self._refusals() as error:
                raise self._refusal(error) from error
            entries.append(
                EntryValues(
                    opened.target_names[target_id], int(target["n_in"]), int(target["n_out"]),
                    int(target["kind"]), bool(target["flags"] & 1),
                    tuple(int(size) for size in target["kernel"] if size), int(form["rank"]),
                    float(form["scale"]), (int(form["dtype_a"]), int(form["dtype_b"])), A, B,
                )
            )  # fmt: skip
        first, count = int(record["first_private"]), int(record["n_privates"])
        privates = []
        for item in opened.table("PRIV")[first : first + count]:
            dims = opened.table("DIMS")["dim"]
            shape = tuple(
                int(dim)
                for dim in dims[int(item["first_dim"]) : int(item["first_dim"] + item["n_dims"])]
            )
            blob = opened.table("BLOB")[item["blob"]]
            start = int(blob["offset"])
            content = bytes(opened.data[start : start + int(blob["length"])])
            name = opened.strings[item["name"]]
            privates.append(
                PrivateValue(name, int(item["dtype"]), int(item["role"]), shape, content)
            )
        return TaskValues(entries, privates)

    def metadata(self, opened: Any) -> Any:
        raw = opened.section_bytes("meta")
        return None if raw is None else self._checks.parse_metadata(raw)

    def validate(self, data: bytes) -> list[tuple[str, int]]:
        return [(v.id, v.offset) for v in self._checks.validate_bytes(data).violations]


#: Classes of adapters; one whose reader cannot be imported is skipped, with the reason.
ADAPTERS: tuple[type[Any], ...] = (ReferenceReader, PythonReader, NativeReader)
#: Rules that need a JSON parser, which these readers do without.
WITHOUT_METADATA = {"native"}
