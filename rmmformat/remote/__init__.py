"""Files that are elsewhere: what a URL is here, and how errors of its transport read.

Anything that fsspec knows goes: ``https://``, ``s3://``, ``gs://``, ``memory://``, also chained
(``simplecache::s3://``).  Reading an ``.rmm`` file is in :mod:`rmmformat.remote.file`, sources and
results of conversions are in :mod:`rmmformat.remote.transfer`.  Nothing here imports fsspec before
there is a URL.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from rmmformat.errors import RemoteError, RmmError, UnsupportedError

__all__ = ["is_url", "shown", "transport_errors", "url_to_fs"]

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(path: object) -> bool:
    """Whether a path is a URL: letters, then ``://``."""
    return isinstance(path, str) and _URL.match(path) is not None


def shown(url: str) -> str:
    """Give a URL as messages and reports have it: without user, password and query (signatures)."""
    chain, _, last = url.rpartition("::")
    try:
        parts = urlsplit(last)
    except ValueError:
        return url.partition("?")[0]
    host = parts.netloc.rpartition("@")[2]
    plain = f"{parts.scheme}://{host}{parts.path}"
    return f"{chain}::{plain}" if chain else plain


def url_to_fs(url: str, storage_options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """Give the fsspec file system of a URL, and the path within it.

    Raises
    ------
    UnsupportedError
        fsspec, or what it needs for this kind of URL, is not installed; or it knows no such kind.
    RemoteError
        The store cannot be reached as the options say.
    """
    name, kind = shown(url), url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs as find
    except ImportError as error:
        raise UnsupportedError(
            "reading URLs needs fsspec", path=name, hint='pip install "rmmformat[remote]"'
        ) from error
    try:
        fs, path = find(url, **dict(storage_options or {}))
    except (ImportError, ValueError) as error:
        # fsspec names the package to install, or says that it does not know the protocol.
        raise UnsupportedError(f"cannot use {kind}:// URLs: {error}", path=name) from error
    except TypeError as error:
        raise RemoteError(f"storage options do not fit: {error}", path=name) from error
    return fs, str(path)


@contextlib.contextmanager
def transport_errors(url: str) -> Iterator[None]:
    """Turn whatever a store raises within the block into one :class:`RemoteError`.

    Stores raise what their client libraries do, which have no base class in common; so anything
    that is not this package's own, nor a fault of the interpreter, counts as theirs.
    """
    try:
        yield
    except (RmmError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise RemoteError("there is no such file", path=shown(url)) from error
    except PermissionError as error:
        raise RemoteError(
            "access is denied",
            path=shown(url),
            hint="Credentials go where fsspec looks for them (environment, its configuration).",
        ) from error
    except Exception as error:
        text = str(error) or type(error).__name__
        raise RemoteError(f"cannot be reached: {_safe(text, url)}", path=shown(url)) from error


def _safe(text: str, url: str) -> str:
    """Message without what the URL may hold that is nobody's business, and of bounded length."""
    first = text.replace(url, shown(url)).splitlines() or [""]
    return re.sub(r"\?\S+", "", first[0])[:300]
