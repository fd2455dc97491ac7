"""A source of named tensors as a task, once it is known what each of them is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from rmmformat.converters.files import describe_file
from rmmformat.converters.tensors import TensorStore, read_finite
from rmmformat.errors import NotFoundError
from rmmformat.model import Array, Factors, LedgerLine, PrivateInfo, SourceFile, TargetInfo

__all__ = ["LaidOutTask", "Layout"]


@dataclasses.dataclass
class Layout:
    """Every tensor of a source, put in its place.

    ``target_keys`` (factor A, factor B) and ``private_keys`` lead from our names to the source's.
    """

    targets: dict[str, TargetInfo] = dataclasses.field(default_factory=dict)
    target_keys: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    privates: dict[str, PrivateInfo] = dataclasses.field(default_factory=dict)
    private_keys: dict[str, str] = dataclasses.field(default_factory=dict)
    ledger: list[LedgerLine] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class LaidOutTask:
    """A :class:`~rmmformat.model.SourceTask` that reads its tensors when asked for them.

    Parameters
    ----------
    name, base_model, config_text, ledger
        As of every source task.
    place
        The file or folder that messages name.
    store, layout
        The tensors, and what they are.
    paths
        The files that hold configuration and values.
    allow_nonfinite
        Hand out NaN and infinity.
    """

    name: str
    place: Path
    base_model: str
    config_text: str
    store: TensorStore
    layout: Layout
    ledger: tuple[LedgerLine, ...]
    paths: tuple[Path, ...]
    allow_nonfinite: bool

    @property
    def path(self) -> str:
        """The file or folder."""
        return str(self.place)

    @property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Target name to what the task adds there."""
        return self.layout.targets

    @property
    def privates(self) -> Mapping[str, PrivateInfo]:
        """Name to description of every private tensor."""
        return self.layout.privates

    @functools.cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """The files with size and digest, hashed on first access."""
        return tuple(describe_file(path) for path in self.paths)

    def factors(self, target: str) -> Factors:
        """Read both factors of one target in their stored dtypes; convolutions are flattened.

        Raises
        ------
        NotFoundError
            There is no such target.
        NonFiniteError
            A factor holds NaN or infinity.
        """
        if target not in self.layout.targets:
            raise NotFoundError(f"no target is called {target!r}", path=self.path)
        info = self.layout.targets[target]
        a, b = (self._read(key) for key in self.layout.target_keys[target])
        return Factors(
            a.reshape(info.rank, info.shape.n_in),
            b.reshape(info.shape.n_out, info.rank),
            info.scale,
        )

    def private_tensor(self, name: str) -> Array:
        """Read one private tensor in its stored dtype and shape; raises as :meth:`factors` does."""
        if name not in self.layout.privates:
            raise NotFoundError(f"no private tensor is called {name!r}", path=self.path)
        return self._read(self.layout.private_keys[name])

    def _read(self, key: str) -> Array:
        return read_finite(self.store, key, allow=self.allow_nonfinite)
