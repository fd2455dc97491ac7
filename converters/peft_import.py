"""PEFT adapter folders as source tasks."""

from __future__ import annotations

from pathlib import Path

from rmmformat.converters.base import Options
from rmmformat.converters.laid_out import LaidOutTask
from rmmformat.converters.names import check_name, task_name_of
from rmmformat.converters.peft_config import CONFIG_NAME, read_settings
from rmmformat.converters.peft_layout import PeftLayout, describe_prefixes, lay_out
from rmmformat.converters.tensors import (
    SafetensorsStore,
    TensorStore,
    check_index,
    open_sharded,
)
from rmmformat.errors import SourceError, UnsupportedError
from rmmformat.model import (
    Action,
    LedgerLine,
)

__all__ = ["find_adapters", "open_adapter"]

# In the order of preference: a pickle beside a safetensors file is the older of the two.
_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.bin.index.json",
)


def open_adapter(folder: Path, name: str | None, options: Options) -> LaidOutTask:
    """Open one adapter folder; raises as an importer does."""
    task_name = check_name(task_name_of(folder) if name is None else name, "task name", str(folder))
    config_text, settings = read_settings(folder)
    weights = next((folder / w for w in _WEIGHTS if (folder / w).is_file()), None)
    if weights is None:
        raise SourceError(
            "the folder holds no adapter weights, expected adapter_model.safetensors, "
            "adapter_model.bin, or the .index.json of either",
            path=str(folder),
        )
    indexed = weights.name.endswith(".index.json")
    paths = open_sharded(weights) if indexed else (weights,)
    store = _open_store(weights, paths, options)
    if indexed:
        check_index(weights, store.metas)
    layout = lay_out(store.metas, settings, keep=not options.drop_private)
    files = (folder / CONFIG_NAME, *((weights,) if indexed else ()), *paths)
    ledger = (*settings.ledger, *layout.ledger, *_file_ledger(folder, files, layout))
    return LaidOutTask(
        task_name,
        folder,
        settings.base_model,
        config_text,
        store,
        layout,
        ledger,
        files,
        options.allow_nonfinite,
    )


def _open_store(weights: Path, paths: tuple[Path, ...], options: Options) -> TensorStore:
    if ".safetensors" in weights.name:
        return SafetensorsStore(paths)
    if not options.allow_pickle:
        raise UnsupportedError(
            "a pickled file, and pickles are not allowed",
            path=str(weights),
            hint="Use --allow-pickle (torch's restricted unpickler reads it), or save the "
            "adapter as safetensors.",
        )
    from rmmformat.converters.torch_pickle import TorchStore

    return TorchStore(paths)


def _file_ledger(folder: Path, files: tuple[Path, ...], layout: PeftLayout) -> list[LedgerLine]:
    prefixes = describe_prefixes(layout.prefixes)
    lines = []
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        label = f"file {entry.name}{'/' if entry.is_dir() else ''}"
        if entry in files:
            note = f"notice: {prefixes}" if prefixes and entry == files[-1] else ""
            lines.append(LedgerLine(label, Action.USED, note))
        elif entry.name.startswith("adapter_model"):
            lines.append(
                LedgerLine(label, Action.IGNORED, f"notice: superseded by {files[-1].name}")
            )
        else:
            lines.append(LedgerLine(label, Action.IGNORED, "not part of the adapter"))
    return lines


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG_NAME, *_WEIGHTS))


def find_adapters(path: Path) -> list[tuple[str | None, Path]]:
    """Find the adapter folders at ``path``, with the task name that the place suggests.

    A folder with a config or weights is one adapter, whatever its subfolders hold (checkpoints,
    mostly).  Otherwise its subfolders are looked at, and theirs: PEFT saves an adapter that is not
    called "default" in a subfolder of that name.  One adapter below a subfolder is named after the
    subfolder, several are named ``SUBFOLDER-ADAPTER``.
    """
    if path.is_file() and path.name in (CONFIG_NAME, *_WEIGHTS):
        path = path.parent
    if not path.is_dir():
        return []
    if _is_adapter(path):
        return [(None, path)]
    found: list[tuple[str | None, Path]] = []
    for child in _subfolders(path):
        if _is_adapter(child):
            found.append((child.name, child))
            continue
        inner = [grandchild for grandchild in _subfolders(child) if _is_adapter(grandchild)]
        if len(inner) == 1:
            found.append((child.name, inner[0]))
        else:
            found.extend((f"{child.name}-{grandchild.name}", grandchild) for grandchild in inner)
    return sorted(found, key=lambda pair: pair[0] or "")


def _subfolders(path: Path) -> list[Path]:
    return sorted(
        entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
