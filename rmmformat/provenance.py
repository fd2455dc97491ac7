"""The metadata that the product writes: what was kept, how, from which files, with which error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rmmformat._version import __version__
from rmmformat.converters.base import Prepared
from rmmformat.merge.error import summarize
from rmmformat.model import SourceTask

__all__ = ["described_anew", "described_further"]

Errors = Mapping[str, Mapping[str, float]]


def described_anew(
    tasks: Sequence[SourceTask],
    base: Mapping[str, Any],
    method: Mapping[str, object],
    errors: Errors,
) -> dict[str, Any]:
    """Metadata of a new collection.

    Parameters
    ----------
    tasks
        What it is made of.
    base
        The key ``base_model``: id and fingerprint, each if known.
    method
        Name and parameters.
    errors
        Measured error by task and target.
    """
    empty = {"method": dict(method), "configs": [], "tasks": {}}
    return described_further(empty, tasks, base, errors)


def described_further(
    metadata: Mapping[str, Any],
    tasks: Sequence[SourceTask],
    base: Mapping[str, Any] | None,
    errors: Errors,
    *,
    dropped: Iterable[str] = (),
    method: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Metadata of a collection that some tasks have joined, and some left.

    Parameters
    ----------
    metadata
        What it was; keys that are not known here stay.
    tasks, errors
        Of those that join.
    base
        The key ``base_model`` from now on; None where it stays.
    dropped
        Names of those that leave.
    method
        How those that join are kept, where it is not what the collection says.
    """
    old_configs = metadata.get("configs", [])
    described = {name: dict(task) for name, task in metadata.get("tasks", {}).items()}
    for name in dropped:
        described.pop(name, None)
    # Texts instead of numbers until it is known which are left.
    for task in described.values():
        if "config" in task:
            task["config"] = old_configs[int(task["config"])]
    for new in tasks:
        described[new.name] = _description(new, errors[new.name])
        if method is not None:
            described[new.name]["method"] = dict(method)
    configs = sorted({task["config"] for task in described.values() if "config" in task})
    for task in described.values():
        if "config" in task:
            task["config"] = configs.index(task["config"])
    result = {
        "method": {"name": "unknown"},
        **metadata,
        "producer": f"rmmformat {__version__}",
        "configs": configs,
        "tasks": described,
    }
    result["base_model"] = dict(metadata.get("base_model", {}) if base is None else base)
    return result


def _description(task: SourceTask, errors: Mapping[str, float]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "factor_bytes": sum(info.n_bytes for info in task.targets.values()),
        "files": [dataclasses.asdict(file) for file in task.files],
    }
    if isinstance(task, Prepared):
        entry["extraction"] = {
            key: _short(value) if isinstance(value, float) else value
            for key, value in task.extraction().items()
        }
    if task.config_text:
        entry["config"] = task.config_text
    measured = [error for error in errors.values() if np.isfinite(error)]
    if measured:
        summary = summarize(measured)
        entry["error"] = {
            "mean": _short(summary.mean),
            "median": _short(summary.median),
            "max": _short(summary.max),
        }
    return entry


def _short(value: float) -> float:
    """Six digits: what comes behind them is noise that would not deflate."""
    return float(f"{value:.6g}")
