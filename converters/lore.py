"""Fine-tunes whose base is not known (LoRE-Merging): an estimated base, and low-rank deltas.

The models are read together, so they are one source or given together, and the format must be
named (``--from lore``).  The estimate is written as a model of its own
(:mod:`~rmmformat.converters.lore_base`); what is left of each model is a task
(:mod:`~rmmformat.converters.lore_task`).  The work is in
:mod:`~rmmformat.converters.lore_run`:

- matrices that differ between the models: the estimate of the alternating minimisation in the base,
  a low-rank delta in the task (``options.mu``, ``options.steps``; at most ``options.rank``
  components; scaled by ``options.weight``);
- other tensors that differ (biases, norms, an embedding that is the output weight, too): the mean
  in the base, and the model's own tensor whole as a private tensor of the task;
- tensors that not all models have in one shape (heads): private tensors alone;
- tensors that are the same in all models: the base alone.

Source: LoRE-Merging, arXiv 2502.10749.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.checkpoint_store import Checkpoint, find_checkpoints, open_checkpoint
from rmmformat.converters.lore_run import LoreRun
from rmmformat.converters.lore_task import LoreTask
from rmmformat.converters.names import check_name, check_task_names
from rmmformat.converters.places import open_each
from rmmformat.errors import OptionError, SourceError
from rmmformat.model import SourceTask

__all__ = ["LoreImporter"]


class LoreImporter:
    """Reads fine-tunes of one unknown base, all together."""

    name = "lore"

    def detect(self, path: Path) -> bool:  # noqa: ARG002
        """Say no: without being asked for, nobody wants an estimated base."""
        return False

    def open(
        self, path: Path, *, name: str | None = None, options: Options = DEFAULTS
    ) -> list[SourceTask]:
        """Open every model of a folder of models; raises as :meth:`open_together` does."""
        return self.open_together([(name, path)], options=options)

    def open_together(
        self, sources: Iterable[tuple[str | None, Path]], *, options: Options = DEFAULTS
    ) -> list[SourceTask]:
        """Open several models as fine-tunes of one base.

        Parameters
        ----------
        sources
            (name, path) of models, or of folders of models; a name of None takes the folder's own.
        options
            ``write_base``, where the estimate goes, is needed.

        Raises
        ------
        OptionError
            No place for the base, or a parameter is out of range.
        SourceError
            Fewer than two models, or they are not of one base; broken ones.
        UnsupportedError
            A quantised model, an adapter, or pickled and not allowed.
        """
        base = _check(options)
        models: dict[str, Checkpoint] = {}
        named: list[tuple[str, str]] = []
        path = Path()
        for name, path in sources:
            for task, model in _open_source(name, path, options):
                named.append((task, str(model.path)))
                models[task] = model
        check_task_names(named)
        if len(models) < 2:
            raise SourceError(
                f"{len(models)} model here, and a base can be estimated from two or more",
                path=str(path),
                hint="Give all fine-tunes together, or the base: --from checkpoint --base FOLDER.",
            )
        run = LoreRun(models, options, base)
        return [LoreTask(name, run) for name in models]


def _open_source(name: str | None, path: Path, options: Options) -> list[tuple[str, Checkpoint]]:
    def open_one(folder: Path, own: str | None) -> tuple[str, Checkpoint]:
        model = open_checkpoint(folder, options)
        return check_name(model.name if own is None else own, "task name", str(folder)), model

    return open_each(
        path,
        name,
        find_checkpoints,
        open_one,
        what="model weights here or one folder below",
        many="models",
    )


def _check(options: Options) -> Path:
    if options.write_base is None:
        raise OptionError(
            "the base is estimated, and deltas are worth nothing without it",
            hint="Say where it goes: --write-base FOLDER.",
        )
    for field, value, good in (
        ("mu", options.mu, options.mu >= 0),
        ("steps", options.steps, options.steps >= 1),
        ("weight", options.weight, True),
    ):
        if not (good and math.isfinite(value)):
            raise OptionError(f"{field} is {value}, which is out of range")
    return options.write_base
