"""What an importer and an exporter of a foreign format promise.

The neutral value between the two is :class:`rmmformat.model.SourceTask`.  An importer makes such
tasks from foreign files; a task read back from an ``.rmm`` file is one too; an exporter takes any
of them.  So every importer can be joined to every exporter, and the pair of one format can be
tested by going round.

An **importer**

- has a ``name``, the word that the command line and the registry know it by;
- answers ``detect(path)`` from names and at most a few bytes, without importing a heavy library and
  without raising: False where the path does not exist or cannot be read;
- answers ``open(path, name=..., options=...)`` with one task or, for a folder of adapters,
  several, in the order of their names.  ``name`` renames a single task; with several it is an
  error;
- reads no tensor data in ``open``, and keeps none in memory afterwards: ``factors`` and
  ``private_tensor`` read at each call, and raise :class:`~rmmformat.errors.NonFiniteError` for a
  tensor with NaN or infinity unless ``options.allow_nonfinite``.  Where only the data tell what
  the targets are (a fine-tune beside its base), the task has a method ``prepare(progress)``
  (:class:`Prepared`), which goes through the data once and may keep what it computes in a
  temporary file without a name; so do ``targets``, ``privates`` and ``ledger`` of such a task, if
  nobody has called it before;
- resolves every scaling rule of its format to **one** scale per target, so that
  ``scale * B @ A`` is what the foreign runtime adds;
- accounts for every tensor, configuration field and file of its source: used, folded into another
  value, stored as it is, ignored for a stated reason, or refused by an error that names it.  A
  ledger line whose detail starts with ``notice:`` is one that a person should see;
- refuses what it cannot represent exactly, with :class:`~rmmformat.errors.UnsupportedError` and the
  remedy, and what is broken with :class:`~rmmformat.errors.SourceError` and the tensor or field at
  fault.  No other exception leaves it, whatever bytes it is given, and memory and time stay in
  proportion to the size of the files;
- never runs code from its source.

An **exporter**

- has a ``name``, and answers ``export(task, out, force=..., options=...)`` with the ledger of what
  it wrote, left out or changed;
- writes what the foreign ecosystem's own loader reads back *completely*, and raises
  :class:`~rmmformat.errors.LossyConversionError` before writing where the format cannot hold
  something, naming it and the option that lets it go;
- writes beside the destination and renames (see :mod:`rmmformat.converters.files`): after an error
  or an interrupt there is no half-written output, and existing output is replaced only with
  ``force``;
- chooses every file name inside ``out`` itself: no name from the task becomes part of a path;
- gives the same bytes for the same task.

Foreign libraries are imported inside functions.  A new format is one new module, one line in
:mod:`rmmformat.converters.registry`, and samples for :mod:`rmmformat.converters.contract`, whose
checks hold formats to all of the above; a third party registers through the entry-point group
``rmmformat.converters``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rmmformat.model import LedgerLine, SourceTask

__all__ = ["DEFAULTS", "Exporter", "Importer", "Joint", "Options", "Prepared"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may allow or ask for; every importer and exporter reads what concerns it.

    Parameters
    ----------
    allow_pickle
        Read pickled weight files with the restricted unpickler of torch 2.6 or newer, which builds
        tensors and runs no code.  Off by default, such a file is refused.
    allow_nonfinite
        Hand out tensors that hold NaN or infinity, to look into a broken adapter.
    drop_private
        Leave private tensors (heads, biases, magnitudes, ...) behind: importing, they are listed in
        the ledger only; exporting, they are not written.
    base
        The base model, for formats that cannot be read or written without a look at it.
    dtype
        Of exported factors: ``"f32"``, ``"f16"``, ``"bf16"``, or what else the format has.  By
        default the task's own.
    names
        Target name to foreign name, where a format's own rule cannot tell.
    rank, energy, extract_error
        How many components are extracted from the change of a whole weight: at most so many; the
        fewest that keep this part of its squared norm; the fewest that leave at most this relative
        error.  By default 16.
    svd
        How: ``"exact"``, ``"random"``, or ``"auto"``, which chooses by size.
    write_base
        Folder for a base that is estimated (LoRE).
    mu, steps, weight
        Of LoRE: the threshold on singular values, the most rounds, and what deltas are scaled by.
    """

    allow_pickle: bool = False
    allow_nonfinite: bool = False
    drop_private: bool = False
    base: Path | None = None
    dtype: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    extract_error: float | None = None
    svd: str = "auto"
    write_base: Path | None = None
    mu: float = 0.01
    steps: int = 20
    weight: float = 1.0


DEFAULTS = Options()


@runtime_checkable
class Prepared(Protocol):
    """A source task whose targets must be computed; also a :class:`SourceTask`."""

    def extraction(self) -> Mapping[str, Any]:
        """How factors were made: parameters, and ``error``, the measured relative error."""

    def prepare(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compute all that is not known yet; calling it again costs nothing.

        Parameters
        ----------
        progress
            Called with what is being done, how much of it is done, and how much there is.

        Raises
        ------
        SourceError, UnsupportedError, RmmError
            As ``open``.
        """


@runtime_checkable
class Joint(Protocol):
    """An importer whose sources are read together; also an :class:`Importer`."""

    def open_together(
        self, sources: Iterable[tuple[str | None, Path]], *, options: Options = DEFAULTS
    ) -> list[SourceTask]:
        """Open (name, path) pairs as one collection; raises as ``open`` does."""


class Importer(Protocol):
    """Reads one foreign format (contract: the module's docstring)."""

    @property
    def name(self) -> str:
        """The format's name in the registry."""

    def detect(self, path: Path) -> bool:
        """Say whether ``path`` looks like this format, cheaply and without raising."""

    def open(
        self, path: Path, *, name: str | None = None, options: Options = DEFAULTS
    ) -> list[SourceTask]:
        """Open every task at ``path``.

        Raises
        ------
        SourceError
            The source is broken or empty; the message names file and tensor or field.
        UnsupportedError
            The source is sound, but a collection cannot hold its kind, or a library is missing.
        """


class Exporter(Protocol):
    """Writes one foreign format (contract: the module's docstring)."""

    @property
    def name(self) -> str:
        """The format's name in the registry."""

    def export(
        self, task: SourceTask, out: Path, *, force: bool = False, options: Options = DEFAULTS
    ) -> tuple[LedgerLine, ...]:
        """Write ``task`` to ``out`` and return the ledger of what was written and left out.

        Raises
        ------
        LossyConversionError
            The format cannot hold something that the task has.
        UnsupportedError
            The format has no way to express the task.
        RmmError
            ``out`` exists and ``force`` is not set, or cannot be written.
        """
