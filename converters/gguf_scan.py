"""The header of a GGUF file, read with every bound checked.

The gguf package's reader trusts the file: it takes counts and lengths as they are, and makes
several arrays for each element of each array, seconds and gigabytes for a base model's vocabulary.
To check all that before it runs is to read the whole header; so the header is read here, once, and
the package is used for names, types, quantisation and writing.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from rmmformat.errors import SourceError, UnsupportedError

__all__ = ["ARRAY_LIMIT", "MAGIC", "Header", "Tensor", "Value", "has_magic", "scan"]

MAGIC = b"GGUF"
ARRAY_LIMIT = 4096  # longer arrays (vocabularies) are stepped over; head counts have one per layer
NAME_LIMIT = 63  # bytes; GGML_MAX_NAME less the terminating zero

_KEY_LIMIT = 1 << 16
_KEYS = 1 << 16
_TENSORS = 1 << 18
_STRING_LIMIT = 1 << 24
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

Value = int | float | bool | str | tuple[int | float | bool | str, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A line of the table of tensors.

    Parameters
    ----------
    name
        As in the file.
    kind
        Its type: "F32", "Q8_0", ...
    shape
        In numpy's order: the last side is the one whose values are neighbours.
    offset
        Of its bytes, from the start of the file.
    n_bytes
        Their number.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says before its data.

    ``skipped`` holds arrays that are longer than :data:`ARRAY_LIMIT`: key to number of elements.
    """

    values: Mapping[str, Value]
    skipped: Mapping[str, int]
    tensors: Mapping[str, Tensor]


def has_magic(path: Path) -> bool:
    """Say whether a file starts as GGUF files do, without raising."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return False
        with path.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def scan(path: Path) -> Header:
    """Read the header of a file; time and memory in proportion to the file at most.

    Raises
    ------
    SourceError
        Not a GGUF file, cut short, or it contradicts itself.
    UnsupportedError
        An older version, or written for machines of the other byte order.
    """
    try:
        if not path.is_file():
            raise SourceError("not a file", path=str(path))
        with path.open("rb") as stream:
            return _Scan(stream, path).run()
    except OSError as error:
        said = error.strerror or error
        raise SourceError(f"cannot read the file: {said}", path=str(path)) from error


class _Scan:
    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream = stream
        self.path = str(path)
        self.size = os.fstat(stream.fileno()).st_size
        self.at = 0

    def fail(self, message: str) -> SourceError:
        return SourceError(message, path=self.path, offset=self.at)

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.fail(f"the file ends within {what}")
        raw = self.stream.read(n)
        if len(raw) != n:
            raise self.fail(f"the file ends within {what}")
        self.at += n
        return raw

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack(code, self.take(struct.calcsize(code), what))
        return int(value)

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """Read a count of items that take at least ``least_bytes`` bytes each."""
        n = self.number("<Q", f"the number of {what}")
        if n > most or n * least_bytes > self.size - self.at:
            raise self.fail(f"{n} {what} cannot be right in a file of {self.size} bytes")
        return n

    def text(self, what: str, limit: int) -> str:
        n = self.number("<Q", f"the length of {what}")
        if n > limit:
            raise self.fail(f"{what} of {n} bytes, expected at most {limit}")
        try:
            return self.take(n, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def run(self) -> Header:
        if self.take(4, "the magic number") != MAGIC:
            raise SourceError("not a GGUF file: it does not start with 'GGUF'", path=self.path)
        version = self.number("<I", "the version")
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise UnsupportedError(
                    "written for big-endian machines", path=self.path, hint="Convert it there."
                )
            raise UnsupportedError(
                f"GGUF version {version}, expected 2 or 3",
                path=self.path,
                hint="Convert the adapter again with a current llama.cpp.",
            )
        n_tensors = self.count("tensors", _TENSORS, 8 + 4 + 8 + 4 + 8)
        n_keys = self.count("keys", _KEYS, 8 + 4 + 1)
        values: dict[str, Value] = {}
        skipped: dict[str, int] = {}
        for _ in range(n_keys):
            key = self.text("a key", _KEY_LIMIT)
            if key in values or key in skipped:
                raise self.fail(f"key {key[:80]!r} is given twice")
            value = self.value(key)
            if isinstance(value, _Skipped):
                skipped[key] = value.length
            else:
                values[key] = value
        lines = [self.tensor() for _ in range(n_tensors)]
        alignment = values.get("general.alignment", 32)
        if (
            type(alignment) is not int
            or not 1 <= alignment <= 1 << 20
            or alignment & (alignment - 1)
        ):
            raise self.fail(f"general.alignment is {alignment!r}, expected a power of two")
        return Header(values, skipped, self.placed(lines, alignment))

    def value(self, key: str) -> Value | _Skipped:
        kind = self.number("<I", f"the type of {key[:80]!r}")
        if kind != _ARRAY:
            return self.scalar(kind, key)
        inner = self.number("<I", f"the type of {key[:80]!r}")
        if inner != _STRING and inner != _BOOL and inner not in _SCALARS:
            raise self.fail(f"key {key[:80]!r} is an array of type {inner}, which GGUF has not")
        width = 8 if inner == _STRING else 1 if inner == _BOOL else struct.calcsize(_SCALARS[inner])
        n = self.count(f"elements of {key[:80]!r}", 1 << 40, width)
        if n <= ARRAY_LIMIT:
            items = [self.scalar(inner, key) for _ in range(n)]
            return tuple(items)
        if inner == _STRING:
            for _ in range(n):
                length = self.number("<Q", f"a string of {key[:80]!r}")
                self.skip(length, key)
        else:
            self.skip(n * width, key)
        return _Skipped(n)

    def skip(self, n: int, key: str) -> None:
        if n > self.size - self.at:
            raise self.fail(f"the file ends within {key[:80]!r}")
        self.stream.seek(n, os.SEEK_CUR)
        self.at += n

    def scalar(self, kind: int, key: str) -> int | float | bool | str:
        what = f"the value of {key[:80]!r}"
        if kind == _STRING:
            return self.text(what, _STRING_LIMIT)
        if kind == _BOOL:
            raw = self.number("<B", what)
            if raw > 1:
                raise self.fail(f"{what} is {raw}, expected 0 or 1")
            return bool(raw)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has type {kind}, which GGUF has not")
        code = _SCALARS[kind]
        (value,) = struct.unpack(code, self.take(struct.calcsize(code), what))
        return float(value) if kind in (6, 12) else int(value)

    def tensor(self) -> _Line:
        name = self.text("the name of a tensor", NAME_LIMIT)
        n_dims = self.number("<I", f"tensor {name!r}")
        if not 1 <= n_dims <= 4:
            raise self.fail(f"tensor {name!r} has {n_dims} dimensions, expected 1 to 4")
        sides = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims, f"tensor {name!r}"))
        kind = self.number("<I", f"tensor {name!r}")
        offset = self.number("<Q", f"tensor {name!r}")
        return _Line(name, kind, tuple(int(side) for side in reversed(sides)), offset)

    def placed(self, lines: list[_Line], alignment: int) -> dict[str, Tensor]:
        """Check types and places: one tensor behind the other, as ggml demands."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        kinds = {int(kind): kind for kind in GGMLQuantizationType}
        start = -(-self.at // alignment) * alignment
        expected = 0
        tensors: dict[str, Tensor] = {}
        for line in lines:
            if line.name in tensors:
                raise self.fail(f"tensor {line.name!r} is listed twice")
            if line.kind not in kinds:
                raise self.fail(f"tensor {line.name!r} has type {line.kind}, which is not known")
            block, width = GGML_QUANT_SIZES[kinds[line.kind]]
            n = math.prod(line.shape)
            if n < 1 or line.shape[-1] % block:
                raise self.fail(
                    f"tensor {line.name!r} has shape {line.shape}, expected positive sides and "
                    f"rows of a multiple of {block} values"
                )
            n_bytes = n // block * width
            if line.offset != expected:
                raise self.fail(
                    f"tensor {line.name!r} is said to be at {line.offset}, expected {expected}"
                )
            if start + line.offset + n_bytes > self.size:
                raise self.fail(
                    f"tensor {line.name!r} of {n_bytes} bytes lies beyond the end of the file"
                )
            expected += -(-n_bytes // alignment) * alignment
            tensors[line.name] = Tensor(
                line.name, kinds[line.kind].name, line.shape, start + line.offset, n_bytes
            )
        return tensors


@dataclasses.dataclass(frozen=True)
class _Skipped:
    length: int


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
