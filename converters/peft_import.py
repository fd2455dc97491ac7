"""PEFT adapter folders as source tasks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from rmmformat.converters.base import Options
from rmmformat.converters.files import describe_file
from rmmformat.converters.names import check_name, task_name_of
from rmmformat.converters.peft_config import CONFIG_NAME, LoraSettings, read_settings
from rmmformat.converters.peft_layout import Layout, describe_prefixes, lay_out
from rmmformat.converters.tensors import (
    SafetensorsStore,
    TensorStore,
    check_index,
    open_sharded,
    read_finite,
)
from rmmformat.errors import NotFoundError, SourceError, UnsupportedError
from rmmformat.model import (
    Action,
    Array,
    Factors,
    LedgerLine,
    PrivateInfo,
    SourceFile,
    TargetInfo,
)

__all__ = ["PeftTask", "find_adapters", "open_adapter"]

# In the order of preference: a pickle beside a safetensors file is the older of the two.
_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.bin.index.json",
)


class PeftTask:
    """One PEFT adapter as a source task; reads tensors when asked for them."""

    def __init__(
        self,
        name: str,
        folder: Path,
        config_text: str,
        settings: LoraSettings,
        store: TensorStore,
        layout: Layout,
        ledger: tuple[LedgerLine, ...],
        files: tuple[Path, ...],
        allow_nonfinite: bool,
    ) -> None:
        self._name = name
        self._folder = folder
        self._config_text = config_text
        self._settings = settings
        self._store = store
        self._layout = layout
        self._ledger = ledger
        self._files = files
        self._allow_nonfinite = allow_nonfinite

    @property
    def name(self) -> str:
        """Name of the task."""
        return self._name

    @property
    def path(self) -> str:
        """The adapter's folder."""
        return str(self._folder)

    @property
    def base_model(self) -> str:
        """The config's base_model_name_or_path, or the empty string."""
        return self._settings.base_model

    @property
    def config_text(self) -> str:
        """The text of adapter_config.json."""
        return self._config_text

    @property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Target name to what the task adds there."""
        return self._layout.targets

    @property
    def privates(self) -> Mapping[str, PrivateInfo]:
        """Name to description of every private tensor."""
        return self._layout.privates

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """Every tensor, config field and file of the folder."""
        return self._ledger

    @functools.cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """Config and weight files with size and digest, hashed on first access."""
        return tuple(describe_file(path) for path in self._files)

    def factors(self, target: str) -> Factors:
        """Read both factors of one target in their stored dtypes; convolutions are flattened.

        Raises
        ------
        NotFoundError
            There is no such target.
        NonFiniteError
            A factor holds NaN or infinity.
        """
        if target not in self._layout.targets:
            raise NotFoundError(f"no target is called {target!r}", path=self.path)
        info, keys = self._layout.targets[target], self._layout.target_keys[target]
        a, b = self._read(keys.a), self._read(keys.b)
        return Factors(
            a.reshape(info.rank, info.shape.n_in),
            b.reshape(info.shape.n_out, info.rank),
            info.scale,
        )

    def private_tensor(self, name: str) -> Array:
        """Read one private tensor in its stored dtype and shape; raises as :meth:`factors` does."""
        if name not in self._layout.privates:
            raise NotFoundError(f"no private tensor is called {name!r}", path=self.path)
        return self._read(self._layout.private_keys[name])

    def _read(self, key: str) -> Array:
        return read_finite(self._store, key, allow=self._allow_nonfinite)


def open_adapter(folder: Path, name: str | None, options: Options) -> PeftTask:
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
    return PeftTask(
        task_name,
        folder,
        config_text,
        settings,
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


def _file_ledger(folder: Path, files: tuple[Path, ...], layout: Layout) -> list[LedgerLine]:
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
