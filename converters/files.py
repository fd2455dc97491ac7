"""Files in and out: strict JSON, digests, and output that is complete or absent."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rmmformat.errors import RmmError, SourceError
from rmmformat.format.disk import DISK, refuse_device
from rmmformat.format.temporary import create_beside, create_folder_beside, remove_stale
from rmmformat.model import SourceFile

__all__ = [
    "JSON_LIMIT",
    "atomic_file",
    "atomic_folder",
    "describe_file",
    "open_plain",
    "parse_json_object",
    "read_json_object",
]

# A config lists modules and token ids and an index lists tensors; none comes near this. Python's
# objects take up to some thirty times the text, so the limit also bounds memory.
JSON_LIMIT = 16 << 20

_CHUNK = 1 << 20


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read, and nothing that one could wait on for ever (a pipe, a terminal).

    Raises
    ------
    SourceError
        It is there, and no plain file.
    OSError
        It cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise SourceError("not a file", path=str(path))
    return path.open("rb")


def describe_file(path: Path) -> SourceFile:
    """Measure and hash a file, reading it in pieces.

    Raises
    ------
    SourceError
        The file cannot be read.
    """
    digest = hashlib.sha256()
    n_bytes = 0
    try:
        with open_plain(path) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                n_bytes += len(chunk)
    except OSError as error:
        raise SourceError(f"cannot read the file: {error.strerror}", path=str(path)) from error
    return SourceFile(path.name, n_bytes, digest.hexdigest())


def read_json_object(path: Path) -> tuple[str, dict[str, Any]]:
    """Read a file that holds one JSON object; returns its text, character for character, and value.

    Raises
    ------
    SourceError
        Not readable, larger than :data:`JSON_LIMIT`, not UTF-8, or not one strict JSON object.
    """
    try:
        with open_plain(path) as stream:
            raw = stream.read(JSON_LIMIT + 1)
    except OSError as error:
        raise SourceError(f"cannot read the file: {error.strerror}", path=str(path)) from error
    if len(raw) > JSON_LIMIT:
        raise SourceError(f"more than {JSON_LIMIT} bytes of JSON", path=str(path))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 at byte {error.start}", path=str(path)) from error
    return text, parse_json_object(text, str(path))


def parse_json_object(text: str, path: str) -> dict[str, Any]:
    """Parse one JSON object, refusing what JSON forbids and Python's parser lets through.

    Raises
    ------
    SourceError
        A syntax error, NaN or Infinity, a key given twice, text that is not Unicode, nesting beyond
        the interpreter's limit, or a value that is not an object.
    """

    def refuse_constant(word: str) -> None:
        raise ValueError(f"{word} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            twice, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {twice[:80]!r} is given twice")
        return members

    try:
        value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
        # Escapes can spell lone surrogates, which no UTF-8 file can hold.
        if "\\u" in text or "\\U" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise SourceError("the JSON holds a lone surrogate", path=path) from error
    except RecursionError as error:
        raise SourceError("the JSON is nested too deeply", path=path) from error
    except ValueError as error:
        raise SourceError(f"not valid JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise SourceError(f"expected a JSON object, got {type(value).__name__}", path=path)
    return value


def _sync_file(path: Path) -> None:
    handle = DISK.open(path)
    try:
        DISK.sync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _told_as_ours(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RmmError(f"cannot write: {error.strerror or error}", path=str(out)) from error


@contextlib.contextmanager
def atomic_file(out: Path, *, force: bool) -> Iterator[Path]:
    """Lend a temporary sibling of ``out``; on success it is synced and takes ``out``'s name.

    On any exception, an interrupt included, the temporary file is removed and ``out`` is untouched.
    What a killed writer of ``out`` left is removed by the next one.

    Raises
    ------
    RmmError
        ``out`` exists and ``force`` is not set, it is a folder, a device, a pipe or a socket, or it
        cannot be written.
    """
    if out.is_dir():
        raise RmmError("is a folder", path=str(out), hint="Name a file.")
    if os.path.lexists(out) and not force:
        raise RmmError("exists already", path=str(out), hint="Choose another name or force.")
    refuse_device(out)
    with _told_as_ours(out), contextlib.ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out, DISK)
        temporary, handle = create_beside(out, DISK)
        stack.callback(temporary.unlink, missing_ok=True)
        unlock = stack.enter_context(contextlib.ExitStack())
        unlock.callback(os.close, handle)
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        # Some libraries leave files that only their owner may read.
        temporary.chmod(mode)
        _sync_file(temporary)
        if os.name == "nt":  # pragma: no cover  # an open file cannot be renamed there
            unlock.close()
        temporary.replace(out)
        DISK.sync_folder(out.parent)


@contextlib.contextmanager
def atomic_folder(out: Path, *, force: bool, known: frozenset[str]) -> Iterator[Path]:
    """Lend a temporary sibling folder of ``out``; on success it is synced and takes ``out``'s name.

    A folder that is there already is replaced only with ``force``, and only if it holds nothing but
    files named in ``known``, so that a mistyped destination costs nobody a home folder.  An empty
    folder is replaced without asking.

    Raises
    ------
    RmmError
        ``out`` may not be replaced or cannot be written.
    """
    if os.path.lexists(out):
        if not out.is_dir():
            raise RmmError("exists and is not a folder", path=str(out), hint="Name a new folder.")
        foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in known)
        if foreign:
            raise RmmError(
                f"holds {foreign[0]!r}, which is not of this format: the folder is not replaced",
                path=str(out),
                hint="Name a new folder.",
            )
        if not force and any(out.iterdir()):
            raise RmmError("exists already", path=str(out), hint="Choose another name or force.")
        out = out.resolve()
    with _told_as_ours(out), contextlib.ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out, DISK)
        temporary, handle = create_folder_beside(out)
        backup = temporary.with_suffix(".old")
        if handle is not None:
            stack.callback(os.close, handle)
        for leftover in (temporary, backup):
            stack.callback(shutil.rmtree, leftover, ignore_errors=True)
        yield temporary
        for entry in temporary.iterdir():
            # Some libraries leave files that only their owner may read.
            entry.chmod(temporary.stat().st_mode & 0o666)
            _sync_file(entry)
        DISK.sync_folder(temporary)
        if out.exists():
            out.rename(backup)
            try:
                temporary.rename(out)
            except BaseException:
                backup.rename(out)
                raise
        else:
            temporary.rename(out)
        DISK.sync_folder(out.parent)
