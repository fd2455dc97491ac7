"""Every exception of the package and the exit code the command line gives it.

Imports nothing, so that any module may raise from here.  The exit codes are part of the
product: 0 done, 1 failed, 2 usage, 3 malformed, 4 unsupported, 5 would lose information.
"""

from __future__ import annotations

__all__ = [
    "ChecksumError",
    "FormatError",
    "InternalError",
    "LayoutError",
    "LossyConversionError",
    "MetadataError",
    "NonFiniteError",
    "NotFoundError",
    "OptionError",
    "RemoteError",
    "RmmError",
    "ShapeError",
    "SourceError",
    "TruncatedError",
    "UnsupportedError",
]


class RmmError(Exception):
    """Base of every error raised on purpose by this package.

    Parameters
    ----------
    message
        What is wrong: what, got, expected.
    rule
        Id of the specification rule that is broken (``"RMM-017"``), where there is one.
    offset
        Bytes from the start of the file, where the fault has a place in one.
    path
        The file at fault.
    hint
        The remedy, as a sentence.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        rule: str | None = None,
        offset: int | None = None,
        path: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.rule = rule
        self.offset = offset
        self.path = path
        self.hint = hint

    def __str__(self) -> str:
        where = [] if self.offset is None else [f"offset {self.offset:#x}"]
        if self.rule is not None:
            where.append(self.rule)
        text = self.message if self.path is None else f"{self.path}: {self.message}"
        if where:
            text = f"{text} ({', '.join(where)})"
        if self.hint is not None:
            text = f"{text}. {self.hint}" if not text.endswith(".") else f"{text} {self.hint}"
        return text


class FormatError(RmmError, ValueError):
    """Bytes of an ``.rmm`` file break the specification."""

    exit_code = 3


class TruncatedError(FormatError):
    """The file ends before something that it announces."""


class LayoutError(FormatError):
    """A header, table or record of the index contradicts the specification."""


class MetadataError(FormatError):
    """The JSON metadata section cannot be read."""


class ChecksumError(FormatError):
    """Stored and computed CRC32C differ."""


class UnsupportedError(RmmError):
    """Well formed, but of a kind, version or method that this release does not handle."""

    exit_code = 4


class NotFoundError(RmmError, KeyError):
    """No task, target or tensor of that name; the message names the nearest ones."""

    __str__ = RmmError.__str__  # KeyError would print the repr of the message


class OptionError(RmmError, ValueError):
    """Options that contradict one another or are out of range."""

    exit_code = 2


class ShapeError(RmmError, ValueError):
    """Arrays handed to a function disagree in shape, dtype or number."""


class SourceError(RmmError, ValueError):
    """A foreign file cannot be read as what it claims to be: names file and tensor or field."""

    exit_code = 3


class RemoteError(RmmError, OSError):
    """A URL cannot be read or written: the server, the network or what lies between failed."""

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        hint: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message, path=path, hint=hint)
        self.status = status


class NonFiniteError(SourceError):
    """A source tensor holds NaN or infinity."""


class LossyConversionError(RmmError):
    """Going on would drop something; names it and the option that allows it."""

    exit_code = 5


class InternalError(RmmError):
    """A fault of this package; please report it."""
