"""One of several fine-tunes of an unknown base as a source task."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from rmmformat.converters.checkpoint_store import Checkpoint, file_lines, open_checkpoint
from rmmformat.converters.files import describe_file
from rmmformat.converters.lore_run import LoreRun, Progress
from rmmformat.errors import NotFoundError
from rmmformat.model import (
    Array,
    Factors,
    LedgerLine,
    PrivateInfo,
    SourceFile,
    TargetInfo,
)

__all__ = ["LoreTask"]


class LoreTask:
    """One of the models, as what it adds to the estimated base."""

    def __init__(self, name: str, run: LoreRun) -> None:
        self._name = name
        self._run = run
        self._model = run.models[name]

    @property
    def name(self) -> str:
        """Name of the task."""
        return self._name

    @property
    def path(self) -> str:
        """The model's folder or file."""
        return str(self._model.path)

    @property
    def base_model(self) -> str:
        """Id of the estimate."""
        return self._run.base_id

    @functools.cached_property
    def base_checkpoint(self) -> Checkpoint:
        """The estimate as it was written; estimates first."""
        self._run.prepare()
        return open_checkpoint(self._run.base)

    @property
    def config_text(self) -> str:
        """The text of the model's config.json, or the empty string."""
        return self._model.config_text

    @property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Target name to what the task adds there; estimates first."""
        return self._run.part(self._name).targets

    @property
    def privates(self) -> Mapping[str, PrivateInfo]:
        """Name to description of every tensor that is kept whole; estimates first."""
        return self._run.part(self._name).privates

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """Every tensor and file of the model; estimates first."""
        return (*self._run.part(self._name).ledger, *file_lines(self._model))

    @functools.cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """Config and weight files with size and digest, hashed on first access."""
        return tuple(describe_file(path) for path in self._model.files)

    def prepare(self, progress: Progress | None = None) -> None:
        """Do the work for all tasks, unless that is done (see :meth:`LoreRun.prepare`)."""
        self._run.prepare(progress)

    def extraction(self) -> dict[str, Any]:
        """How factors were made, and the measured error.

        Keys: ``method``, ``mu``, ``steps``, ``objective`` (before and after), ``error`` and ``max``
        (of the distance from the base), ``model_error`` (of base and delta against the model's
        matrices).
        """
        part, options = self._run.part(self._name), self._run.options
        ends = [self._run.objective[0], self._run.objective[-1]] if self._run.objective else []
        return {
            "method": "lore",
            "mu": options.mu,
            "steps": options.steps,
            **({"rank": options.rank} if options.rank is not None else {}),
            **({"weight": options.weight} if options.weight != 1.0 else {}),
            "objective": [float(f"{value:.6g}") for value in ends],
            "error": math.sqrt(part.residual / part.energy) if part.energy else 0.0,
            "max": part.worst,
            "model_error": math.sqrt(part.residual / part.norm) if part.norm else 0.0,
        }

    def factors(self, target: str) -> Factors:
        """Read both factors of one target, float32; estimates first.

        Raises
        ------
        NotFoundError
            There is no such target.
        """
        part = self._run.part(self._name)
        if target not in part.targets:
            raise NotFoundError(f"no target is called {target!r}", path=self.path)
        spool = self._run.spool
        assert spool is not None  # the run is done  # noqa: S101
        return Factors(
            spool.get((self._name, target, "A")),
            spool.get((self._name, target, "B")),
            part.targets[target].scale,
        )

    def private_tensor(self, name: str) -> Array:
        """Read one private tensor in its stored dtype and shape.

        Raises
        ------
        NotFoundError
            There is no such tensor.
        NonFiniteError
            It holds NaN or infinity.
        """
        if name not in self._run.part(self._name).privates:
            raise NotFoundError(f"no private tensor is called {name!r}", path=self.path)
        array = self._model.read(name)
        if not self._run.options.allow_nonfinite:
            self._run.check_finite(self._name, name, array)
        return array
