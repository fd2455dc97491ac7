"""Bytes on their way into a file: where they come from, and where they are to go."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from rmmformat._native import crc32c
from rmmformat.errors import ChecksumError
from rmmformat.format.catalog import Catalog, EncodedSection, encode_index
from rmmformat.format.disk import Appender

__all__ = ["Piece", "Plan", "Source", "Spool"]

_CHUNK = 1 << 22


class Source(Protocol):
    """Where bytes come from."""

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes at an offset."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes on their way into a file, and their checksum."""

    source: Source
    offset: int
    length: int
    crc: int

    def chunks(self) -> Iterator[bytes]:
        """Read them, a few megabytes at a time.

        Raises
        ------
        ChecksumError
            They are not what the checksum says.
        """
        crc = 0
        for start in range(0, self.length, _CHUNK):
            chunk = self.source.read(self.offset + start, min(_CHUNK, self.length - start))
            crc = crc32c(chunk, crc)
            yield chunk
        if crc != self.crc:
            raise ChecksumError(
                f"{self.length} bytes at {self.offset} have checksum {crc:#010x}, "
                f"recorded is {self.crc:#010x}",
                offset=self.offset,
                hint="The file is damaged; `rmm validate` says where.",
            )


class Spool:
    """An unnamed temporary file."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes]
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # until close()
        except OSError:  # a file can grow in a folder that takes no new ones
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._end = 0

    def put(self, raw: bytes) -> Piece:
        """Keep bytes."""
        piece = Piece(self, self._end, len(raw), crc32c(raw))
        self._file.seek(self._end)
        self._file.write(raw)
        self._end += len(raw)
        return piece

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes back."""
        self._file.seek(offset)
        return self._file.read(length)

    def close(self) -> None:
        """Give the space back."""
        # Closing writes what is buffered, which nobody will read: on a full disk it fails.
        with contextlib.suppress(OSError):
            self._file.close()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is to be written, and where.

    Attributes
    ----------
    pieces
        Offset and bytes of what is new, by rising offset.
    catalog
        What the index says.
    sections
        The index, ready but for its place.
    index_offset, end
        Its place, and the length of the file.
    """

    pieces: tuple[tuple[int, Piece], ...]
    catalog: Catalog
    sections: list[EncodedSection]
    index_offset: int
    end: int

    @property
    def index_length(self) -> int:
        """Bytes of the index."""
        return self.end - self.index_offset

    def write(self, out: Appender) -> int:
        """Write pieces and index; gives the checksum of the section table.

        Raises
        ------
        ChecksumError
            A piece is not what its checksum says.
        """
        for offset, piece in self.pieces:
            out.pad_to(offset)
            for chunk in piece.chunks():
                out.write(chunk)
        out.pad_to(self.index_offset)
        raw, crc = encode_index(self.sections, self.index_offset)
        out.write(raw)
        out.flush()
        return crc
