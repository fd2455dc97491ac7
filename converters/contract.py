"""A test kit for importers and exporters, for the formats here and for those of plug-ins.

The contract itself is the text of :mod:`rmmformat.converters.base`.  A format gives a
:class:`Provider` with small sources of its own and a way to read back what its exporter wrote; the
checks of :mod:`~rmmformat.converters.contract_import` and
:mod:`~rmmformat.converters.contract_export` are functions over these.  A check passes in silence or
raises :class:`ContractError`, an :class:`AssertionError`, so that any test runner will do::

    from rmmformat.converters.contract_import import IMPORT_CHECKS

    @pytest.mark.parametrize("check", IMPORT_CHECKS, ids=lambda check: check.__name__)
    def test_contract(check, tmp_path):
        check(MyImporter(), SAMPLE, tmp_path)
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rmmformat.converters.base import DEFAULTS, Importer, Options
from rmmformat.errors import RmmError
from rmmformat.model import Array, Factors, SourceTask

__all__ = [
    "MEMORY_LIMIT",
    "TIME_LIMIT",
    "UNKNOWN",
    "ContractError",
    "Flaw",
    "Output",
    "Provider",
    "Sample",
    "Wrapped",
    "bounded",
    "closed",
    "compare_deltas",
    "deltas_of",
    "digest_tree",
    "read_all",
    "require",
]

Deltas = Mapping[str, npt.NDArray[np.float64]]

#: Name of the tensor that a sample with :attr:`Flaw.EXTRA` has beside its own.
UNKNOWN = "no_such_module.no_such_tensor"

_NOBODY = 65534

TIME_LIMIT = 20.0  # seconds for one source of a few kilobytes, on a slow and busy machine
MEMORY_LIMIT = 64 << 20  # bytes that Python and numpy may take for it


class ContractError(AssertionError):
    """A format breaks the contract; the message says how."""


class Flaw(enum.Enum):
    """What is wrong with a source that is built."""

    NONE = "none"
    EXTRA = "extra"  # one more tensor, called UNKNOWN
    NAN = "nan"  # one value of one factor is NaN


@dataclasses.dataclass(frozen=True)
class Sample:
    """A small source of one format and what must come of it.

    Parameters
    ----------
    name
        For messages and test ids.
    build
        Writes the source below an empty folder and returns the path to open.  A base model, where
        one is needed, goes below the same folder.
    deltas
        Target name to the delta (n_out, n_in) in float64, reckoned without the importer.
    items
        What the ledger must hold beside one line ``file NAME`` for every file of the source:
        ``"tensor NAME"`` and ``"field NAME"``, all of them.
    options
        What is needed to open the path that ``build`` returned.
    detected
        Whether the format is found without being named.
    several
        Where the source holds several tasks, the one that is judged.
    by_name
        Whether detection goes by a file's name or first word alone, so that noise with it counts.
    flaws
        Flaws that ``build`` can make.
    tolerance
        Relative Frobenius distance allowed between ``deltas`` and what is read.
    """

    name: str
    build: Callable[[Path, Flaw], Path]
    deltas: Deltas
    items: frozenset[str]
    options: Callable[[Path], Options] = lambda _path: DEFAULTS
    detected: bool = True
    several: str = ""
    by_name: bool = False
    flaws: frozenset[Flaw] = frozenset(Flaw)
    tolerance: float = 1e-6

    def open(
        self, importer: Importer, path: Path, *, name: str | None = None, **changes: Any
    ) -> SourceTask:
        """Open the task that is judged; ``changes`` are fields of :class:`Options`."""
        options = dataclasses.replace(self.options(path), **changes)
        return self.choose(importer.open(path, name=name, options=options))

    def choose(self, tasks: Sequence[SourceTask]) -> SourceTask:
        """Give the one that is judged of the tasks of the source."""
        if self.several:
            tasks = [task for task in tasks if task.name == self.several]
        require(len(tasks) == 1, f"{self.name}: expected one task, got {len(tasks)}")
        return tasks[0]


@dataclasses.dataclass(frozen=True)
class Output:
    """How to judge what an exporter wrote.

    Parameters
    ----------
    filename
        A name for the output, with the suffix that is usual; of a file or a folder.
    read
        Reads the output with the foreign ecosystem's own library and gives the deltas by the names
        of our targets, those of the task.
    takes
        Samples, ``"FORMAT/NAME"``, that it must be able to write.  Others it may refuse.
    options
        What is needed to write the task, given a folder for whatever must exist (a base model).
    tolerance
        Relative Frobenius distance allowed.
    back
        Name under which the format's own importer finds a target again.
    """

    filename: str
    read: Callable[[Path, SourceTask], Deltas]
    takes: frozenset[str]
    options: Callable[[SourceTask, Path], Options] = lambda _task, _folder: DEFAULTS
    tolerance: float = 1e-6
    back: Callable[[str], str] = lambda name: name


@dataclasses.dataclass(frozen=True)
class Provider:
    """What a format hands to the kit."""

    format: str
    samples: tuple[Sample, ...] = ()
    output: Output | None = None


def require(condition: object, message: str) -> None:
    """Raise :class:`ContractError` unless ``condition`` holds."""
    if not condition:
        raise ContractError(message)


def deltas_of(task: SourceTask) -> dict[str, npt.NDArray[np.float64]]:
    """Form every delta of a task, ``scale * B @ A`` in float64."""
    formed = {}
    for target in task.targets:
        factors = task.factors(target)
        formed[target] = factors.scale * (
            factors.B.astype(np.float64) @ factors.A.astype(np.float64)
        )
    return formed


def compare_deltas(got: Deltas, expected: Deltas, tolerance: float, what: str) -> None:
    """Hold deltas against the expected ones, name by name."""
    require(
        set(got) == set(expected), f"{what}: targets {sorted(got)}, expected {sorted(expected)}"
    )
    for name, delta in expected.items():
        require(
            got[name].shape == delta.shape,
            f"{what}: {name} has shape {got[name].shape}, expected {delta.shape}",
        )
        distance = float(np.linalg.norm(got[name] - delta))
        bound = tolerance * float(np.linalg.norm(delta))
        require(
            distance <= bound,
            f"{what}: the delta of {name} is {distance:.3g} off, allowed are {bound:.3g}",
        )


def read_all(importer: Importer, path: Path, options: Options) -> list[SourceTask]:
    """Open a source and read whatever its tasks offer."""
    tasks = importer.open(path, options=options)
    for task in tasks:
        for info in task.targets.values():
            require(math.isfinite(info.scale), "a scale is not finite")
        for target in task.targets:
            task.factors(target)
        for private in task.privates:
            task.private_tensor(private)
        _ = task.config_text, task.base_model, task.ledger, task.files
    return tasks


def digest_tree(folder: Path) -> dict[str, bytes | None]:
    """Contents of every file below ``folder``; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Hold a piece of work to :data:`TIME_LIMIT` and :data:`MEMORY_LIMIT`."""
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with _alarm(what):
            yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    took = time.perf_counter() - started
    require(took < TIME_LIMIT, f"{what}: took {took:.1f} s")
    require(peak < MEMORY_LIMIT, f"{what}: took {peak} bytes")


@contextlib.contextmanager
def _alarm(what: str) -> Iterator[None]:
    """Break off what waits for ever, where the system has alarms and this is the main thread."""
    here = threading.current_thread() is threading.main_thread()
    if not (here and hasattr(signal, "setitimer")):
        yield
        return

    def ring(_number: int, _frame: object) -> None:
        raise ContractError(f"{what}: not done after {TIME_LIMIT} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


class Wrapped:
    """A task with some of its answers changed.

    Parameters
    ----------
    task
        What answers everything else.
    name
        Another name.
    rename
        Changes the names of targets.
    fails_at
        Number of the reading call, from 0, that raises ``error``.
    """

    def __init__(
        self,
        task: SourceTask,
        *,
        name: str | None = None,
        rename: Callable[[str], str] = lambda target: target,
        fails_at: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        self._task = task
        self._own = {rename(target): target for target in task.targets}
        self._left = fails_at
        self._error = error
        self.name = task.name if name is None else name
        self.targets = {new: task.targets[old] for new, old in self._own.items()}
        self.n_reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def factors(self, target: str) -> Factors:
        """Read one target's factors, or fail."""
        self._count()
        return self._task.factors(self._own[target])

    def private_tensor(self, name: str) -> Array:
        """Read one private tensor, or fail."""
        self._count()
        return self._task.private_tensor(name)

    def _count(self) -> None:
        if self._error is not None and self.n_reads == self._left:
            raise self._error
        self.n_reads += 1


def refused(act: Callable[[], object], kinds: type[RmmError] | tuple[type[RmmError], ...]) -> bool:
    """Say whether ``act`` raises one of ``kinds``; any other exception goes through."""
    try:
        act()
    except kinds:
        return True
    return False


def source_files(path: Path) -> list[Path]:
    """Entries of a source that its ledger must name."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


@contextlib.contextmanager
def closed(folder: Path) -> Iterator[bool]:
    """Take a folder's permissions away, the superuser's too; gives whether that was possible."""
    mode = folder.stat().st_mode
    root = may_read_anything()
    if root and not hasattr(os, "seteuid"):
        yield False
        return
    folder.chmod(0)
    try:
        if root:
            os.seteuid(_NOBODY)
        yield True
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(mode)


def may_read_anything() -> bool:
    """Say whether permissions hold nobody back here (the superuser, Windows)."""
    return not hasattr(os, "geteuid") or os.geteuid() == 0
