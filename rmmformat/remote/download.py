"""Whole remote files to local ones: sources, and files of which every byte is to be checked."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmmformat.errors import RemoteError
from rmmformat.remote import is_url, shown, transport_errors, url_to_fs
from rmmformat.remote.ranges import CHUNK, PATIENCE, SLOWEST, http_get, refusal

__all__ = ["download", "downloaded", "local_file"]


@contextlib.contextmanager
def local_file(path: str) -> Iterator[str]:
    """Lend a path that is local: this one, or of a URL a temporary copy.

    For what looks at bytes that no task needs.
    """
    if not is_url(path):
        yield path
        return
    with downloaded(path) as copy:
        yield os.fspath(copy)


@contextlib.contextmanager
def downloaded(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Lend a file of a URL as a temporary local one.

    Raises
    ------
    RemoteError, UnsupportedError
        It cannot be read.
    """
    fs, path = url_to_fs(url, storage_options)
    with tempfile.TemporaryDirectory(prefix="rmm-") as folder:
        target = Path(folder) / "file.rmm"
        download(fs, path, target, url)
        yield target


def download(fs: Any, path: str, target: Path, url: str) -> None:
    """Copy a remote file, of half the space that is left at most, to a local path.

    Parameters
    ----------
    fs, path
        File system and path, as :func:`rmmformat.remote.url_to_fs` gives them.
    target
        Where it goes.
    url
        For messages.

    Raises
    ------
    RemoteError
        It cannot be read, is too large, or comes cut short.
    """
    most = shutil.disk_usage(target.parent).free // 2
    if "http" in fs.protocol:
        _download_http(fs, path, target, most)
        return
    with transport_errors(url):
        size = fs.info(path).get("size")
        if isinstance(size, int) and size > most:
            raise _no_room(url)
        fs.get_file(path, os.fspath(target))
    if isinstance(size, int) and target.stat().st_size != size:
        raise RemoteError(f"has {size} bytes, got {target.stat().st_size}", path=shown(url))


def _download_http(fs: Any, url: str, target: Path, most: int) -> None:
    from fsspec.asyn import sync

    with transport_errors(url):
        sync(fs.loop, _stream, fs, url, target, most)


async def _stream(fs: Any, url: str, target: Path, most: int) -> None:
    async with http_get(fs, url, most, {}) as answer:
        if answer.status != 200:
            raise refusal(url, answer)
        n_bytes, start = 0, time.monotonic()
        with target.open("wb") as out:
            async for chunk in answer.content.iter_chunked(CHUNK):
                n_bytes += len(chunk)
                if n_bytes > most:
                    raise _no_room(url)
                if n_bytes / SLOWEST + PATIENCE < time.monotonic() - start:
                    raise RemoteError("the server is too slow", path=shown(url))
                out.write(chunk)


def _no_room(url: str) -> RemoteError:
    return RemoteError(
        "takes more than half of the space that is left for temporary files",
        path=shown(url),
        hint="Point TMPDIR to where there is room, or download it yourself.",
    )
