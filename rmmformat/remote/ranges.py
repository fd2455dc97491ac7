"""Ranges of a remote file, straight into memory.

Stores are read through fsspec.  HTTP has a reader of its own on fsspec's session: a server may
ignore a range and send everything, send more or less than was asked, or anything else, and only
what looks at status, headers and length while the bytes arrive can hold time and memory in bounds.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from rmmformat.errors import RemoteError
from rmmformat.remote import shown, transport_errors, url_to_fs

__all__ = ["Ranges", "Request", "Span", "coalesce", "http_get", "open_ranges", "refusal"]

Span = tuple[int, int]

#: Bytes between two ranges that are fetched rather than cost a request of their own.
GAP = 1 << 16
#: Bytes of one request.
PIECE = 1 << 25
#: Requests at once.
ABREAST = 8
#: Tries for what may be a passing fault.
_TRIES = 3
_PASSING = frozenset({429, 500, 502, 503, 504})
#: Seconds for connecting, and for a silence; bytes a second below which a server is given up.
PATIENCE, SLOWEST = 30.0, 20_000
CHUNK = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class Ranges(Protocol):
    """A remote file, read in ranges."""

    url: str

    def head(self, n_bytes: int) -> tuple[int, bytes]:
        """Size of the file, and its first bytes, at most `n_bytes`."""

    def read_into(self, memory: memoryview, spans: Sequence[Span]) -> None:
        """Fill memory[start:end] with those bytes of the file for each span, and nothing else."""

    def changed(self) -> bool:
        """Whether the file is no longer the one whose head was read, as far as one can tell."""


def open_ranges(url: str, storage_options: Mapping[str, Any] | None = None) -> Ranges:
    """Give the reader that fits a URL.

    Raises
    ------
    UnsupportedError, RemoteError
        As :func:`rmmformat.remote.url_to_fs`.
    """
    fs, path = url_to_fs(url, storage_options)
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    return _Http(url, fs) if "http" in protocols else _Store(url, fs, path)


@dataclasses.dataclass(frozen=True)
class Request:
    """One range to ask for, and the parts of it that are wanted, in order."""

    start: int
    end: int
    parts: tuple[Span, ...]

    def put(self, memory: memoryview, position: int, data: bytes) -> None:
        """Copy what is wanted of the bytes at `position` to its place.

        What lies between the parts is left as it is: it may be somebody's already.
        """
        end = position + len(data)
        for first, last in self.parts[bisect.bisect_right(self.parts, position, key=_end) :]:
            if first >= end:
                break
            start, stop = max(first, position), min(last, end)
            memory[start:stop] = data[start - position : stop - position]


def _end(part: Span) -> int:
    return part[1]


def coalesce(spans: Sequence[Span], *, gap: int = GAP, piece: int = PIECE) -> list[Request]:
    """Make few requests of many spans (disjoint): near ones in one, long ones in pieces."""
    groups: list[list[Span]] = []
    for start, end in sorted(spans):
        for at in range(start, end, piece):
            part = (at, min(at + piece, end))
            if (
                not groups
                or part[0] > groups[-1][-1][1] + gap
                or part[1] > groups[-1][0][0] + piece
            ):
                groups.append([part])
            elif part[0] == groups[-1][-1][1]:
                groups[-1][-1] = (groups[-1][-1][0], part[1])
            else:
                groups[-1].append(part)
    return [Request(group[0][0], group[-1][1], tuple(group)) for group in groups]


class _Store:
    """Any fsspec file system: what it reads is checked for its length."""

    def __init__(self, url: str, fs: Any, path: str) -> None:
        self.url, self._fs, self._path = url, fs, path
        self._version: object = None

    def head(self, n_bytes: int) -> tuple[int, bytes]:
        size, self._version = self._look()
        memory = bytearray(min(n_bytes, size))
        self.read_into(memoryview(memory), [(0, len(memory))] if memory else [])
        return size, bytes(memory)

    def _look(self) -> tuple[int, object]:
        with transport_errors(self.url):
            self._fs.invalidate_cache()
            info = self._fs.info(self._path)
        size = info.get("size")
        if info.get("type") == "directory" or not isinstance(size, int):
            raise RemoteError("is not a file", path=shown(self.url))
        marks = ("ETag", "etag", "version_id", "mtime", "LastModified", "last_modified", "created")
        return size, (size, *(str(info.get(mark)) for mark in marks))

    def read_into(self, memory: memoryview, spans: Sequence[Span]) -> None:
        requests = coalesce(spans)
        for first in range(0, len(requests), ABREAST):
            some = requests[first : first + ABREAST]
            with transport_errors(self.url):
                found = self._fs.cat_ranges(
                    [self._path] * len(some),
                    [request.start for request in some],
                    [request.end for request in some],
                    on_error="raise",
                )
            for request, data in zip(some, found, strict=True):
                if len(data) != request.end - request.start:
                    raise _wrong_length(self.url, request.end - request.start, len(data))
                request.put(memory, request.start, data)

    def changed(self) -> bool:
        try:
            return self._look()[1] != self._version
        except RemoteError:
            return True


class _Http:
    """An HTTP server: every answer must be the range that was asked for, no more and no less."""

    def __init__(self, url: str, fs: Any) -> None:
        self.url, self._fs = url, fs
        self._known: tuple[int, str] | None = None  # size and entity tag at the start
        self._seen: tuple[int, str] | None = None  # and as of the last answer

    def head(self, n_bytes: int) -> tuple[int, bytes]:
        self._known = self._seen = None
        memory = bytearray(n_bytes)
        self.read_into(memoryview(memory), [(0, n_bytes)])
        assert self._seen is not None  # an answer came  # noqa: S101
        self._known = self._seen
        return self._seen[0], bytes(memory[: self._seen[0]])

    def changed(self) -> bool:
        return self._seen != self._known

    def read_into(self, memory: memoryview, spans: Sequence[Span]) -> None:
        from fsspec.asyn import sync

        with transport_errors(self.url):
            sync(self._fs.loop, self._read_all, memory, spans)

    async def _read_all(self, memory: memoryview, spans: Sequence[Span]) -> None:
        import asyncio

        abreast = asyncio.Semaphore(ABREAST)

        async def one(request: Request) -> None:
            async with abreast:
                await self._read(memory, request)

        tasks = [asyncio.ensure_future(one(request)) for request in coalesce(spans)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one failed: the others would write to memory nobody waits for
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, memory: memoryview, request: Request) -> None:
        import asyncio

        import aiohttp

        for attempt in range(1, _TRIES + 1):
            try:
                return await self._try(memory, request)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                lasting = isinstance(error, (aiohttp.InvalidURL, aiohttp.TooManyRedirects))
                if isinstance(error, RemoteError):
                    lasting = error.status not in _PASSING
                if lasting or attempt == _TRIES:
                    raise
            await asyncio.sleep(0.2 * 2**attempt)
        return None

    async def _try(self, memory: memoryview, request: Request) -> None:
        start, end = request.start, request.end
        headers = {"Range": f"bytes={start}-{end - 1}"}
        async with http_get(self._fs, self.url, end - start, headers) as answer:
            end = self._check(answer, start, end)
            position = start
            async for chunk in answer.content.iter_chunked(CHUNK):
                if position + len(chunk) > end:
                    raise _wrong_length(self.url, end - start, position + len(chunk) - start, "+")
                request.put(memory, position, chunk)
                position += len(chunk)
            if position != end:
                raise _wrong_length(self.url, end - start, position - start)

    def _check(self, answer: Any, start: int, end: int) -> int:
        """Whether an answer is the range asked for; gives the range's end.

        Only the first range may lie beyond the end of the file, which is then shorter than it.
        """
        name, status = shown(self.url), answer.status
        if status == 200:
            raise RemoteError(
                "the server does not serve ranges: it would send the whole file",
                path=name,
                status=status,
                hint="Download the file and open it where it is, or ask another server.",
            )
        if status == 416:
            raise RemoteError(
                f"the file is shorter than {end} bytes", path=name, status=status,
                hint="It is empty, cut short, or was replaced; open it again.",
            )  # fmt: skip
        if status != 206:
            raise refusal(self.url, answer)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        if found is None:
            raise RemoteError("the server does not say which range it sends", path=name)
        first, last, size = map(int, found.groups())
        if self._known is None:
            end = min(end, size)
        if (first, last) != (start, end - 1) or size < end:
            raise RemoteError(
                f"asked for bytes {start} to {end - 1}, the server sends {first} to {last} of "
                f"{size}",
                path=name,
            )
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise RemoteError("the server sends a range of a compressed file", path=name)
        self._seen = (size, answer.headers.get("ETag", ""))
        return end


@contextlib.asynccontextmanager
async def http_get(fs: Any, url: str, n_bytes: int, headers: dict[str, str]) -> AsyncIterator[Any]:
    """Ask a web server, with the options and the session of fsspec's file system for it."""
    import aiohttp

    options = dict(fs.kwargs)
    options["headers"] = {
        **options.get("headers", {}),
        "Accept-Encoding": "identity",
        **headers,
    }
    limits = aiohttp.ClientTimeout(
        total=PATIENCE + n_bytes / SLOWEST, sock_connect=PATIENCE, sock_read=PATIENCE
    )
    options.setdefault("timeout", limits)
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **options) as answer:
        if url.startswith("https:") and answer.url.scheme != "https":
            raise RemoteError(
                "the server redirects to a connection without encryption", path=shown(url)
            )
        yield answer


def refusal(url: str, answer: Any) -> RemoteError:
    """Give the error for an answer that is not what was asked for."""
    text = f"the server answered {answer.status} {answer.reason or ''}".rstrip()
    return RemoteError(text[:200], path=shown(url), status=answer.status)


def _wrong_length(url: str, want: int, got: int, more: str = "") -> RemoteError:
    return RemoteError(f"asked for {want} bytes, got {got}{more}", path=shown(url))
