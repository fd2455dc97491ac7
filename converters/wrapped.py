"""A task that is another one, but for what a subclass says otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from rmmformat.model import (
    Array,
    Factors,
    LedgerLine,
    PrivateInfo,
    SourceFile,
    SourceTask,
    TargetInfo,
)

__all__ = ["WrappedTask"]


class WrappedTask:
    """A :class:`~rmmformat.model.SourceTask` that hands everything on to ``task``."""

    def __init__(self, task: SourceTask) -> None:
        self.task = task

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.task.name

    @property
    def path(self) -> str:
        """Where it comes from."""
        return self.task.path

    @property
    def base_model(self) -> str:
        """Id of the base model."""
        return self.task.base_model

    @property
    def config_text(self) -> str:
        """The original configuration."""
        return self.task.config_text

    @property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Targets by name."""
        return self.task.targets

    @property
    def privates(self) -> Mapping[str, PrivateInfo]:
        """Private tensors by name."""
        return self.task.privates

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """What became of every item of the source."""
        return self.task.ledger

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that hold the values."""
        return self.task.files

    def factors(self, target: str) -> Factors:
        """Read both factors of one target."""
        return self.task.factors(target)

    def private_tensor(self, name: str) -> Array:
        """Read one private tensor."""
        return self.task.private_tensor(name)
