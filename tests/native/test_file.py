"""The Python face of an open file: contents, lifetimes, arguments, threads."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native_build as build
import numpy as np
import pytest

from rmmformat import _native, errors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "täsks.rmm"
    file.write_bytes(build.rich(0).build())
    return file


def test_contents(path: Path) -> None:
    collection = build.rich(0)
    with_names = [task.name for task in collection.tasks]
    file = _native.File.open(str(path))
    assert file.task_names() == with_names
    assert (file.n_tasks, file.n_targets) == (5, 9)
    assert not file.damaged_slot
    assert file.file_length == path.stat().st_size
    for number, task in enumerate(collection.tasks):
        assert file.find_task(task.name) == number
        entries, _ = file.entries(number, 1)
        assert len(entries) == len(task.entries)
        for entry, want in zip(entries, task.entries, strict=True):
            target = collection.targets[want.target]
            assert entry[:10] == (
                target.name,
                target.n_in,
                target.n_out,
                target.kind,
                target.flags,
                target.kernel,
                want.rank,
                want.scale,
                *want.dtypes,
            )
        privates = file.privates(number)
        assert [p.name for p in privates] == sorted((p.name for p in task.privates), key=str.encode)
        by_name = {p.name: p for p in task.privates}
        for private in privates:
            want = by_name[private.name]
            assert (private.dtype, private.role, private.shape) == (
                want.dtype,
                want.role,
                want.shape,
            )
            assert (
                bytes(file.buffer[private.offset : private.offset + private.n_bytes]) == want.data
            )
        file.check_task(number)
    assert file.validate() == []


def test_the_arena_holds_nothing_twice(path: Path) -> None:
    file = _native.File.open(str(path))
    for dtype, size in ((1, 4), (2, 2), (3, 2)):
        entries, n_bytes = file.entries(0, dtype)
        end = 0
        for entry in entries:
            for offset, n in ((entry.offset_a, entry.n_in), (entry.offset_b, entry.n_out)):
                assert offset == -(-end // 64) * 64
                end = offset + n * entry.rank * size
        assert n_bytes == -(-end // 64) * 64


def test_names_that_are_not_there(path: Path) -> None:
    file = _native.File.open(str(path))
    for name in ("", "alph", "alphaa", "alpha\0", "zzz", "a" * 5000):
        with pytest.raises(errors.NotFoundError) as caught:
            file.find_task(name)
        assert caught.value.path == str(path)
    for call in (
        lambda: file.entries(5, 1),
        lambda: file.privates(2**63),
        lambda: file.check_task(5),
    ):
        with pytest.raises(errors.NotFoundError):
            call()
    with pytest.raises(errors.NotFoundError):
        file.load_factor(0, 99, 0, 1, bytearray(10))


def test_arguments(path: Path) -> None:
    file = _native.File.open(str(path))
    _, size = file.entries(0, 1)
    with pytest.raises(ValueError, match="needs"):
        file.load_task(0, 1, bytearray(size - 1))
    with pytest.raises((BufferError, ValueError)):
        file.load_task(0, 1, bytes(size))
    with pytest.raises((BufferError, ValueError)):
        file.load_task(0, 1, np.zeros(2 * size, np.uint8)[::2])
    for dtype in (0, 4, -1):
        with pytest.raises(ValueError, match="dtype"):
            file.entries(0, dtype)
    with pytest.raises(ValueError, match="factor"):
        file.load_factor(0, 0, 2, 1, bytearray(size))
    with pytest.raises(TypeError):
        file.load_task(-1, 1, bytearray(size))


def test_errors_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _native.File.open(str(tmp_path / "none.rmm"))
    assert caught.value.filename == str(tmp_path / "none.rmm")
    with pytest.raises(IsADirectoryError):
        _native.File.open(str(tmp_path))
    with pytest.raises(ValueError, match="null"):
        _native.File.open("a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="pipe"):
            _native.File.open(str(tmp_path / "pipe"))
    (tmp_path / "empty").touch()
    with pytest.raises(errors.LayoutError) as caught:
        _native.File.open(str(tmp_path / "empty"))
    assert (caught.value.rule, caught.value.path) == ("RMM-001", str(tmp_path / "empty"))


def test_closing(path: Path) -> None:
    file = _native.File.open(str(path))
    view = file.buffer
    kept = bytes(view)
    file.close()
    file.close()
    assert file.closed
    for call in (
        file.task_names,
        file.validate,
        lambda: file.n_tasks,
        lambda: file.buffer,
        lambda: file.entries(0, 1),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    file = None
    gc.collect()
    assert file is None
    assert bytes(view) == kept == path.read_bytes()
    assert view.readonly
    assert np.frombuffer(view, np.uint8)[:4].tobytes() == b"\x89RMM"


def test_a_view_outlives_the_file_in_memory() -> None:
    class Source(bytearray):
        pass

    data = Source(build.tiny().build())
    gone = weakref.ref(data)
    file = _native.File.from_buffer(data)
    with pytest.raises(BufferError):
        data.append(0)  # a lent bytearray must not move
    view = file.buffer
    del data
    file.close()
    gc.collect()
    assert gone() is not None
    assert bytes(view[:4]) == b"\x89RMM"
    view.release()
    del view
    gc.collect()
    assert gone() is None


def test_no_descriptor_is_kept(path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc here")
    before = len(list(Path("/proc/self/fd").iterdir()))
    files = [_native.File.open(str(path)) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(files) == 20


def test_many_threads_on_one_file(path: Path) -> None:
    file = _native.File.open(str(path))

    def load(task: int) -> bytes:
        arena = bytearray(file.entries(task, 1)[1])
        file.load_task(task, 1, arena, 2)
        return bytes(arena)

    want = [load(task) for task in range(file.n_tasks)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for task, got in zip([*range(5)] * 4, pool.map(load, [*range(5)] * 4), strict=True):
                assert got == want[task]


def test_closing_while_loading() -> None:
    rng = np.random.default_rng(0)
    n = 200_000
    own = build.Factor(None, build.rows(rng, 8, n, (2, 0x16)))
    data = build.Collection(
        [build.Target("t", n, n)], [], [build.Task("x", [build.Entry(0, 8, own, own)])]
    ).build()
    want = None
    for _ in range(10):
        file = _native.File.from_buffer(data)
        arena = bytearray(file.entries(0, 1)[1])
        started = threading.Event()

        def work(
            file: _native.File = file, arena: bytearray = arena, started: threading.Event = started
        ) -> None:
            started.set()
            file.load_task(0, 1, arena, 2)

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        try:
            file.close()
        finally:
            thread.join()
        if any(arena):  # close() may have come first
            want = want or bytes(arena)
            assert bytes(arena) == want


def test_opening_costs_the_index_alone(tmp_path: Path) -> None:
    import time

    path = tmp_path / "large.rmm"
    path.write_bytes(build.large(1000, 224))
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        file = _native.File.open(str(path))
        best = min(best, time.perf_counter() - start)
        file.close()
    assert best < 0.05  # about 1.5 ms on an idle machine
