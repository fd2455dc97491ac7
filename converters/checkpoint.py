"""Full fine-tunes with their base model as source tasks (PT-SVD).

What is read is in :mod:`~rmmformat.converters.checkpoint_store`, what its tensors are in
:mod:`~rmmformat.converters.checkpoint_layout`, what is to be done with each in
:mod:`~rmmformat.converters.checkpoint_plan`, and the work in
:mod:`~rmmformat.converters.checkpoint_task`.
"""

from __future__ import annotations

from pathlib import Path

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.checkpoint_store import find_checkpoints, open_checkpoint
from rmmformat.converters.checkpoint_task import CheckpointTask
from rmmformat.converters.names import check_name, check_task_names
from rmmformat.errors import OptionError, SourceError
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
        try:
            found = find_checkpoints(path)
            if not found:
                raise SourceError("no model weights here or one folder below", path=str(path))
            if name is not None and len(found) > 1:
                raise SourceError(
                    f"holds {len(found)} models, and {name!r} can name only one", path=str(path)
                )
            base = open_checkpoint(options.base, options)
            tasks: list[SourceTask] = []
            for place, folder in found:
                tuned = open_checkpoint(folder, options)
                own = name if name is not None else place or tuned.name
                tasks.append(
                    CheckpointTask(check_name(own, "task name", str(folder)), tuned, base, options)
                )
        except OSError as error:
            raise SourceError(f"cannot read: {error}", path=str(path)) from error
        check_task_names([(task.name, task.path) for task in tasks])
        return tasks
