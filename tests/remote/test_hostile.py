"""Servers that do not do what they are asked: one clear error, in bounded time and memory."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import rmmformat as rmm
from rmmformat.errors import ChecksumError, FormatError, RemoteError, RmmError, UnsupportedError
from rmmformat.remote import ranges as remote_ranges

from .server import Handler, Request, Server

Trick = Callable[[Handler, Request], bool]


def no_ranges(handler: Handler, request: Request) -> bool:
    handler.send(request, 200, handler.site.files[request.path])
    return True


def endless(handler: Handler, request: Request) -> bool:
    """The range that was asked for, then bytes without end."""
    start, end = request.range or (0, 640)
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{1 << 40}")
    handler.end_headers()
    handler.close_connection = True
    while request.n_sent < 1 << 30:
        handler.wfile.write(bytes(1 << 20))
        request.n_sent += 1 << 20
    return True


def short(handler: Handler, request: Request) -> bool:
    """Fewer bytes than announced, then the connection ends."""
    start, end = request.range or (0, 640)
    data = handler.site.files[request.path]
    where = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
    handler.send(request, 206, data[start : end - 7], where, length=end - start)
    return True


def fewer(handler: Handler, request: Request) -> bool:
    """A range, and a body that is consistent with itself but not with the range."""
    start, end = request.range or (0, 640)
    data = handler.site.files[request.path]
    where = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
    handler.send(request, 206, data[start : end - 7], where)
    return True


def other_range(handler: Handler, request: Request) -> bool:
    start, end = request.range or (0, 640)
    data = handler.site.files[request.path]
    where = {"Content-Range": f"bytes {start + 8}-{end + 7}/{len(data)}"}
    handler.send(request, 206, data[start + 8 : end + 8], where)
    return True


def unsaid(handler: Handler, request: Request) -> bool:
    start, end = request.range or (0, 640)
    handler.send(request, 206, handler.site.files[request.path][start:end])
    return True


def unknown_size(handler: Handler, request: Request) -> bool:
    start, end = request.range or (0, 640)
    where = {"Content-Range": f"bytes {start}-{end - 1}/*"}
    handler.send(request, 206, handler.site.files[request.path][start:end], where)
    return True


def many_digits(handler: Handler, request: Request) -> bool:
    start, end = request.range or (0, 640)
    where = {"Content-Range": f"bytes {start}-{end - 1}/{'9' * 5000}"}
    handler.send(request, 206, handler.site.files[request.path][start:end], where)
    return True


def huge(handler: Handler, request: Request) -> bool:
    start, end = request.range or (0, 640)
    where = {"Content-Range": f"bytes {start}-{end - 1}/{10**18 * 9}"}
    handler.send(request, 206, handler.site.files[request.path][start:end], where)
    return True


def compressed(handler: Handler, request: Request) -> bool:
    start, end = request.range or (0, 640)
    data = handler.site.files[request.path]
    where = {
        "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
        "Content-Encoding": "gzip",
    }
    import gzip

    handler.send(request, 206, gzip.compress(data[start:end]), where)
    return True


def status(code: int) -> Trick:
    def answer(handler: Handler, request: Request) -> bool:
        handler.send(request, code, b"no")
        return True

    return answer


def loop(handler: Handler, request: Request) -> bool:
    handler.send(request, 302, b"", {"Location": f"/{request.path}"})
    return True


def to_a_file(handler: Handler, request: Request) -> bool:
    handler.send(request, 302, b"", {"Location": "file:///etc/passwd"})
    return True


def empty(handler: Handler, request: Request) -> bool:
    handler.send(request, 416, b"", {"Content-Range": "bytes */0"})
    return True


CASES: list[tuple[Trick, str]] = [
    (no_ranges, "does not serve ranges"),
    (endless, r"asked for \d+ bytes, got \d+"),
    (short, "cannot be reached"),
    (fewer, r"asked for \d+ bytes, got \d+"),
    (other_range, "asked for bytes"),
    (unsaid, "does not say which range"),
    (unknown_size, "does not say which range"),
    (many_digits, "does not say which range|cannot be reached"),
    (compressed, "compressed|cannot be reached"),
    (status(403), "403"),
    (status(404), "404"),
    (status(500), "500"),
    (loop, "cannot be reached"),
    (to_a_file, "cannot be reached"),
    (empty, "shorter"),
]


@pytest.fixture
def url(server: Server, shared_file: Path) -> str:
    server.files["x.rmm"] = shared_file.read_bytes()
    return server.url("x.rmm")


@pytest.mark.parametrize(("trick", "says"), CASES)
@pytest.mark.parametrize("when", ["open", "index", "load"])
def test_one_error(server: Server, url: str, trick: Trick, says: str, when: str) -> None:
    healthy = {"open": 0, "index": 1, "load": 2}[when]

    def later(handler: Handler, request: Request) -> bool:
        return len(server.requests) > healthy and trick(handler, request)

    server.trick = later
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(RemoteError, match=says) as caught, rmm.open(url) as collection:
        collection.load("task0")
    assert caught.value.path == url
    assert time.monotonic() - start < 20
    assert sum(request.n_sent for request in server.requests) < 256 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000  # KiB


def test_a_size_that_nothing_could_hold(server: Server, url: str) -> None:
    server.trick = huge
    with pytest.raises(RmmError) as caught:
        rmm.open(url)
    assert isinstance(caught.value, (RemoteError, FormatError))


def test_another_file(server: Server) -> None:
    server.files["x.rmm"] = b"<html>" + bytes(1000)
    with pytest.raises(FormatError, match="RMM-001"):
        rmm.open(server.url("x.rmm"))
    server.files["x.rmm"] = b"tiny"
    with pytest.raises(FormatError, match="RMM-001"):
        rmm.open(server.url("x.rmm"))


def test_a_file_cut_short(server: Server, url: str) -> None:
    server.files["x.rmm"] = server.files["x.rmm"][:-1000]
    with pytest.raises(FormatError, match="RMM-013"):
        rmm.open(url)


def test_an_index_that_claims_too_much(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmmformat.remote import file as remote_file

    monkeypatch.setattr(remote_file, "_MOST_INDEX", 100)
    with pytest.raises(RemoteError, match="at most 100"):
        rmm.open(url)
    assert len(server.requests) == 1


def test_damage_on_the_way_is_found(server: Server, url: str) -> None:
    def flip(handler: Handler, request: Request) -> bool:
        start, end = request.range
        data = bytearray(server.files["x.rmm"])
        data[700] ^= 1  # in the first frame
        where = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        handler.send(request, 206, bytes(data[start:end]), where)
        return True

    with rmm.open(url) as collection:
        server.trick = flip
        with pytest.raises(ChecksumError, match="Damaged") as caught:
            collection.load("task0")
        assert caught.value.offset == 640
        server.trick = None  # the next attempt asks again
        with rmm.open(server.files["x.rmm"]) as local:
            want = local.load("task0")["layer.0"].A
            assert (want == collection.load("task0")["layer.0"].A).all()


def test_a_replaced_file_is_noticed(server: Server, url: str) -> None:
    with rmm.open(url) as collection:
        data = bytearray(server.files["x.rmm"])
        for at in range(640, 20_000, 64):
            data[at] ^= 0x55
        server.files["x.rmm"] = bytes(data)
        with pytest.raises(ChecksumError, match="replaced since it was opened"):
            collection.load("task0")


def test_a_passing_fault_passes(server: Server, url: str) -> None:
    failed: list[Request] = []

    def once(handler: Handler, request: Request) -> bool:
        if len(server.requests) % 2:
            failed.append(request)
            return status(503)(handler, request) if len(failed) % 2 else short(handler, request)
        return False

    server.trick = once
    with rmm.open(url) as collection:
        assert len(collection.load("task0")) == 3
    assert len(failed) >= 3


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(RemoteError, match="cannot be reached"):
            rmm.open(f"http://127.0.0.1:{port}/x.rmm")


def test_a_silent_server_is_given_up(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_ranges, "PATIENCE", 0.3)

    def silent(handler: Handler, request: Request) -> bool:
        time.sleep(2)
        return False

    server.trick = silent
    start = time.monotonic()
    with pytest.raises(RemoteError):
        rmm.open(url)
    assert time.monotonic() - start < 10


def test_redirects_are_followed(server: Server, url: str) -> None:
    def elsewhere(handler: Handler, request: Request) -> bool:
        if request.path != "x.rmm":
            return False
        handler.send(request, 302, b"", {"Location": "/store/x.rmm"})
        return True

    server.files["store/x.rmm"] = server.files["x.rmm"]
    server.trick = elsewhere
    with rmm.open(url) as collection:
        assert len(collection.load("task0")) == 3


def test_encryption_is_not_given_up() -> None:
    import asyncio
    import types

    class Answer:
        status, reason, headers = 206, "", types.MappingProxyType({})
        url = types.SimpleNamespace(scheme="http")

        async def __aenter__(self) -> Answer:
            return self

        async def __aexit__(self, *_error: object) -> None:
            pass

    async def session() -> object:
        return types.SimpleNamespace(get=lambda *_a, **_k: Answer())

    fs = types.SimpleNamespace(kwargs={}, set_session=session, encode_url=str)

    async def ask() -> None:
        async with remote_ranges.http_get(fs, "https://example.org/x", 1, {}):
            pass

    with pytest.raises(RemoteError, match="without encryption"):
        asyncio.run(ask())


@pytest.mark.parametrize("url", ["nosuch://x/y.rmm", "nosuch::http://x/y.rmm"])
def test_unknown_kinds_of_url(url: str) -> None:
    with pytest.raises(UnsupportedError, match="nosuch"):
        rmm.open(url)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UnsupportedError, match=r"rmmformat\[remote\]"):
        rmm.open("https://example.org/x.rmm")


def test_memory_store_without_the_file() -> None:
    with pytest.raises(RemoteError, match="no such file"):
        rmm.open("memory://nothing/here.rmm")
