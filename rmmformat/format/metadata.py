"""The metadata section: its shape and its schema (specification, section 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["fault"]

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _error(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _hex(value: Any) -> bool:
    return isinstance(value, str) and value != "" and set(value) <= set("0123456789abcdef")


def _sha256(value: Any) -> bool:
    return _hex(value) and len(value) == 64


_TOP: dict[str, type] = {
    "producer": str,
    "base_model": dict,
    "method": dict,
    "configs": list,
    "tasks": dict,
}
_FILE: dict[str, Check] = {"name": _text, "n_bytes": _count, "sha256": _sha256}
_ERROR: dict[str, Check] = {"mean": _error, "median": _error, "max": _error}


def fault(value: dict[str, Any]) -> str | None:
    """Say what breaks the metadata schema (RMM-091), or None.

    The schema is ``spec/metadata.schema.json``; written out here so that validation needs no
    schema library at run time.  The tests compare the two.
    """
    for key, kind in _TOP.items():
        if key not in value:
            return f"{key} is missing"
        if not isinstance(value[key], kind):
            return f"{key} is not {'an object' if kind is dict else 'a ' + kind.__name__}"
    if not _text(value["base_model"].get("id", "")):
        return "base_model.id is not a string"
    if "fingerprint" in value["base_model"]:
        what = _fingerprint_fault(value["base_model"]["fingerprint"])
        if what is not None:
            return f"base_model.fingerprint: {what}"
    if not _text(value["method"].get("name")):
        return "method.name is not a string"
    if not all(_text(config) for config in value["configs"]):
        return "configs holds what is not a string"
    for name, task in value["tasks"].items():
        what = _task_fault(task, len(value["configs"]))
        if what is not None:
            return f"tasks.{name}: {what}"
    return None


def _fingerprint_fault(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "not an object"
    if not _text(value.get("algorithm")):
        return "algorithm is not a string"
    if not _hex(value.get("digest")):
        return "digest is not hexadecimal"
    targets = value.get("targets")
    if not isinstance(targets, dict) or not all(map(_hex, targets.values())):
        return "targets is not an object of hexadecimal digests"
    return None


def _task_fault(task: Any, n_configs: int) -> str | None:
    if not isinstance(task, dict):
        return "not an object"
    if "config" in task and not (_count(task["config"]) and task["config"] < n_configs):
        return "config is not an index into configs"
    if "source" in task and not _text(task["source"]):
        return "source is not a string"
    if "factor_bytes" in task and not _count(task["factor_bytes"]):
        return "factor_bytes is not a count"
    files = task.get("files", [])
    if not isinstance(files, list):
        return "files is not a list"
    for file in files:
        if not isinstance(file, dict) or not all(
            key in file and check(file[key]) for key, check in _FILE.items()
        ):
            return "files holds what is not name, n_bytes and sha256"
    error = task.get("error", {})
    if not isinstance(error, dict) or not all(
        key in _ERROR and _ERROR[key](number) for key, number in error.items()
    ):
        return "error is not mean, median and max"
    extraction = task.get("extraction", {})
    if not isinstance(extraction, dict) or not all(
        _error(extraction.get(key, 0)) for key in ("error", "max")
    ):
        return "extraction has no relative errors"
    return None
