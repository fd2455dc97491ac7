"""A whole collection of low-rank adapters in one checked ``.rmm`` file, and any task back at once.

>>> import rmmformat as rmm
>>> rmm.convert(["adapters/sst2", "adapters/mnli"], "glue.rmm", max_error=0.05)  # doctest: +SKIP
>>> with rmm.open("glue.rmm") as collection:  # doctest: +SKIP
...     task = collection.load("sst2")
...     A = task["bert.encoder.layer.0.attention.self.query"].A
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rmmformat._version import __version__
from rmmformat.cache import TaskCache
from rmmformat.collection import Collection, LoadedTask
from rmmformat.collection import open_collection as open  # noqa: A004  # rmm.open is the product
from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.errors import RmmError
from rmmformat.format.validate import Report
from rmmformat.model import Factors, SourceTask

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from rmmformat import runtimes
    from rmmformat.coding import Align
    from rmmformat.grow import AddReport, CompactReport, RemoveReport
    from rmmformat.merge.rmm import Grouping
    from rmmformat.pipeline import ConvertReport, Progress

__all__ = [
    "Collection",
    "Factors",
    "LoadedTask",
    "Options",
    "Report",
    "RmmError",
    "SourceTask",
    "TaskCache",
    "__version__",
    "add",
    "compact",
    "convert",
    "open",
    "remove",
    "runtimes",
    "validate",
]

_Path = str | os.PathLike[str]


def __getattr__(name: str) -> Any:
    if name == "runtimes":  # at first use: most programs need none
        return importlib.import_module("rmmformat.runtimes")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def convert(
    sources: _Path | Iterable[_Path] | Mapping[str, _Path],
    path: _Path,
    *,
    max_error: float | str | None = None,
    size: float | str | None = None,
    components: int | None = None,
    exact: bool = False,
    grouping: Grouping | None = None,
    align: Align | None = None,
    encoding: str | None = None,
    kind: str | None = None,
    overwrite: bool = False,
    options: Options = DEFAULTS,
    allow_base_mismatch: bool = False,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Turn adapters into one file.

    Parameters
    ----------
    sources
        Adapter folders, a folder of them, ``NAME=PATH`` strings, or a mapping of names to paths.
    path
        The file to write; it appears whole or not at all.
    max_error
        Every delta's relative error stays within this bound, in as few bytes as can be: 0.05, or
        ``"5%"``.  This is what happens, with 0.05, if nothing else is asked for.
    size
        The factors take at most this part of their bytes, with errors as small as can be.
    components
        RMM as published, with this many directions a position.
    exact
        Every factor bit for bit.
    grouping
        ``"position"`` (default), ``"factor"``, ``"row"``, or a number of positions.
    align
        ``"none"`` (default), ``"svd"`` or ``"procrustes"``.
    encoding
        ``"f32"``, ``"f16"``, ``"bf16"``, ``"q8"``, ``"q4"``, or any of the specification's names.
    kind
        Format of the sources; detected by default.
    overwrite
        Replace an existing file.
    options
        What is allowed of the sources, and what some of them need: see :class:`Options`.
    allow_base_mismatch
        Take tasks of differently named bases.
    executor
        Any :class:`concurrent.futures.Executor` to code targets on; the file is the same.
    progress
        Called with what is being done, how much is done, and how much there is.

    Returns
    -------
    ConvertReport
        Sizes, and the measured error of every task.

    Raises
    ------
    SourceError, UnsupportedError, LossyConversionError, OptionError, RmmError
        Each says what, where and what to do; nothing half-written is left.
    """
    from rmmformat.methods import choose_method
    from rmmformat.pipeline import convert as run

    method = choose_method(
        max_error=max_error,
        size=size,
        components=components,
        exact=exact,
        grouping=grouping,
        align=align,
        encoding=encoding,
    )
    return run(
        sources,
        path,
        method,
        kind=kind,
        options=options,
        overwrite=overwrite,
        allow_base_mismatch=allow_base_mismatch,
        executor=executor,
        progress=progress,
    )


def add(
    path: _Path,
    sources: _Path | Iterable[_Path] | Mapping[str, _Path],
    *,
    replace: bool = False,
    max_error: float | str | None = None,
    size: float | str | None = None,
    exact: bool = False,
    encoding: str | None = None,
    kind: str | None = None,
    options: Options = DEFAULTS,
    allow_base_mismatch: bool = False,
    wait: float = 30.0,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> AddReport:
    """Add tasks to a file in place; at every instant it is valid and has all of them or none.

    Parameters
    ----------
    path
        The file.  Tasks that it has keep every byte; whoever has it open keeps what it was.
    sources
        As for :func:`convert`.
    replace
        Put a task in the place of one of its name; otherwise such are refused.
    max_error, size, exact, encoding
        How the new tasks are kept, as for :func:`convert`.  By default as the file says of itself;
        in a collection of `components` that is coefficients on the basis that is there.
    kind, options, allow_base_mismatch, executor, progress
        As for :func:`convert`.
    wait
        Seconds to wait for another writer.

    Returns
    -------
    AddReport
        The measured error of every new task, and the file's length before and after.

    Raises
    ------
    LossyConversionError
        A task of that name is there already.
    SourceError, UnsupportedError, OptionError, RmmError, OSError
        Each says what, where and what to do; the file is as it was.
    """
    from rmmformat.grow import add as run
    from rmmformat.methods import choose_method

    method = None
    if exact or any(option is not None for option in (max_error, size, encoding)):
        method = choose_method(max_error=max_error, size=size, exact=exact, encoding=encoding)
    return run(
        path,
        sources,
        method,
        replace=replace,
        kind=kind,
        options=options,
        allow_base_mismatch=allow_base_mismatch,
        wait=wait,
        executor=executor,
        progress=progress,
    )


def remove(path: _Path, tasks: str | Iterable[str], *, wait: float = 30.0) -> RemoveReport:
    """Leave tasks out of a file in place: all of them, or none if something fails.

    Their bytes stay, unused, until :func:`compact`.

    Parameters
    ----------
    path
        The file.
    tasks
        Names of tasks, or one name.
    wait
        Seconds to wait for another writer.

    Raises
    ------
    NotFoundError
        No such task; the hint names the nearest.
    RmmError, OSError
        The file is as it was.
    """
    from rmmformat.grow import remove as run

    return run(path, [tasks] if isinstance(tasks, str) else tasks, wait=wait)


def compact(path: _Path, *, wait: float = 30.0) -> CompactReport:
    """Write a file anew without what nothing uses, and put it in the old one's place at once.

    Parameters
    ----------
    path
        The file.
    wait
        Seconds to wait for another writer.

    Raises
    ------
    RmmError, OSError
        The file is as it was.
    """
    from rmmformat.grow import compact as run

    return run(path, wait=wait)


def validate(path: _Path) -> Report:
    """Check every rule of the specification over every byte of a file.

    Parameters
    ----------
    path
        The file; it is mapped, not read whole.

    Returns
    -------
    Report
        ``ok``, and ``violations`` with rule, offset and message.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    from rmmformat.inspect import validate_path

    return validate_path(path)
