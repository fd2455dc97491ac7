"""What can be on a device after the power failed: every such state of a recorded change.

A recorder stands in for the operating system's calls and keeps what it was asked to do.  Until a
file is synced, any subset of what was written since the last sync may have reached the device, in
any order, sector by sector; a rename may or may not have.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from rmmformat.format.disk import Disk

SECTOR = 512


@dataclasses.dataclass(frozen=True)
class Op:
    kind: str  # "create", "write", "truncate", "sync", "replace", "remove", "sync folder"
    name: str = ""
    offset: int = 0
    data: bytes = b""
    target: str = ""


class Recorder(Disk):
    """Does everything, and writes it down."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._names: dict[int, str] = {}

    def open(self, path: Path) -> int:
        handle = super().open(path)
        self._names[handle] = path.name
        return handle

    def create(self, path: Path) -> int:
        handle = super().create(path)
        self._names[handle] = path.name
        self.ops.append(Op("create", path.name))
        return handle

    def write(self, handle: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        super().write(handle, data, offset)
        self.ops.append(Op("write", self._names[handle], offset, bytes(data)))

    def sync(self, handle: int) -> None:
        super().sync(handle)
        self.ops.append(Op("sync", self._names[handle]))

    def truncate(self, handle: int, length: int) -> None:
        super().truncate(handle, length)
        self.ops.append(Op("truncate", self._names[handle], length))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.ops.append(Op("replace", source.name, target=target.name))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.ops.append(Op("remove", path.name))

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self.ops.append(Op("sync folder"))


class Saboteur(Disk):
    """Fails, or ends the process, at the n-th call that changes something."""

    def __init__(self, at: int, how: str, fail: BaseException | None = None) -> None:
        self.at, self.how, self.fail, self.count = at, how, fail, 0

    def _now(self) -> bool:
        self.count += 1
        return self.count - 1 == self.at

    def _strike(self) -> None:
        if self.fail is not None:
            raise self.fail
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    def _call(self, name: str, *arguments: object) -> None:
        now = self._now()
        if now and self.how == "before":
            self._strike()
        getattr(super(), name)(*arguments)
        if now:
            self._strike()

    def write(self, handle: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        if self.how == "half" and self.count == self.at:
            super().write(handle, memoryview(data)[: len(data) // 2], offset)
            self._strike()
        self._call("write", handle, data, offset)

    def sync(self, handle: int) -> None:
        self._call("sync", handle)

    def truncate(self, handle: int, length: int) -> None:
        self._call("truncate", handle, length)

    def replace(self, source: Path, target: Path) -> None:
        self._call("replace", source, target)

    def sync_folder(self, folder: Path) -> None:
        self._call("sync_folder", folder)


def units(op: Op) -> list[Op]:
    """What of an operation can happen without the rest: its sectors."""
    if op.kind != "write":
        return [op]
    found, position = [], 0
    while position < len(op.data):
        room = SECTOR - (op.offset + position) % SECTOR
        part = op.data[position : position + room]
        found.append(Op("write", op.name, op.offset + position, part))
        position += len(part)
    return found


def apply(data: bytes, ops: list[Op]) -> bytes:
    """Contents of a file after some of what was asked for."""
    out = bytearray(data)
    for op in ops:
        end = op.offset + len(op.data)
        if op.kind == "truncate":
            out = out[: op.offset] + bytes(max(0, op.offset - len(out)))
        else:
            out += bytes(max(0, end - len(out)))
            out[op.offset : end] = op.data
    return bytes(out)


def subsets(pending: list[Op], random_subsets: int, rng: random.Random) -> Iterator[list[Op]]:
    """Subsets of what is not synced: every prefix, every single loss, and random ones."""
    for n in range(len(pending) + 1):
        yield pending[:n]
    for i in range(len(pending)):
        yield pending[:i] + pending[i + 1 :]
        yield [pending[i]]
    for _ in range(random_subsets):
        share = rng.random()
        yield [op for op in pending if rng.random() < share]


def states(
    ops: list[Op], before: dict[str, bytes], *, random_subsets: int = 30, seed: int = 0
) -> Iterator[dict[str, bytes]]:
    """Folders that a power failure can leave: before, between and after all operations."""
    rng = random.Random(seed)  # noqa: S311  # repeatable, not secret
    files = dict(enumerate(before.values()))
    names = {name: i for i, name in enumerate(before)}
    at_handle = dict(names)  # a handle keeps its file when the name goes to another
    durable_names = dict(names)
    pending: dict[int, list[Op]] = {i: [] for i in files}
    seen: set[int] = set()
    for op in [*ops, None]:
        choices = [
            [apply(files[i], chosen) for chosen in subsets(pending[i], random_subsets, rng)]
            if pending[i]
            else [files[i]]
            for i in files
        ]
        for folder in (durable_names, names):
            for contents in itertools.product(*choices):
                state = {name: contents[i] for name, i in folder.items()}
                key = hash(tuple(sorted(state.items())))
                if key not in seen:
                    seen.add(key)
                    yield state
        if op is None:
            return
        if op.kind == "create":
            number = len(files)
            files[number], pending[number] = b"", []
            names[op.name] = at_handle[op.name] = number
        elif op.kind in ("write", "truncate"):
            pending[at_handle[op.name]] += units(op)
        elif op.kind == "sync":
            number = at_handle[op.name]
            files[number] = apply(files[number], pending[number])
            pending[number] = []
        elif op.kind == "replace":
            names[op.target] = names.pop(op.name)
        elif op.kind == "remove":
            names.pop(op.name, None)
        elif op.kind == "sync folder":
            durable_names = dict(names)
