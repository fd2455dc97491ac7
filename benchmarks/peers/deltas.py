"""Errors of deltas, one a task and target, against PEFT folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

import rmmformat as rmm
from rmmformat.converters.registry import get_importer
from rmmformat.merge.error import relative_error
from rmmformat.model import SourceTask

Pair = tuple[np.ndarray, np.ndarray, float]  # A, B, scale


def open_source(folder: Path, kind: str = "peft") -> SourceTask:
    (task,) = get_importer(kind).open(folder)
    return task


def errors_against(source: SourceTask, found: Mapping[str, Pair]) -> list[float]:
    """Relative Frobenius error of each delta of the source."""
    errors = []
    for target in source.targets:
        original = source.factors(target)
        A, B, scale = found[target]
        errors.append(relative_error(original.A, original.B, original.scale, A, B, scale))
    return errors


def errors_of_file(path: Path, sources: list[Path]) -> list[float]:
    """Those of an .rmm file, loaded as a runtime would load it."""
    errors = []
    with rmm.open(path) as collection:
        for folder in sources:
            task = collection.load(folder.name)
            found = {name: (task[name].A, task[name].B, task[name].scale) for name in task}
            errors += errors_against(open_source(folder), found)
    return errors
