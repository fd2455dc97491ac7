"""From the options that people give to one method of coding."""

from __future__ import annotations

from rmmformat.coding import Align, Exact, Method, Plain, Published
from rmmformat.errors import OptionError
from rmmformat.format.encodings import by_name
from rmmformat.merge.rmm import Grouping

__all__ = ["choose_method"]


def choose_method(
    *,
    components: int | None = None,
    exact: bool = False,
    grouping: Grouping | None = None,
    align: Align | None = None,
    encoding: str | None = None,
) -> Method:
    """Choose how a collection is coded.

    Parameters
    ----------
    components
        RMM as published with this many directions.
    exact
        Every factor bit for bit.  This is what happens without any option.
    grouping, align
        For `components`: ``"position"`` (published), ``"factor"``, ``"row"`` or positions in a group;
        ``"none"`` (published), ``"svd"`` or ``"procrustes"``.
    encoding
        Of all rows, by default the originals' dtype; without `components` every task is kept on its
        own in that encoding.

    Raises
    ------
    OptionError
        Options that contradict one another.
    """
    if exact and (components is not None or encoding is not None):
        raise OptionError("exact storage has no components and no encoding to choose")
    if components is None and grouping is not None:
        raise OptionError(
            "a grouping says how components are shared", hint="Give --components as well."
        )
    if components is not None:
        if components < 0:
            raise OptionError(f"components must not be negative, got {components}")
        if encoding is not None:
            by_name(encoding)
        return Published(components, grouping or "position", align or "none", encoding)
    if encoding is not None:
        by_name(encoding)
        if align == "procrustes":
            raise OptionError("procrustes aligns tasks that share a basis", hint="Use svd.")
        return Plain(encoding, align or "none")
    if align not in (None, "none"):
        raise OptionError("exact storage keeps the factors as they are: align has no place in it")
    return Exact()
