"""The neutral values that sources, mathematics and container exchange.

No input or output happens here, and no foreign format is known: a PEFT folder, a GGUF adapter and
a task read back from an ``.rmm`` file all look the same, namely like :class:`SourceTask`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rmmformat.errors import ShapeError

__all__ = [
    "Action",
    "Array",
    "Factors",
    "LedgerLine",
    "PrivateInfo",
    "Role",
    "SourceFile",
    "SourceTask",
    "TargetInfo",
    "TargetKind",
    "TargetShape",
]

Array = npt.NDArray[np.generic]


class TargetKind(enum.IntEnum):
    """What sort of base weight a target is (codes: specification, registry of target kinds)."""

    LINEAR = 0
    EMBEDDING = 1
    CONV = 2


class Role(enum.IntEnum):
    """What a private tensor is to its task (codes: specification, registry of roles)."""

    OTHER = 0
    MODULE = 1  # a whole parameter of the model, trained in full: a head, an embedding, a norm
    BIAS = 2  # bias of an adapted module
    FACTOR_BIAS = 3  # bias of the factor B itself (PEFT's lora_bias)
    MAGNITUDE = 4  # DoRA magnitude
    ROWS = 5  # replaced rows of an embedding (PEFT's trainable tokens)


@dataclasses.dataclass(frozen=True, order=True)
class TargetShape:
    """Shape of a base weight as its delta sees it.

    Parameters
    ----------
    n_in
        Long side of factor A: input features; ``in * kh * kw`` for a convolution; the vocabulary
        size for an embedding.
    n_out
        Long side of factor B: output features; the width of the table for an embedding.
    kind
        The sort of weight.
    transposed
        The base stores the weight as (in, out), as GPT-2's Conv1D does: the delta is added
        transposed.
    kernel
        Kernel sizes of a convolution, one to three of them; empty otherwise.
    """

    n_in: int
    n_out: int
    kind: TargetKind = TargetKind.LINEAR
    transposed: bool = False
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.n_in < 1 or self.n_out < 1:
            raise ShapeError(f"target sides must be positive, got {self.n_in} and {self.n_out}")
        if (self.kind is TargetKind.CONV) != bool(self.kernel) or len(self.kernel) > 3:
            raise ShapeError(f"kernel sizes {self.kernel} do not fit kind {self.kind.name}")


@dataclasses.dataclass(frozen=True)
class TargetInfo:
    """What a task adds at one target, without the values.

    ``dtype_a`` and ``dtype_b`` are the dtypes as stored by the source (float32, float16 or
    ml_dtypes.bfloat16).
    """

    shape: TargetShape
    rank: int
    scale: float
    dtype_a: np.dtype[np.generic]
    dtype_b: np.dtype[np.generic]

    @property
    def n_bytes(self) -> int:
        """Bytes of both factors as stored by the source."""
        return self.rank * (
            self.shape.n_in * self.dtype_a.itemsize + self.shape.n_out * self.dtype_b.itemsize
        )


@dataclasses.dataclass(frozen=True)
class Factors:
    """The two factors of one delta: ``delta = scale * B @ A``.

    ``A`` has shape (rank, n_in), ``B`` has shape (n_out, rank), whatever the kind of target.
    """

    A: Array
    B: Array
    scale: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ShapeError(
                f"factors must be A (rank, n_in) and B (n_out, rank), got {self.A.shape} and "
                f"{self.B.shape}"
            )

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return int(self.A.shape[0])


@dataclasses.dataclass(frozen=True)
class PrivateInfo:
    """A tensor that one task carries outside its factors: kept exactly."""

    role: Role
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


class Action(enum.Enum):
    """What an importer did with one item of its source."""

    USED = "used"  # became a factor or decides how factors are read
    FOLDED = "folded"  # merged into another value (an alpha into a scale)
    STORED = "stored"  # kept as it is (private tensor, config text)
    IGNORED = "ignored"  # has no meaning for the weights; the detail says why


@dataclasses.dataclass(frozen=True)
class LedgerLine:
    """One item of a source and what became of it: nothing is dropped in silence."""

    item: str  # "tensor NAME", "field NAME" or "file NAME"
    action: Action
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that a source was read from."""

    name: str
    n_bytes: int
    sha256: str


class SourceTask(Protocol):
    """One task of a collection, wherever it comes from.

    Everything but :meth:`factors` and :meth:`private_tensor` is known without reading tensor data.
    Both of those read from the source at each call and keep nothing, so that memory stays bounded
    by one target.
    """

    @property
    def name(self) -> str:
        """Name of the task, unique in its collection."""

    @property
    def path(self) -> str:
        """Where it comes from, for messages."""

    @property
    def base_model(self) -> str:
        """Id of the base model, or the empty string."""

    @property
    def config_text(self) -> str:
        """The original configuration, character for character; empty where there is none."""

    @property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Target name to what the task adds there."""

    @property
    def privates(self) -> Mapping[str, PrivateInfo]:
        """Name to description of every private tensor."""

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """Every tensor, config field and file of the source, accounted for."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that hold the source's values."""

    def factors(self, target: str) -> Factors:
        """Read both factors of one target, in their stored dtypes."""

    def private_tensor(self, name: str) -> Array:
        """Read one private tensor in its stored dtype and shape."""
