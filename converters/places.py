"""Sources that may be several: found at or below a place, and opened one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rmmformat.errors import RmmError, SourceError

__all__ = ["open_each"]

T = TypeVar("T")


def open_each(
    path: Path,
    name: str | None,
    find: Callable[[Path], Sequence[tuple[str | None, Path]]],
    open_one: Callable[[Path, str | None], T],
    *,
    what: str,
    many: str,
) -> list[T]:
    """Open everything that a format finds at a place.

    Parameters
    ----------
    path
        Where to look.
    name
        What the user calls it; only one thing can be called so.
    find
        Gives (name that the place suggests, path) of each.
    open_one
        Called with the path and the name: the user's, or else the place's.
    what, many
        What one is called in messages, with where it was looked for, and several of them.

    Raises
    ------
    SourceError
        There is nothing, or ``name`` is given for several, or it cannot be read.
    RmmError
        As ``open_one`` has it.
    """
    try:
        found = find(path)
        if not found:
            raise SourceError(f"no {what}", path=str(path))
        if name is not None and len(found) > 1:
            raise SourceError(
                f"holds {len(found)} {many}, and {name!r} can name only one", path=str(path)
            )
        return [open_one(file, place if name is None else name) for place, file in found]
    except (OSError, ValueError) as error:
        if isinstance(error, RmmError):
            raise
        raise SourceError(f"cannot read: {error}", path=str(path)) from error
