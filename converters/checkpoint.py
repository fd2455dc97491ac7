"""Full fine-tunes with their base model as source tasks (PT-SVD).

What is read is in :mod:`~rmmformat.converters.checkpoint_store`, what its tensors are in
:mod:`~rmmformat.converters.checkpoint_layout`, what is to be done with each in
:mod:`~rmmformat.converters.checkpoint_plan`, and the work in
:mod:`~rmmformat.converters.checkpoint_task`.
"""

from __future__ import annotations

import functools
from pathlib import Path

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.checkpoint_store import find_checkpoints, open_checkpoint
from rmmformat.converters.checkpoint_task import CheckpointTask
from rmmformat.converters.names import check_name, check_task_names
from rmmformat.converters.places import open_each
from rmmformat.errors import OptionError
from rmmformat.model import SourceTask

__all__ = ["CheckpointImporter"]


class CheckpointImporter:
    """Reads a fine-tuned model, or every one of a folder of such, beside ``options.base``."""

    name = "checkpoint"

    def detect(self, path: Path) -> bool:
        """Say whether there are model weights at ``path`` or one folder below."""
        try:
            return bool(find_checkpoints(path))
        except OSError:
            return False

    def open(
        self, path: Path, *, name: str | None = None, options: Options = DEFAULTS
    ) -> list[SourceTask]:
        """Open every fine-tune at ``path``; names, shapes and configs are compared with the base's.

        Parameters
        ----------
        path
            A model's folder, its weight file or index, or a folder of model folders.
        name
            Name of the task; by default the folder's.
        options
            ``base`` is needed; ``rank``, ``energy``, ``extract_error`` and ``svd`` say how factors
            are made.

        Raises
        ------
        OptionError
            No base is given, or it is unclear how factors are to be made.
        SourceError
            Broken, or no fine-tune of this base; ``name`` given for several.
        UnsupportedError
            A quantised model, an adapter, or pickled and not allowed.
        """
        if options.base is None:
            raise OptionError(
                f"{path} holds a whole model, which can be read only beside its base",
                hint="Name the model that it was trained from: --base FOLDER.",
            )
        base = functools.cache(functools.partial(open_checkpoint, options.base, options))

        def open_one(folder: Path, own: str | None) -> SourceTask:
            against = base()
            tuned = open_checkpoint(folder, options)
            own = check_name(tuned.name if own is None else own, "task name", str(folder))
            return CheckpointTask(own, tuned, against, options)

        tasks = open_each(
            path,
            name,
            find_checkpoints,
            open_one,
            what="model weights here or one folder below",
            many="models",
        )
        check_task_names([(task.name, task.path) for task in tasks])
        return tasks
