"""Threads and processes load from one open file while another process changes it."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import rmmformat as rmm

LONG = "RMM_TRUST" in os.environ
CHANGES = 60 if LONG else 6
ADAPTERS = Path(__file__).parents[1] / "data" / "demo-adapters"

WRITER = """
import sys
import rmmformat as rmm
path, adapters, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
for i in range(n):
    rmm.add(path, {f"new{i}": f"{adapters}/yelp"}, exact=True)
    if i % 2:
        rmm.remove(path, [f"new{i}"])
    if i % 5 == 4:
        rmm.compact(path)
"""


def resources() -> tuple[int, int]:
    """Open descriptors, and mappings of the file."""
    gc.collect()
    with Path("/proc/self/maps").open() as file:
        maps = sum("together.rmm" in line for line in file)
    return len(list(Path("/proc/self/fd").iterdir())), maps


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts through /proc")
def test_one_open_file_for_all(tmp_path: Path) -> None:
    path = tmp_path / "together.rmm"
    rmm.convert([ADAPTERS / name for name in ("bbc", "spam", "imdb")], path, max_error="30%")
    with rmm.open(path) as collection:
        want = {name: collection.load(name).arena.tobytes() for name in collection.tasks}
    before = resources()
    collection = rmm.open(path)
    names = collection.tasks
    wrong: list[str] = []
    counts = [0] * 6

    def load(number: int, stop: threading.Event) -> None:
        turn = number
        while not stop.is_set():
            name = names[turn % len(names)]
            task = collection.load(name, threads=1 + turn % 3)
            if task.arena.tobytes() != want[name]:
                wrong.append(name)
            counts[number] += 1
            turn += 1

    children = []
    for number in range(3):  # before there are threads
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                same = True
                for turn in range(20 * CHANGES):
                    name = names[(turn + number) % len(names)]
                    same = same and collection.load(name, threads=2).arena.tobytes() == want[name]
                code = 0 if same else 2
            os._exit(code)
        children.append(child)
    stop = threading.Event()
    threads = [threading.Thread(target=load, args=(i, stop)) for i in range(len(counts))]
    for thread in threads:
        thread.start()
    writer = [sys.executable, "-c", WRITER, str(path), str(ADAPTERS), str(CHANGES)]
    done = subprocess.run(writer, capture_output=True, text=True, check=False)
    stop.set()
    for thread in threads:
        thread.join()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert done.returncode == 0, done.stderr
    assert wrong == []
    assert codes == [0, 0, 0]
    assert all(counts)
    assert collection.tasks == names
    assert collection.validate().ok
    collection.close()
    with rmm.open(path) as grown:
        assert set(grown.tasks) == {*names, *(f"new{i}" for i in range(0, CHANGES, 2))}
        assert all(grown.load(name).arena.tobytes() == want[name] for name in names)
    assert resources() == before
    loads = sum(counts) + 3 * 20 * CHANGES
    sys.stdout.write(
        f"{loads} loads by 6 threads and 3 processes in {CHANGES} changes, all right\n"
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts through /proc")
def test_opening_again_and_again_leaks_nothing(tmp_path: Path) -> None:
    path, broken = tmp_path / "together.rmm", tmp_path / "broken-together.rmm"
    rmm.convert(ADAPTERS / "bbc", path, max_error="30%")
    broken.write_bytes(path.read_bytes()[:-9])
    before = resources()
    n = 2000 if LONG else 50
    for _ in range(n):
        with rmm.open(path) as collection:
            collection.load("bbc")
        rmm.open(path)  # left to the collector
        assert rmm.validate(path).ok
        assert not rmm.validate(broken).ok
        with pytest.raises(rmm.RmmError):
            rmm.open(broken)
    assert resources() == before
    sys.stdout.write(f"{5 * n} times opened: no descriptor and no mapping left\n")
