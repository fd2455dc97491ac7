"""Changes of a small collection, and what a reader may find of them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat import _native
from rmmformat.format.catalog import TargetKey
from rmmformat.format.disk import DISK, Disk
from rmmformat.format.growth import Growth, compact_file
from rmmformat.format.parts import EntryData
from rmmformat.format.validate import validate_bytes
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert
from rmmformat.rows import dtype_codes, exact_rows

from ..product.conftest import MemoryTask, make_tasks


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that is possible: these tests sync thousands of times."""
    shared = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


PUBLISHED = choose_method(components=1)
Content = dict[str, str]


def sources(n: int = 4, seed: int = 0) -> list[MemoryTask]:
    tasks = make_tasks(n, rank=2, sides=((90, 120), (17, 9)), seed=seed)
    for number, task in enumerate(tasks):
        privates = {"head": np.arange(40.0) + number, "shared": np.arange(30, dtype=np.int16)}
        task.__init__(task.name, task._factors, privates=privates)  # type: ignore[misc]
    return tasks


def first_file(path: Path, n: int = 3) -> bytes:
    convert(sources()[:n], path, PUBLISHED, overwrite=True)
    return path.read_bytes()


def content(data: bytes | Path) -> Content:
    """Task to a digest of all that a reader gets of it; the file must be valid."""
    raw = data if isinstance(data, bytes) else data.read_bytes()
    report = validate_bytes(raw)
    assert report.ok, report
    assert _native.validate_bytes(raw) == []
    return loaded(raw)


def loaded(raw: bytes | Path) -> Content:
    found = {}
    with rmm.open(raw) as collection:
        for name in collection.tasks:
            digest = hashlib.sha256()
            task = collection.load(name)
            for target in task:
                digest.update(target.encode() + task[target].A.tobytes() + task[target].B.tobytes())
            for key, value in sorted(collection.privates(name).items()):
                digest.update(key.encode() + value.tobytes())
            digest.update(repr(collection.metadata.get("tasks", {}).get(name)).encode())
            found[name] = digest.hexdigest()
    return found


def put(growth: Growth, task: MemoryTask, metadata: dict[str, Any]) -> None:
    """Add a task exactly; what the product does with more choice."""
    growth.add_task(task.name)
    for target, info in task.targets.items():
        factors = task.factors(target)
        entry = EntryData(
            factors.scale, factors.rank, 0, None, exact_rows(factors.A), None,
            exact_rows(factors.B.T), *dtype_codes(factors), error=0.0,
        )  # fmt: skip
        growth.add_entry(task.name, TargetKey(target, info.shape), entry)
    for name, info in task.privates.items():
        growth.add_private(task.name, name, info, task.private_tensor(name))
    metadata["tasks"][task.name] = {"factor_bytes": 1}


@contextlib.contextmanager
def growing(path: Path, disk: Disk = DISK) -> Iterator[tuple[Growth, dict[str, Any]]]:
    with Growth(path, disk=disk, wait=0) as growth:
        metadata = dict(growth.catalog.metadata or {})
        metadata["tasks"] = dict(metadata["tasks"])
        yield growth, metadata


def add(path: Path, disk: Disk = DISK) -> None:
    with growing(path, disk) as (growth, metadata):
        put(growth, sources()[3], metadata)
        growth.finish(metadata)


def remove(path: Path, disk: Disk = DISK) -> None:
    with growing(path, disk) as (growth, metadata):
        growth.drop("task1")
        del metadata["tasks"]["task1"]
        growth.finish(metadata)


def replace(path: Path, disk: Disk = DISK) -> None:
    with growing(path, disk) as (growth, metadata):
        growth.drop("task0")
        put(growth, sources(1, seed=9)[0], metadata)
        growth.finish(metadata)


def compact(path: Path, disk: Disk = DISK) -> None:
    compact_file(path, disk=disk, wait=0)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A change, and what happened to the file before it."""

    name: str
    change: Callable[[Path, Disk], None]
    before: Callable[[Path], object]


def _interrupted(path: Path) -> None:
    """Leave scratch behind that is longer than the next change."""
    first_file(path)
    with path.open("r+b") as file:
        slot = bytearray(file.read()[64:192])
        from rmmformat.format import layout

        record = np.frombuffer(bytes(slot), layout.SLOT)[0].copy()
        record["sequence"] += 1
        record["growth_limit"] += 50_000
        record["crc"] = _native.crc32c(record.tobytes()[:-4])
        file.seek(512)
        file.write(record.tobytes())
        file.seek(0, 2)
        file.write(b"\xa5" * 40_000)


def _grown(path: Path) -> None:
    first_file(path)
    add(path)


def _gapped(path: Path) -> None:
    first_file(path)
    remove(path)


SCENARIOS = [
    Scenario("add", add, first_file),
    Scenario("remove", remove, first_file),
    Scenario("replace", replace, first_file),
    Scenario("add after an interruption", add, _interrupted),
    Scenario("remove after an interruption", remove, _interrupted),
    Scenario("remove after add", remove, _grown),
    Scenario("add after remove", add, _gapped),
    Scenario("compact", compact, _gapped),
]
