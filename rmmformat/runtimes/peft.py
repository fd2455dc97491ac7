"""Tasks as PEFT adapters of a torch model, overwritten in place from task to task.

:func:`load` adds one adapter to the model, with room for the tasks of a collection; :func:`switch`
then copies another task's factors, and its head, biases and magnitudes, into the live parameters.
No module, parameter or Python number changes with it, so a compiled model is not compiled again.

One model serves one switch or one forward pass at a time: a pass that runs while another thread
switches sees some of each task.  Servers take a lock, or a copy of the model a thread; one open
collection, or one :class:`~rmmformat.cache.TaskCache`, serves them all.

Factors are reconstructed in this process's memory and copied to wherever the parameters are, so
that devices need no care: parameters follow ``model.to(...)`` as always.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rmmformat.cache import TaskCache
from rmmformat.collection import Collection
from rmmformat.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rmmformat.runtimes.peft_live import LiveAdapter

__all__ = ["find", "load", "switch", "unload"]

OLDEST_PEFT = (0, 21)


def load(
    model: nn.Module,
    collection: Collection | TaskCache,
    task: str,
    *,
    adapter_name: str | None = None,
    tasks: Iterable[str] | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    private: bool = True,
    threads: int = 1,
) -> LiveAdapter:
    """Put a task into a model, as a PEFT adapter with room for others.

    Parameters
    ----------
    model
        A torch module, a transformers model or a PeftModel, of the class that the adapters were
        trained on.  It is changed in place, as by PEFT's ``inject_adapter_in_model``: its own
        parameters are frozen, the adapter is activated.  Compile it afterwards.
    collection
        An open collection, or a cache of one.
    task
        Name of the task.
    adapter_name
        PEFT's name of the adapter, ``"rmm"`` by default.
    tasks
        Between which tasks to switch later: their targets, ranks and private tensors get room, as
        far as they fit the model.  By default all of the collection.  A task of a smaller rank is
        filled with zeros, which costs the time of the larger rank: ``tasks=[task]`` makes an
        adapter of exactly this task's size.
    max_rank
        Rank of every target, for tasks that are not in the collection yet; by default the largest
        of `tasks` at each target.
    dtype
        Of the factors: a torch dtype, ``"f32"``, ``"f16"``, ``"bf16"``, or ``"base"`` for that of
        each base weight.  By default float32, as ``PeftModel.from_pretrained`` has it for half
        precision.
    private
        False leaves heads, biases and whatever else tasks carry beside their factors as they are
        in the model.  DoRA's magnitudes and biases of B count as factors.
    threads
        For the reconstruction.  One by default: where other threads are busy, several wait for one
        another.  0 chooses by the size of the task.

    Returns
    -------
    LiveAdapter
        The adapter, for callers that want to ask it or to switch through it.

    Raises
    ------
    NotFoundError, ShapeError
        There is no such task, or the model lacks a module or tensor of it, or has another shape.
    UnsupportedError
        PEFT cannot adapt a module, or the task has replaced rows of an embedding.
    OptionError
        The model has an adapter of that name, or `max_rank` is too small.
    FormatError
        A factor cannot be decoded.

    Notes
    -----
    The model is as it was after any error.  PEFT keeps heads apart for each adapter, but has one
    bias for all: tasks with biases write over the base model's own, which come back with
    :func:`unload` or a task without.

    Examples
    --------
    >>> model = AutoModelForSequenceClassification.from_pretrained(...)  # doctest: +SKIP
    >>> rmmformat.runtimes.peft.load(model, collection, "sst2")  # doctest: +SKIP
    >>> rmmformat.runtimes.peft.switch(model, collection, "mnli")  # doctest: +SKIP
    """
    _need_libraries()
    from rmmformat.runtimes.peft_load import add

    return add(
        model,
        collection,
        task,
        name=adapter_name,
        tasks=tasks,
        max_rank=max_rank,
        dtype=dtype,
        private=private,
        threads=threads,
    )


def switch(
    model: nn.Module,
    collection: Collection | TaskCache,
    task: str,
    *,
    adapter_name: str | None = None,
    threads: int = 1,
) -> None:
    """Put another task in the place of the one that :func:`load` put into the model.

    The live parameters are written over: factors, filled with zeros up to the live rank; the head
    and other private tensors.  Targets and private tensors that the task lacks become as in the
    base model.  Nothing else changes, gradients and the active adapter included.

    Parameters
    ----------
    model
        As for :func:`load`; also compiled or wrapped since.
    collection
        The collection, another one of the same base, or a cache.  From a cache, a task that is
        in memory is only copied.
    task
        Name of the task.
    adapter_name
        Which adapter, where :func:`load` made several.
    threads
        As for :func:`load`.

    Raises
    ------
    NotFoundError, ShapeError, UnsupportedError
        There is no such task, or it does not fit the live adapter; the hint names the remedy.
    FormatError
        A factor cannot be decoded.
    RmmError
        The adapter is merged into the base weights, or no longer in the model.

    Notes
    -----
    After any error the model has the old task, whole.
    """
    find(model, adapter_name).switch(collection, task, threads=threads)


def find(model: nn.Module, adapter_name: str | None = None) -> LiveAdapter:
    """Find an adapter that :func:`load` made.

    Raises
    ------
    NotFoundError
        There is none of that name, or several and no name is given.
    """
    _need_libraries()
    from rmmformat.runtimes.peft_load import find as run

    return run(model, adapter_name)


def unload(model: nn.Module, adapter_name: str | None = None) -> None:
    """Take an adapter that :func:`load` made out of the model again.

    Layers with no adapter left become the base's own; overwritten biases come back.

    Raises
    ------
    NotFoundError
        As :func:`find`.
    RmmError
        It is merged into the base weights.
    """
    _need_libraries()
    from rmmformat.runtimes.peft_load import remove

    remove(model, adapter_name)


def _need_libraries() -> None:
    try:
        import peft
    except ImportError as error:
        raise UnsupportedError(
            f"adapters in torch models need PEFT: {error}",
            hint="Install it: pip install 'rmmformat[peft]'.",
        ) from error
    # Earlier ones activate and freeze a second adapter of a model in other ways.
    version = tuple(int(part) for part in re.findall(r"\d+", peft.__version__)[:2])
    if version < OLDEST_PEFT:
        raise UnsupportedError(
            f"adapters in torch models need PEFT {'.'.join(map(str, OLDEST_PEFT))} or later, and "
            f"{peft.__version__} is installed",
            hint="Update it: pip install --upgrade peft.",
        )
