"""From the options that people give to one method of coding."""

from __future__ import annotations

import math

from rmmformat.coding import Align, Exact, MaxError, Method, Plain, Published, Size
from rmmformat.errors import OptionError
from rmmformat.format.encodings import by_name
from rmmformat.merge.rmm import Grouping

__all__ = ["DEFAULT_MAX_ERROR", "choose_method", "parse_fraction"]

#: What is kept to if nothing is asked for.  Eight classifiers (rank 16, trained apart) lose a fifth
#: of a point of accuracy at 17 % error; at 5 % their factors take a tenth of their f32 bytes.
DEFAULT_MAX_ERROR = 0.05


def parse_fraction(value: float | str, what: str) -> float:
    """Read a fraction: a number such as 0.05, or per cent such as ``"5%"``.

    Raises
    ------
    OptionError
        It is not a number above 0.
    """
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            number = float(value.strip()[:-1]) / 100
        else:
            number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        hint = "Write 0.05 or 5%."
        if number == 0 and what == "max_error":
            hint = "Exact storage is an option of its own: --exact."
        raise OptionError(f"{what} wants a part above 0, got {value!r}", hint=hint)
    return number


def choose_method(
    *,
    max_error: float | str | None = None,
    size: float | str | None = None,
    components: int | None = None,
    exact: bool = False,
    grouping: Grouping | None = None,
    align: Align | None = None,
    encoding: str | None = None,
) -> Method:
    """Choose how a collection is coded.

    Parameters
    ----------
    max_error
        Bound of every delta's relative error, below 1; in as few bytes as can be.  Without any
        option it is :data:`DEFAULT_MAX_ERROR`.
    size
        Part of the originals' factor bytes that is not exceeded; with errors as small as can be.
    components
        RMM as published with this many directions.
    exact
        Every factor bit for bit.
    grouping, align
        For `components`: ``"position"`` (published), ``"factor"``, ``"row"`` or positions in a
        group; ``"none"`` (published), ``"svd"`` or ``"procrustes"``.
    encoding
        Of all rows, by default the originals' dtype; without `components` every task is kept on its
        own in that encoding.

    Raises
    ------
    OptionError
        Options that contradict one another, or are out of range.
    """
    ways = {
        "max_error": max_error is not None,
        "size": size is not None,
        "components": components is not None,
        "exact": exact,
    }
    asked = [way for way, given in ways.items() if given]
    if len(asked) > 1:
        raise OptionError(
            f"{' and '.join(asked)} exclude one another",
            hint="Each of them alone says how the collection is coded.",
        )
    if exact and encoding is not None:
        raise OptionError("exact storage has no encoding to choose")
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
    dial = max_error is not None or size is not None
    if encoding is not None and not dial:
        if by_name(encoding).name == "trellis":
            raise OptionError(
                "the trellis encoding needs a step for each row", hint="Use --max-error or --size."
            )
        if align == "procrustes":
            raise OptionError("procrustes aligns tasks that share a basis", hint="Use svd.")
        return Plain(encoding, align or "none")
    if encoding is not None or align not in (None, "none"):
        given = "an encoding" if encoding is not None else "an alignment"
        raise OptionError(
            f"{given} is not chosen by hand with {asked[0] if asked else 'max_error'}",
            hint="It goes with --components, or with --encoding alone.",
        )
    if exact:
        return Exact()
    if size is not None:
        return Size(parse_fraction(size, "size"))
    bound = parse_fraction(DEFAULT_MAX_ERROR if max_error is None else max_error, "max_error")
    if bound >= 1:
        raise OptionError(
            f"max_error must be below 1 (a delta of zero has error 1), got {max_error}",
            hint="Write 0.05 or 5%.",
        )
    return MaxError(bound)
