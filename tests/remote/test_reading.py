"""A file behind a URL: what is fetched, how often, and that it is the same as the local file."""

from __future__ import annotations

import os
import resource
import tempfile
import threading
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

import rmmformat as rmm
from rmmformat._native import crc32c
from rmmformat.collection import Collection
from rmmformat.errors import NotFoundError, RmmError
from rmmformat.format import layout
from rmmformat.format.reader import Index
from rmmformat.grow import add
from rmmformat.remote.ranges import GAP, Request, coalesce

from ..product.conftest import make_tasks
from .server import Handler, Server
from .server import Request as Sent


def equal(got: rmm.LoadedTask, want: rmm.LoadedTask) -> bool:
    return list(got) == list(want) and all(
        np.array_equal(got[key].A, want[key].A)
        and np.array_equal(got[key].B, want[key].B)
        and got[key].scale == want[key].scale
        for key in want
    )


def serve(server: Server, path: Path) -> str:
    server.files["models/x.rmm"] = path.read_bytes()
    return server.url("models/x.rmm")


def test_opening_fetches_header_and_index(server: Server, shared_file: Path) -> None:
    url = serve(server, shared_file)
    with rmm.open(url) as remote, rmm.open(shared_file) as local:
        active = local.index.active
        start, length = int(active["index_offset"]), int(active["index_length"])
        assert server.ranges == [(0, layout.HEADER_LENGTH), (start, start + length)]
        assert server.n_bytes == layout.HEADER_LENGTH + length
        assert remote.tasks == local.tasks
        assert remote.metadata == local.metadata
        assert remote.path == url
        assert dict(remote.targets("task3")) == dict(local.targets("task3"))
        assert len(server.requests) == 2  # none of that asks for more


def test_a_task_is_its_frames_and_its_run(server: Server, shared_file: Path) -> None:
    url = serve(server, shared_file)
    with rmm.open(url) as remote, rmm.open(shared_file) as local:
        index = local.index
        before = server.n_bytes
        assert equal(remote.load("task5"), local.load("task5"))
        frames = int(index.table("FRAM")["length"].sum())
        runs = {
            name: int(index.table("TASK")[i]["length"]) for i, name in enumerate(index.task_names)
        }
        sent = server.n_bytes - before
        assert frames + runs["task5"] <= sent <= frames + runs["task5"] + GAP
        assert len(server.requests) - 2 <= 2
        # Frames are there now: the next task costs its run alone.
        before, asked = server.n_bytes, len(server.requests)
        assert equal(remote.load("task8"), local.load("task8"))
        assert server.n_bytes - before == runs["task8"]
        assert len(server.requests) - asked == 1
        # And what was loaded costs nothing.
        asked = len(server.requests)
        assert equal(remote.load("task5"), local.load("task5"))
        assert len(server.requests) == asked
        assert server.n_bytes < shared_file.stat().st_size / 2


def test_factors_and_privates_come_in_few_requests(server: Server, shared_file: Path) -> None:
    url = serve(server, shared_file)
    with rmm.open(url) as remote, rmm.open(shared_file) as local:
        source, want = remote.source("task2"), local.source("task2")
        for target in want.targets:
            assert np.array_equal(source.factors(target).A, want.factors(target).A)
            assert np.array_equal(source.factors(target).B, want.factors(target).B)
        assert len(server.requests) - 2 <= 2
        asked = len(server.requests)
        assert np.array_equal(source.private_tensor("head"), want.private_tensor("head"))
        assert len(server.requests) - asked == 1


def test_real_adapters(server: Server, demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.rmm"
    rmm.convert(demo_adapters, path, max_error=0.05)
    url = serve(server, path)
    with rmm.open(url) as remote, rmm.open(path) as local:
        for task in local.tasks:
            assert equal(remote.load(task), local.load(task))
            assert equal(remote.load(task, dtype="f16"), local.load(task, dtype="f16"))
    assert len(server.requests) <= 2 + 2 * len(local.tasks)
    assert server.n_bytes <= path.stat().st_size


@pytest.mark.parametrize("threads", [8])
def test_loads_at_once_fetch_once(server: Server, shared_file: Path, threads: int) -> None:
    url = serve(server, shared_file)
    wait = threading.Barrier(threads)
    with rmm.open(url) as remote, rmm.open(shared_file) as local:
        want = {task: local.load(task) for task in local.tasks}
        wrong: list[str] = []

        def work(number: int) -> None:
            wait.wait()
            names = (f"task{(number // 2 + step) % 12}" for step in range(12))
            wrong.extend(task for task in names if not equal(remote.load(task), want[task]))

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert wrong == []
        asked = [span for span in server.ranges[2:] if span is not None]
        needed = {
            (extent.offset, extent.end)
            for number in range(12)
            for extent in Index.payload_of(local.index, number)
        }
        # Every byte at most once, but for gaps: runs lie behind one another.
        assert sum(end - start for start, end in asked) <= sum(e - s for s, e in needed) + GAP


def test_threads_wait_for_the_bytes_of_another(server: Server, shared_file: Path) -> None:
    """A task whose frames another thread is fetching is not reconstructed before they are there."""
    url = serve(server, shared_file)
    slow, go = threading.Event(), threading.Event()

    def trick(handler: Handler, request: Sent) -> bool:
        if len(server.requests) == 3:  # the first payload
            slow.set()
            go.wait(10)
        return False

    server.trick = trick
    with rmm.open(url) as remote, rmm.open(shared_file) as local:
        got: dict[str, rmm.LoadedTask] = {}
        first = threading.Thread(target=lambda: got.update(a=remote.load("task0")))
        second = threading.Thread(target=lambda: got.update(b=remote.load("task1")))
        first.start()
        assert slow.wait(10)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        go.set()
        first.join(10)
        second.join(10)
        assert equal(got["a"], local.load("task0"))
        assert equal(got["b"], local.load("task1"))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_other_stores(shared_file: Path, tmp_path: Path, where: str) -> None:
    if where == "memory":
        url = f"memory://{uuid.uuid4()}/x.rmm"
        fsspec.filesystem("memory").pipe_file(url, shared_file.read_bytes())
    else:
        url = f"file://{shared_file}"
    with rmm.open(url) as remote, rmm.open(shared_file) as local:
        for task in ("task1", "task11"):
            assert equal(remote.load(task), local.load(task))
        assert remote.validate().ok
    assert rmm.validate(url).ok


def test_storage_options_reach_the_server(server: Server, shared_file: Path) -> None:
    url = serve(server, shared_file)
    seen: list[str | None] = []

    def trick(handler: Handler, request: Sent) -> bool:
        seen.append(handler.headers.get("Authorization"))
        return False

    server.trick = trick
    options = {"headers": {"Authorization": "Bearer x"}}
    with rmm.open(url, storage_options=options) as remote:
        remote.load("task0")
        assert remote.validate().ok
    assert len(seen) >= 4
    assert set(seen) == {"Bearer x"}


def test_credentials_are_not_shown(server: Server, shared_file: Path) -> None:
    serve(server, shared_file)
    host = server.root.removeprefix("http://")
    with rmm.open(f"http://{host}/models/x.rmm?sig=secret") as remote:
        assert remote.path == f"http://{host}/models/x.rmm"
    with pytest.raises(RmmError) as caught:
        rmm.open(f"http://user:secret@{host}/models/none.rmm?sig=secret")
    assert "secret" not in str(caught.value)
    assert "404" in str(caught.value)


def test_unknown_task_asks_for_nothing(server: Server, shared_file: Path) -> None:
    with rmm.open(serve(server, shared_file)) as remote:
        with pytest.raises(NotFoundError, match="task0"):
            remote.load("tusk0")
        assert len(server.requests) == 2


def test_a_remote_file_has_no_buffer(server: Server, shared_file: Path) -> None:
    with rmm.open(serve(server, shared_file)) as remote, pytest.raises(RmmError, match="no buffer"):
        _ = remote.buffer


def test_a_file_that_grew_stays_open(server: Server, shared_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "grows.rmm"
    path.write_bytes(shared_file.read_bytes())
    with rmm.open(serve(server, path)) as remote, rmm.open(shared_file) as local:
        newcomer = make_tasks(1, sides=((300, 200), (170, 330), (64, 64)), seed=5)[0]
        newcomer.name = "newcomer"
        add(path, [newcomer])
        serve(server, path)
        assert equal(remote.load("task4"), local.load("task4"))
    with rmm.open(server.url("models/x.rmm")) as again:
        assert "newcomer" in again.tasks
        assert equal(again.load("task4"), local_load(shared_file, "task4"))


def local_load(path: Path, task: str) -> rmm.LoadedTask:
    with rmm.open(path) as local:
        return local.load(task)


def test_memory_is_in_proportion_to_what_was_fetched(server: Server, shared_file: Path) -> None:
    """A file said to be a terabyte long, of which a few kilobytes are asked for."""
    data = bytearray(shared_file.read_bytes())
    with rmm.open(shared_file) as local:
        slot = local.index.slots[0]
    # The same collection in a longer file: scratch behind it, which growth_limit allows.
    at = slot.offset + 16
    data[at : at + 8] = (1 << 40).to_bytes(8, "little")
    data[slot.offset + 124 : slot.offset + 128] = crc32c(
        bytes(data[slot.offset : slot.offset + 124])
    ).to_bytes(4, "little")
    server.files["x.rmm"] = bytes(data)

    def trick(handler: Handler, request: Sent) -> bool:
        start, end = request.range
        where = {"Content-Range": f"bytes {start}-{end - 1}/{1 << 40}"}
        handler.send(request, 206, server.files["x.rmm"][start:end], where)
        return True

    server.trick = trick
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with rmm.open(server.url("x.rmm")) as remote, rmm.open(shared_file) as local:
        assert equal(remote.load("task5"), local.load("task5"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_coalesce() -> None:
    assert coalesce([]) == []
    assert coalesce([(0, 10), (10, 20)]) == [Request(0, 20, ((0, 20),))]
    assert coalesce([(50, 60), (0, 10)], gap=40) == [Request(0, 60, ((0, 10), (50, 60)))]
    assert [(r.start, r.end) for r in coalesce([(50, 60), (0, 10)], gap=39)] == [(0, 10), (50, 60)]
    assert [(r.start, r.end) for r in coalesce([(5, 35)], piece=10)] == [
        (5, 15),
        (15, 25),
        (25, 35),
    ]


def test_requests_write_their_parts_only() -> None:
    memory = bytearray(b"-" * 30)
    request = Request(2, 25, ((2, 5), (8, 12), (20, 25)))
    data = bytes(range(65, 65 + 30))
    for start in range(2, 25, 4):
        request.put(memoryview(memory), start, data[start : min(start + 4, 25)])
    want = bytearray(b"-" * 30)
    for first, last in request.parts:
        want[first:last] = data[first:last]
    assert memory == want


def test_collections_of_urls_are_collections(server: Server, shared_file: Path) -> None:
    with rmm.open(serve(server, shared_file)) as remote:
        assert isinstance(remote, Collection)
        assert "12 tasks" in repr(remote)


def test_systems_without_files_in_memory(
    server: Server, shared_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
    with rmm.open(serve(server, shared_file)) as remote:
        assert list(tmp_path.iterdir()) == []  # it has no name any more
        assert equal(remote.load("task7"), local_load(shared_file, "task7"))


def test_caches_take_remote_collections(server: Server, shared_file: Path) -> None:
    with rmm.open(serve(server, shared_file)) as remote:
        cache = rmm.TaskCache(remote, 64 << 20)
        want = local_load(shared_file, "task9")
        for _ in range(2):
            got = cache.get("task9")
            assert all(np.array_equal(got[key].A, want[key].A) for key in want)
        assert len(server.requests) == 4
