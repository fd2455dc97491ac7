"""The C++ core: mapping, index, checks, reconstruction (``native/``)."""

import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__version__: str

class Entry(NamedTuple):
    """What a task stores at one target, and where its factors go in an arena."""

    target: str
    n_in: int
    n_out: int
    kind: int
    flags: int
    kernel: tuple[int, ...]
    rank: int
    scale: float
    dtype_a: int
    dtype_b: int
    offset_a: int
    offset_b: int

class Private(NamedTuple):
    """One private tensor; ``offset`` and ``n_bytes`` locate its bytes in the file."""

    name: str
    dtype: int
    role: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

class Violation(NamedTuple):
    """A rule that the file breaks: number of the rule, offset, message."""

    rule: int
    offset: int
    message: str

class File:
    """An open ``.rmm`` file: header and index are checked, payload is mapped."""

    @staticmethod
    def open(path: str | os.PathLike[str]) -> File: ...
    @staticmethod
    def from_buffer(data: Any) -> File: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def buffer(self) -> memoryview: ...
    @property
    def n_tasks(self) -> int: ...
    @property
    def n_targets(self) -> int: ...
    @property
    def file_length(self) -> int: ...
    @property
    def damaged_slot(self) -> bool: ...
    def task_names(self) -> list[str]: ...
    def find_task(self, name: str) -> int: ...
    def entries(self, task: int, dtype: int) -> tuple[list[Entry], int]: ...
    def privates(self, task: int) -> list[Private]: ...
    def load_task(self, task: int, dtype: int, out: Any, threads: int = 0) -> None: ...
    def load_factor(self, task: int, entry: int, factor: int, dtype: int, out: Any) -> None: ...
    def check_task(self, task: int) -> None: ...
    def validate(self) -> list[Violation]: ...

class Map:
    """The bytes of a file, mapped to be read; it stays mapped as long as a view of it lives."""

    def __init__(self, path: str | os.PathLike[str]) -> None: ...
    @property
    def size(self) -> int: ...
    def release(self, offset: int, n_bytes: int) -> None: ...

def validate_bytes(data: Any) -> list[Violation]: ...
def crc32c(data: Any, crc: int = 0) -> int: ...
def trellis_encode(
    rows: npt.NDArray[np.float32],
    row_bytes: npt.NDArray[np.uint8],
    base: int,
    lambdas: npt.NDArray[np.float32],
    families: int = 0,
) -> tuple[bytes, npt.NDArray[np.float32]]: ...
def trellis_decode(
    data: Any,
    k: int,
    n: int,
    kernels: str = "",
) -> tuple[npt.NDArray[np.float32], int]: ...
def trellis_kernels() -> list[str]: ...
def trellis_check(data: Any, k: int, n: int) -> None: ...
def trellis_run_bytes(data: Any) -> int: ...
def trellis_table(
    number: int,
) -> tuple[int, npt.NDArray[np.uint16], npt.NDArray[np.float32]]: ...
def principal_possible(n: int, n_values: int) -> bool: ...
def find_principal(
    stack: npt.NDArray[Any], group: int, p: int, centred: bool, threads: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]] | None: ...
