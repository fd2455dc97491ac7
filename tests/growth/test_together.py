"""Several writers, and readers while there is one."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat import _native
from rmmformat.errors import RmmError, TruncatedError
from rmmformat.format.disk import DISK, Disk
from rmmformat.format.growth import Growth, compact_file
from rmmformat.format.lock import LockedFile
from rmmformat.format.writer import Writer

from ..product.conftest import make_tasks
from .conftest import add, content, first_file, growing, loaded, put, remove, replace

READER = """
import sys, hashlib
import rmmformat as rmm
path, want = sys.argv[1], dict(pair.split("=") for pair in sys.argv[2].split(","))
done = False
n = 0
while not done:
    with rmm.open(path) as collection:
        names = set(collection.tasks)
        for name in names & want.keys():
            got = hashlib.sha256(collection.load(name, threads=1).arena.tobytes()).hexdigest()
            assert got == want[name], name
        collection.index
        done = "last" in names
        n += 1
print(n)
"""


def digests(path: Path) -> dict[str, str]:
    import hashlib

    with rmm.open(path) as collection:
        return {
            name: hashlib.sha256(collection.load(name).arena.tobytes()).hexdigest()
            for name in collection.tasks
        }


def named(name: str, seed: int):  # type: ignore[no-untyped-def]
    (task,) = make_tasks(1, rank=2, sides=((24, 40), (17, 9)), seed=seed)
    task.name = name
    return task


def grow_by(path: Path, name: str, seed: int) -> None:
    with growing(path) as (growth, metadata):
        put(growth, named(name, seed), metadata)
        growth.finish(metadata)


def shrink_by(path: Path, name: str) -> None:
    with growing(path) as (growth, metadata):
        growth.drop(name)
        del metadata["tasks"][name]
        growth.finish(metadata)


def test_a_second_writer_gets_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    told: list[str] = []
    with Growth(path):
        with pytest.raises(RmmError, match=r"another writer holds the file.*--wait") as caught:
            Growth(path, wait=0.2, notice=told.append)
        assert caught.value.path == str(path)
        with pytest.raises(RmmError, match="another writer"):
            compact_file(path, wait=0)
        assert content(path).keys() == {"task0", "task1", "task2"}  # readers take no lock
    assert len(told) == 1
    assert "waiting up to 0.2 s" in told[0]
    add(path)


def test_a_second_writer_waits_its_turn(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)

    def writer(number: int) -> None:
        with Growth(path, wait=60) as growth:
            metadata = dict(growth.catalog.metadata or {})
            metadata["tasks"] = dict(metadata["tasks"])
            put(growth, named(f"new{number}", number), metadata)
            growth.finish(metadata)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(writer, range(12)))
    assert content(path).keys() == {f"task{i}" for i in range(3)} | {f"new{i}" for i in range(12)}


def test_a_writer_that_waited_for_a_compaction_works_on_the_new_file(tmp_path: Path) -> None:
    """The lock that it waited for was on a file that is gone."""
    path = tmp_path / "x.rmm"
    first_file(path)
    remove(path)
    waiting = threading.Event()

    class Slow(Disk):
        def replace(self, source: Path, target: Path) -> None:
            waiting.set()
            time.sleep(0.3)
            super().replace(source, target)

        def sync_folder(self, folder: Path) -> None:
            # The name is there, but not yet for good: nobody may build on it.
            with pytest.raises(RmmError, match="another writer"):
                LockedFile(path, DISK, wait=0)
            super().sync_folder(folder)

    with ThreadPoolExecutor(2) as threads:
        compaction = threads.submit(compact_file, path, disk=Slow())
        waiting.wait()
        growth = threads.submit(grow_by_waiting, path)
        compaction.result()
        growth.result()
    assert content(path).keys() == {"task0", "task2", "late"}


def grow_by_waiting(path: Path) -> None:
    with Growth(path, wait=30) as growth:
        metadata = dict(growth.catalog.metadata or {})
        metadata["tasks"] = dict(metadata["tasks"])
        put(growth, named("late", 1), metadata)
        growth.finish(metadata)


def test_converting_anew_waits_for_a_writer_too(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    with Growth(path) as growth, Writer(path, overwrite=True) as writer:
        writer.add_task("t")
        thread = threading.Thread(target=writer.finish, args=({},))
        thread.start()
        time.sleep(0.2)
        assert thread.is_alive()
        growth.close()
        thread.join(30)
    with rmm.open(path) as collection:
        assert collection.tasks == ("t",)


def test_a_file_replaced_behind_the_lock_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    with growing(path) as (growth, metadata):
        (tmp_path / "other").write_bytes(path.read_bytes())
        (tmp_path / "other").replace(path)
        put(growth, named("lost", 1), metadata)
        with pytest.raises(RmmError, match="was replaced"):
            growth.finish(metadata)


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    with Growth(path):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    Growth(path, wait=0).close()
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "x.rmm", tmp_path / "link.rmm"
    first_file(path)
    path.chmod(0o640)
    link.symlink_to(path)
    remove(link)
    compact_file(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert content(link) == content(path)


def test_who_has_the_file_open_keeps_the_collection(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    old = loaded(path)
    native = _native.File.open(path)
    with rmm.open(path) as before:
        values = {name: before.load(name).arena.copy() for name in before.tasks}
        heads = {name: before.privates(name)["head"].copy() for name in before.tasks}
        add(path)
        replace(path)
        with rmm.open(path) as between:
            remove(path)
            compact_file(path)
            assert native.validate() == []
            for collection, names in ((before, 3), (between, 4)):
                assert len(collection.tasks) == names
                assert len(collection.index.task_names) == names  # read only now
                assert len(collection.metadata["tasks"]) == names
                assert collection.validate().ok
            for name in before.tasks:
                assert np.array_equal(before.load(name).arena, values[name])
                assert np.array_equal(before.privates(name)["head"], heads[name])
    assert loaded(path).keys() == {"task0", "task2", "task3"}
    assert loaded(path)["task2"] == old["task2"]


def resources() -> tuple[int, int]:
    with Path("/proc/self/maps").open() as file:
        maps = sum("x.rmm" in line for line in file)
    return len(list(Path("/proc/self/fd").iterdir())), maps


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts through /proc")
def test_readers_in_threads_and_processes_while_another_adds(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    first_file(path)
    want = digests(path)
    gc.collect()
    before = resources()
    told = ",".join(f"{name}={digest}" for name, digest in want.items())
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(path), told], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    stop = threading.Event()

    def read() -> int:
        import hashlib

        n = 0
        while not stop.is_set():
            with rmm.open(path) as collection:
                for name in want:
                    got = hashlib.sha256(collection.load(name, threads=1).arena.tobytes())
                    assert got.hexdigest() == want[name]
                assert len(collection.index.task_names) == len(collection.tasks)
            assert rmm.validate(path).ok
            n += 1
        return n

    with ThreadPoolExecutor(4) as threads:
        counts = [threads.submit(read) for _ in range(4)]
        time.sleep(1.5)  # the processes are up
        for number in range(25):
            grow_by(path, f"new{number}", number)
            if number % 3 == 2:
                shrink_by(path, f"new{number - 1}")
            if number % 10 == 9:
                compact_file(path)
        grow_by(path, "last", 99)
        stop.set()
        assert all(count.result() > 3 for count in counts)
    for reader in readers:
        output, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        assert int(output) > 0
    assert content(path).keys() >= {"last", "new0", *want}
    gc.collect()
    assert resources() == before


def test_a_file_cut_short_is_an_error_where_it_is_validated_first(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    data = first_file(path)
    with rmm.open(path, copy=True) as collection:
        values = collection.load("task1").arena.copy()
        os.truncate(path, 700)
        assert np.array_equal(collection.load("task1").arena, values)
        assert collection.validate().ok
        with pytest.raises(TruncatedError):
            rmm.open(path)
        with pytest.raises(TruncatedError):
            rmm.open(path, copy=True)
        assert [v.id for v in rmm.validate(path).violations] == ["RMM-013"]
    path.write_bytes(data)
    with rmm.open(path, copy=True) as collection:
        add(path)
        assert len(collection.index.task_names) == 3


def test_a_file_cut_short_while_it_is_validated(tmp_path: Path) -> None:
    from rmmformat.inspect import validate_path

    path = tmp_path / "x.rmm"
    first_file(path)

    def cut(_done: int, _total: int) -> None:
        os.truncate(path, 700)

    assert "RMM-013" in [v.id for v in validate_path(path, cut).violations]
