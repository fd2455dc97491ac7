"""Whole files from and to URLs: sources of conversions and their results.

Sources are fetched file by file into a temporary folder that goes with the last task read from it;
results are written here and then uploaded whole.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.registry import collect
from rmmformat.converters.wrapped import WrappedTask
from rmmformat.errors import RemoteError, RmmError, SourceError, UnsupportedError
from rmmformat.model import (
    Action,
    Array,
    Factors,
    LedgerLine,
    SourceFile,
    SourceTask,
)
from rmmformat.remote import shown, transport_errors, url_to_fs
from rmmformat.remote.download import download
from rmmformat.remote.listing import check_part, list_files

__all__ = ["FetchedTask", "open_fetched", "result_file"]

#: Files that are sources by themselves; others name a folder.
_SINGLE = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
#: Stores whose files appear whole when they are closed; elsewhere a file gets its name at the end.
_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory", "hf"})


# -- sources --------------------------------------------------------------------------------------


class _Place:
    """A temporary folder that goes when nothing uses it any more, at the latest at exit."""

    def __init__(self, url: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="rmm-"))
        self.url = shown(url).rstrip("/")
        self.local = self.root  # what the URL itself became
        weakref.finalize(self, _remove, self.root, os.getpid())

    def url_of(self, local: str) -> str:
        """URL of a local path at or below what was fetched; other paths stay."""
        try:
            below = Path(local).relative_to(self.local)
        except ValueError:
            return local
        return self.url if below == Path() else f"{self.url}/{below.as_posix()}"

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Let errors name the URL, not the temporary file."""
        try:
            yield
        except RmmError as error:
            if error.path is not None:
                error.path = self.url_of(error.path)
            raise


def _remove(root: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked worker
        shutil.rmtree(root, ignore_errors=True)


class FetchedTask(WrappedTask):
    """A task of files that were fetched: as it is, but it and its errors name the URL."""

    def __init__(self, task: SourceTask, place: _Place, left: tuple[str, ...]) -> None:
        super().__init__(task)
        self._place, self._left = place, left

    @property
    def path(self) -> str:
        """The URL."""
        return self._place.url_of(self.task.path)

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """The task's, and what was not fetched."""
        why = "not fetched: no weights"
        left = (LedgerLine(f"file {name}", Action.IGNORED, why) for name in self._left)
        return (*self.task.ledger, *left)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that hold the values."""
        with self._place.named():
            return self.task.files

    def factors(self, target: str) -> Factors:
        """Read both factors of one target."""
        with self._place.named():
            return self.task.factors(target)

    def private_tensor(self, name: str) -> Array:
        """Read one private tensor."""
        with self._place.named():
            return self.task.private_tensor(name)


def open_fetched(
    url: str, *, name: str | None = None, kind: str | None = None, options: Options = DEFAULTS
) -> list[SourceTask]:
    """Fetch a source, a file or a folder, and open its tasks.

    Parameters
    ----------
    url
        A file that is a source by itself, an adapter's folder, or a folder of such folders.  Of a
        folder only configurations and weights are fetched; an HTTP server that lists no folders is
        asked for an adapter's files by their names.
    name, kind, options
        As importers and the registry take them.

    Raises
    ------
    RemoteError, UnsupportedError
        It cannot be fetched.
    SourceError
        There is nothing of use, or what there is is broken.
    """
    fs, path = url_to_fs(url)
    place = _Place(url)
    stem = unquote(PurePosixPath(urlsplit(shown(url)).path).name) or "adapter"
    if stem in _ADAPTER:  # one file of an adapter stands for its folder
        return open_fetched(url.rpartition(stem)[0], name=name, kind=kind, options=options)
    check_part(stem, url)
    place.local = place.root / stem
    left: dict[PurePosixPath, list[str]] = {}
    if stem.endswith(_SINGLE):
        download(fs, path, place.local, url)
    else:
        place.local.mkdir()
        left = _fetch_folder(fs, path.rstrip("/"), place.local, url)
    with place.named():
        tasks = collect([(name, place.local)], fmt=kind, options=options)
    fetched: list[SourceTask] = []
    for task in tasks:
        below = PurePosixPath(os.path.relpath(task.path, place.local))
        fetched.append(FetchedTask(task, place, tuple(left.get(below, ()))))
    return fetched


def _fetch_folder(fs: Any, path: str, local: Path, url: str) -> dict[PurePosixPath, list[str]]:
    """Fetch what importers read; gives the names that were left, by folder."""
    folders: dict[PurePosixPath, list[str]] = {}
    for relative in list_files(fs, path, url):
        folders.setdefault(relative.parent, []).append(relative.name)
    left: dict[PurePosixPath, list[str]] = {}
    for folder, names in sorted(folders.items()):
        wanted = _wanted(names)
        left[folder] = sorted(set(names) - wanted)
        for name in sorted(wanted):
            target = local / folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            below = (folder / name).as_posix()
            remote = f"{path}/{quote(below) if 'http' in fs.protocol else below}"
            try:
                download(fs, remote, target, f"{url.rstrip('/')}/{below}")
            except RemoteError as error:
                if error.status != 404:  # the importer says what it misses
                    raise
                target.unlink(missing_ok=True)
    if not any(entry.is_file() for entry in local.rglob("*")):
        raise SourceError("no adapter here that can be listed or fetched", path=shown(url))
    return left


def _wanted(names: list[str]) -> set[str]:
    """Configurations and weights among a folder's files; pickles only where there is no other."""
    weights = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    pickles = [name for name in names if name.endswith(".bin")]
    others = [
        name
        for name in names
        if name in ("adapter_config.json", "config.json") or name.endswith(".index.json")
    ]
    chosen = [*(weights or pickles), *others]
    if any(name in _ADAPTER for name in names):
        chosen = [name for name in chosen if name.startswith("adapter_")]
    return set(chosen)


# -- results --------------------------------------------------------------------------------------


@contextlib.contextmanager
def result_file(url: str, *, overwrite: bool) -> Iterator[Path]:
    """Lend a local path for what is to be at a URL; on success it is uploaded, whole.

    In object stores a file appears when all of it is there; elsewhere it is uploaded under another
    name and renamed.  Nothing is uploaded after an error.

    Raises
    ------
    RmmError
        Something is there and `overwrite` is not set.
    RemoteError, UnsupportedError
        It cannot be written.
    """
    fs, path = url_to_fs(url)
    if "http" in fs.protocol:
        raise UnsupportedError(
            "cannot write to a web server",
            path=shown(url),
            hint="Write a local file, or to a store such as s3://.",
        )
    _check_absent(fs, path, url, overwrite)
    with tempfile.TemporaryDirectory(prefix="rmm-") as folder:
        local = Path(folder) / "result.rmm"
        yield local
        _check_absent(fs, path, url, overwrite)
        with transport_errors(url):
            _upload(fs, local, path, url)


def _check_absent(fs: Any, path: str, url: str, overwrite: bool) -> None:
    with transport_errors(url):
        there = not overwrite and fs.exists(path)
    if there:
        raise RmmError("exists already", path=shown(url), hint="Choose another name or force.")


def _upload(fs: Any, local: Path, path: str, url: str) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    parent, _, name = path.rpartition("/")
    whole = bool(protocols & _WHOLE)
    target = path if whole else f"{parent}/.{name}.{secrets.token_hex(6)}.tmp"
    try:
        if parent and not whole:
            fs.makedirs(parent, exist_ok=True)
        fs.put_file(os.fspath(local), target)
        fs.invalidate_cache()
        want, got = local.stat().st_size, fs.info(target).get("size")
        if got != want:
            raise RemoteError(f"uploaded {want} bytes, {got} arrived", path=shown(url))
        if not whole:
            fs.mv(target, path)
    except BaseException:
        if not whole:
            with contextlib.suppress(Exception):
                fs.rm(target)
        raise
