"""A whole model as ``save_pretrained`` leaves it: weights in shards, an index, a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rmmformat.converters.checkpoint_store import CONFIG_NAME
from rmmformat.converters.files import atomic_folder
from rmmformat.converters.safetensors_writer import Planned, write_safetensors
from rmmformat.converters.tensors import SafetensorsStore
from rmmformat.errors import RmmError

__all__ = ["SHARD_BYTES", "write_model"]

SHARD_BYTES = 5_000_000_000
_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def write_model(
    folder: Path,
    tensors: Mapping[str, Planned],
    config_text: str,
    mark: str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's folder, one tensor at a time; it appears whole or not at all.

    Parameters
    ----------
    folder
        What is there already is replaced if it carries the same mark, and otherwise not.
    tensors
        Name to what is to be written.  Each is read once.
    config_text
        The text of ``config.json``; no such file where it is empty.
    mark
        Metadata key by which a folder written here is known.
    shard_bytes
        Largest file, unless one tensor alone is larger.

    Raises
    ------
    RmmError
        The folder holds something else, or cannot be written.
    """
    shards: list[dict[str, Planned]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        if shards[-1] and size + tensor.n_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.n_bytes
    number = len(shards)
    files = [_ONE] if number == 1 else [_shard(n, number) for n in range(1, number + 1)]
    _check_mark(folder, mark)
    known = frozenset({CONFIG_NAME, _ONE, _INDEX, *files, *_marked_files(folder)})
    with atomic_folder(folder, force=True, known=known) as place:
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(place / file, shard, {"format": "pt", mark: "1"})
        if number > 1:
            index = {
                "metadata": {"total_size": sum(tensor.n_bytes for tensor in tensors.values())},
                "weight_map": {
                    name: file for file, shard in zip(files, shards, strict=True) for name in shard
                },
            }
            text = json.dumps(index, ensure_ascii=False, indent=2, sort_keys=True)
            (place / _INDEX).write_text(text, encoding="utf-8")
        if config_text:
            (place / CONFIG_NAME).write_text(config_text, encoding="utf-8", newline="")


def _shard(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def _marked_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [path.name for path in folder.glob("model*.safetensors")]


def _check_mark(folder: Path, mark: str) -> None:
    """Refuse a folder with weights that were not written here."""
    for name in _marked_files(folder):
        if mark not in SafetensorsStore((folder / name,)).metadata():
            raise RmmError(
                f"holds a model that is no estimate ({name}): it is not replaced",
                path=str(folder),
                hint="Name a new folder.",
            )
