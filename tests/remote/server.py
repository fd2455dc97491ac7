"""A web server that serves ranges, counts what it sends, and can misbehave."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclasses.dataclass
class Request:
    method: str
    path: str
    range: tuple[int, int] | None
    n_sent: int = 0


@dataclasses.dataclass
class Server:
    """What it serves by path, and what happened."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    listings: bool = True
    #: Takes over a request: returns True where it has answered.
    trick: Callable[[Handler, Request], bool] | None = None
    requests: list[Request] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    root: str = ""

    def url(self, name: str) -> str:
        return f"{self.root}/{name}"

    @property
    def n_bytes(self) -> int:
        return sum(request.n_sent for request in self.requests)

    @property
    def ranges(self) -> list[tuple[int, int] | None]:
        return [request.range for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Server

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        site = self.site
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = (int(found[1]), int(found[2]) + 1) if found else None
        request = Request(method, unquote(self.path.lstrip("/").partition("?")[0]), span)
        with site.lock:
            site.requests.append(request)
        try:
            if site.trick is not None and site.trick(self, request):
                return
            self.plain(request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def plain(self, request: Request) -> None:
        site, name = self.site, request.path
        if name in site.files:
            data = site.files[name]
            if request.range is None:
                self.send(request, 200, data, {"Accept-Ranges": "bytes"})
                return
            start, end = request.range[0], min(request.range[1], len(data))
            if start >= len(data):
                self.send(request, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            where = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            self.send(request, 206, data[start:end], where)
            return
        folder = name.rstrip("/") + "/" if name.strip("/") else ""
        below = {n[len(folder) :] for n in site.files if n.startswith(folder)}
        if not site.listings or not below:
            self.send(request, 404, b"no such file")
            return
        entries = sorted({n if "/" not in n else n.partition("/")[0] + "/" for n in below})
        page = "".join(f'<li><a href="{entry}">{entry}</a></li>' for entry in entries)
        self.send(request, 200, page.encode(), {"Content-Type": "text/html"})

    def send(
        self,
        request: Request,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        fields = {
            "Content-Length": str(len(body) if length is None else length),
            "ETag": f'"{hash(self.site.files.get(request.path))}"',
            **(headers or {}),
        }
        for key, value in fields.items():
            self.send_header(key, value)
        self.end_headers()
        if request.method == "GET":
            for start in range(0, len(body), 1 << 16):
                self.wfile.write(body[start : start + (1 << 16)])
                request.n_sent += len(body[start : start + (1 << 16)])
        if length is not None:
            self.close_connection = True


@contextmanager
def running() -> Iterator[Server]:
    site = Server()
    handler = type("Bound", (Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    site.root = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
