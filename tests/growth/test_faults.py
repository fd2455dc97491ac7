"""Calls of the system that fail, processes killed in the middle of one, full disks."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat.errors import FormatError, RmmError
from rmmformat.format.disk import DISK, Disk
from rmmformat.format.growth import Growth, compact_file
from rmmformat.format.temporary import remove_stale

from ..product.conftest import MemoryTask
from .conftest import SCENARIOS, Scenario, add, content, first_file, growing, loaded, put, remove
from .crash import Recorder, Saboteur

ROOT = Path(__file__).parent


def prepared(
    scenario: Scenario, folder: Path
) -> tuple[Path, Path, dict[str, str], dict[str, str], int]:
    """Original file, place for copies, content before and after, number of calls."""
    original, path = folder / "original.rmm", folder / "x.rmm"
    scenario.before(original)
    old = content(original)
    shutil.copyfile(original, path)
    recorder = Recorder()
    scenario.change(path, recorder)
    calls = [op for op in recorder.ops if op.kind not in ("create", "remove")]
    return original, path, old, content(path), len(calls)


@pytest.mark.parametrize("how", ["before", "half", "after"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_a_call_that_fails_leaves_old_or_new(scenario: Scenario, how: str, tmp_path: Path) -> None:
    original, path, old, new, n_calls = prepared(scenario, tmp_path)
    for fault in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        for at in range(n_calls):
            shutil.copyfile(original, path)
            saboteur = Saboteur(at, how, fault)
            try:
                scenario.change(path, saboteur)
            except type(fault):
                pass
            else:
                assert how == "half"  # that call was not one that writes
            # Half a slot is damage that validators report and readers get over.
            assert (loaded if how == "half" else content)(path) in (old, new)
            assert {p.name for p in tmp_path.iterdir()} == {"original.rmm", "x.rmm"}
            # What is left is no obstacle to the next change.
            compact_file(path)
            assert content(path) in (old, new)


def test_an_error_before_the_last_step_gives_the_space_back(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    data = first_file(path)
    with pytest.raises(OSError, match="full"):
        add(path, Saboteur(2, "half", OSError(errno.ENOSPC, "full")))
    assert len(path.read_bytes()) == len(data)


@pytest.mark.parametrize("how", ["before", "half", "after"])
def test_a_process_killed_at_each_call_leaves_old_or_new(how: str, tmp_path: Path) -> None:
    """Each child does one change and kills itself (SIGKILL) at one call."""
    for scenario in SCENARIOS:
        folder = tmp_path / scenario.name.replace(" ", "-")
        folder.mkdir()
        original, _, old, new, n_calls = prepared(scenario, folder)
        for at in range(n_calls):
            copy = folder / f"{at}.rmm"
            shutil.copyfile(original, copy)
            child = os.fork()
            if child == 0:
                try:
                    scenario.change(copy, Saboteur(at, how))
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            assert (loaded if how == "half" else content)(copy) in (old, new)
            add_or_remove = remove if "task1" in rmm.open(copy).tasks else add
            add_or_remove(copy)
            content(copy)


def test_a_killed_compaction_leaves_the_file_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    remove(path)
    data = path.read_bytes()
    child = os.fork()
    if child == 0:
        try:
            compact_file(path, disk=Saboteur(2, "before"))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert path.read_bytes() == data
    compact_file(path, wait=0)
    assert content(path).keys() == {"task0", "task2"}


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one, of a few pages, where this may be mounted; else a limit on the file's size."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)],
        capture_output=True, check=False,
    ).returncode == 0  # fmt: skip
    try:
        path = small / "x.rmm"
        first_file(path)
        old = content(path)
        if mounted:
            fill(small / "ballast")
            with pytest.raises(OSError, match="No space"):
                big(path)
            with pytest.raises(OSError, match="No space"):
                compact_file(path)
        else:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4096, limit[1]))
            try:
                with pytest.raises(OSError, match="too large"):
                    big(path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert content(path) == old
        (small / "ballast").unlink(missing_ok=True)
        add(path)
        assert content(path).keys() == {*old, "task3"}
    finally:
        if mounted:
            subprocess.run(["umount", str(small)], check=True)


def fill(path: Path) -> None:
    """Take what room there is."""
    with path.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))


def big(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, 200_000, np.uint8)
    task = MemoryTask("big", {}, privates={"x": noise})
    with growing(path) as (growth, metadata):
        put(growth, task, metadata)
        growth.finish(metadata)


def test_a_file_size_limit(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "import rmmformat as rmm\n"
        "size = __import__('os').path.getsize(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700, size + 700))\n"
        "try:\n    rmm.add(sys.argv[1], sys.argv[2], exact=True)\n"
        "except OSError as error:\n    sys.exit(error.errno)\n"
    )
    adapter = ROOT.parent / "data" / "demo-adapters"
    path = tmp_path / "x.rmm"
    rmm.convert(adapter / "bbc", path, exact=True)
    old = content(path)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(adapter / "spam")], check=False
    )
    assert done.returncode == errno.EFBIG
    assert content(path) == old


class Liar(Disk):
    """A device that loses what it was given."""

    def write(self, handle: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        if len(data) > 128:
            data = bytes(len(data))
        super().write(handle, data, offset)


def test_what_was_not_written_is_not_put_in_force(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    old = content(path)
    with pytest.raises(RmmError, match="was not made"):
        add(path, Liar())
    assert content(path) == old


def test_damage_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    data = bytearray(first_file(path))
    with rmm.open(path) as collection:
        at = int(collection.index.table("TASK")["offset"][1]) + 3
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="checksum"):
        compact_file(path)
    assert path.read_bytes() == data
    # Leaving the damaged task out mends the file.
    remove(path)
    assert content(path).keys() == {"task0", "task2"}


def test_what_this_version_does_not_know_is_not_dropped(tmp_path: Path) -> None:
    from rmmformat import _native

    path = tmp_path / "x.rmm"
    data = bytearray(first_file(path))
    data[10] = 1  # a later minor version
    data[60:64] = _native.crc32c(bytes(data[:60])).to_bytes(4, "little")
    path.write_bytes(data)
    assert len(rmm.open(path).tasks) == 3
    with pytest.raises(RmmError, match=r"version is 1\.1"):
        Growth(path)


@pytest.mark.parametrize("data", [b"", b"x", b"PK\x03\x04" * 300], ids=["empty", "byte", "zip"])
def test_what_is_no_rmm_file_is_left_alone(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        Growth(path)
    assert path.read_bytes() == data
    with pytest.raises(OSError, match="directory"):
        Growth(tmp_path)
    with pytest.raises(FileNotFoundError):
        Growth(tmp_path / "none.rmm")


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.rmm.tmp"))


@pytest.mark.parametrize("change", [add, remove, compact_file, first_file])
def test_what_a_killed_writer_left_is_removed_by_the_next(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    child = os.fork()
    if child == 0:
        try:
            compact_file(path, disk=Saboteur(0, "half"))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = leftovers(tmp_path)
    shutil.copyfile(left, tmp_path / f".x.rmm.{'f' * 16}.rmm.tmp")
    other = tmp_path / ".other.rmm.0123456789abcdef.rmm.tmp"  # of another file: not ours to judge
    own = tmp_path / ".x.rmm.notes.rmm.tmp"
    link = tmp_path / ".x.rmm.0123456789abcdef.rmm.tmp"
    link.symlink_to(path)
    for file in (other, own):
        file.touch()
    change(path)
    assert leftovers(tmp_path) == sorted([other, own, link])
    assert path.stat().st_size > 0


def test_what_a_living_writer_writes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)

    class Slow(Disk):
        def replace(self, source: Path, target: Path) -> None:
            remove_stale(target, DISK)
            assert leftovers(tmp_path) == [source]
            super().replace(source, target)

    compact_file(path, disk=Slow())
    assert leftovers(tmp_path) == []
    content(path)


def test_a_file_taken_for_a_stale_one_before_it_is_locked_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)

    class Overtaken(Disk):
        n = 0

        def create(self, new: Path) -> int:
            handle = super().create(new)
            self.n += 1
            if self.n <= 2:
                remove_stale(path, DISK)
            return handle

    disk = Overtaken()
    compact_file(path, disk=disk)
    assert disk.n == 3
    assert leftovers(tmp_path) == []
    content(path)


def test_a_temporary_file_that_cannot_be_closed_keeps_no_lock(tmp_path: Path) -> None:
    """On a full disk closing fails, since it writes what is buffered."""
    path = tmp_path / "x.rmm"
    first_file(path)

    class Full(io.BytesIO):
        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with Growth(path) as growth:
        growth._spool._file = Full()
    Growth(path, wait=0).close()
