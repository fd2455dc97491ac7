"""A task of an open file in the shape of a source, for whatever takes sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from rmmformat.errors import NotFoundError
from rmmformat.format import layout
from rmmformat.format.reader import nearest
from rmmformat.model import (
    Array,
    Factors,
    LedgerLine,
    PrivateInfo,
    Role,
    SourceFile,
    TargetInfo,
)

if TYPE_CHECKING:
    from rmmformat.collection import Collection

__all__ = ["StoredTask"]


@dataclasses.dataclass(frozen=True)
class StoredTask:
    """A task of an open file as a :class:`~rmmformat.model.SourceTask`.

    Factors come in the dtypes of their original.
    """

    collection: Collection
    name: str

    @property
    def path(self) -> str:
        """The file."""
        return self.collection.path

    @property
    def _metadata(self) -> Mapping[str, Any]:
        result: Mapping[str, Any] = self.collection.metadata.get("tasks", {}).get(self.name, {})
        return result

    @property
    def base_model(self) -> str:
        """Id of the base model."""
        return str(self.collection.metadata.get("base_model", {}).get("id", ""))

    @property
    def config_text(self) -> str:
        """The original configuration, character for character."""
        number = self._metadata.get("config")
        return "" if number is None else str(self.collection.metadata["configs"][int(number)])

    @cached_property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Targets by name."""
        return self.collection.targets(self.name)

    @property
    def privates(self) -> Mapping[str, PrivateInfo]:
        """Private tensors by name."""
        native = self.collection._native
        return {
            item.name: PrivateInfo(
                Role(item.role) if item.role in set(Role) else Role.OTHER,
                layout.DTYPES[item.dtype],
                item.shape,
            )
            for item in native.privates(self.collection._task(self.name))
        }

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """Empty: all that a file holds is used."""
        return ()

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that the task was converted from."""
        return tuple(
            SourceFile(file["name"], file["n_bytes"], file["sha256"])
            for file in self._metadata.get("files", ())
        )

    def factors(self, target: str) -> Factors:
        """Reconstruct one target's factors in their original's dtypes."""
        info = self.targets[target]
        arrays = [
            self.collection.load_factor(self.name, target, factor, np.empty(shape, dtype))
            for factor, shape, dtype in (
                ("A", (info.rank, info.shape.n_in), info.dtype_a),
                ("B", (info.shape.n_out, info.rank), info.dtype_b),
            )
        ]
        return Factors(arrays[0], arrays[1], info.scale)

    def private_tensor(self, name: str) -> Array:
        """Copy of one private tensor."""
        privates = self.collection.privates(self.name)
        if name not in privates:
            raise NotFoundError(
                f"task {self.name!r} has no private tensor {name!r}",
                hint=nearest(name, tuple(privates)),
            )
        return privates[name].copy()
