"""What lies in a remote folder: names that are safe to make local files of, and not too many."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from rmmformat.errors import RemoteError, SourceError
from rmmformat.remote import shown, transport_errors
from rmmformat.remote.ranges import CHUNK, http_get, refusal

__all__ = ["check_part", "list_files"]

#: Files and folders that are looked at, and how deep: adapters lie at most two folders down.
_MOST_FILES, _MOST_PAGES, _DEPTH = 20_000, 1_000, 3
#: Bytes of one page that lists a folder.
_PAGE = 8 << 20
#: What an adapter's folder has, where a web server does not list it.
_USUAL = ("adapter_config.json", "adapter_model.safetensors")


def list_files(fs: Any, path: str, url: str) -> list[PurePosixPath]:
    """Files below a folder, relative to it.

    Parameters
    ----------
    fs, path
        File system and path, without a slash at the end.
    url
        For messages.

    Raises
    ------
    RemoteError
        The store does not answer.
    SourceError
        There are too many, or one has a name that no file here should have.
    """
    with transport_errors(url):
        if "http" in fs.protocol:
            names = _links(fs, f"{path}/", url) or list(_USUAL)
        else:
            try:
                found = fs.find(path, maxdepth=_DEPTH)
            except FileNotFoundError:
                found = []
            prefix = fs._strip_protocol(path).rstrip("/") + "/"
            names = [name[len(prefix) :] for name in found if name.startswith(prefix)]
    if len(names) > _MOST_FILES:
        raise SourceError(f"holds {len(names)} files", path=shown(url))
    for name in names:
        for part in name.split("/"):
            check_part(part, url)
    return [PurePosixPath(name) for name in names]


def check_part(part: str, url: str) -> None:
    """Refuse what is not the plain name of one file.

    Raises
    ------
    SourceError
        It would lead elsewhere, or no file system takes it.
    """
    if part in ("", ".", "..") or any(c in part for c in "/\\:\0") or len(part.encode()) > 255:
        raise SourceError(f"{part[:80]!r} cannot be the name of a file", path=shown(url))


class _Links(HTMLParser):
    """The links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if (tag, key) == ("a", "href") and value]


def _links(fs: Any, root: str, url: str) -> list[str]:
    """Names of files that the pages of a web server link to, below `root`; none without a page."""
    from fsspec.asyn import sync

    todo, seen, files = [root], {root}, set()
    while todo:
        folder = todo.pop()
        page = _Links()
        page.feed(sync(fs.loop, _page, fs, folder))
        for link in page.found:
            goal = urldefrag(urljoin(folder, link))[0].partition("?")[0]
            if not goal.startswith(root) or goal in seen:
                continue  # elsewhere, or up
            seen.add(goal)
            below = goal[len(root) :]
            if not below.endswith("/"):
                # Taken apart before it is decoded: an escaped slash is no slash.
                files.add("/".join(_name(part, url) for part in below.split("/")))
            elif below.count("/") < _DEPTH:
                todo.append(goal)
        if len(seen) > _MOST_FILES or len(todo) > _MOST_PAGES:
            raise SourceError(f"links to more than {len(seen) - 1} files", path=shown(url))
    return sorted(files)


def _name(part: str, url: str) -> str:
    name = unquote(part)
    check_part(name, url)
    return name


async def _page(fs: Any, url: str) -> str:
    """Text of a page that lists a folder, or nothing where there is none."""
    async with http_get(fs, url, _PAGE, {}) as answer:
        if answer.status in (403, 404):
            return ""
        if answer.status != 200:
            raise refusal(url, answer)
        if answer.headers.get("Content-Type", "text/html").partition(";")[0] != "text/html":
            return ""
        text = bytearray()
        async for chunk in answer.content.iter_chunked(CHUNK):
            text += chunk
            if len(text) > _PAGE:
                raise RemoteError(f"a page that lists a folder is longer than {_PAGE} bytes",
                                  path=shown(url))  # fmt: skip
        return text.decode("utf-8", "replace")
