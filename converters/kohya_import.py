"""LoRA files of image models as source tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rmmformat.converters.base import Options
from rmmformat.converters.files import JSON_LIMIT, open_plain
from rmmformat.converters.kohya_layout import ADAPTER_METADATA, lay_out, metadata_text
from rmmformat.converters.kohya_names import is_flat, modules_of
from rmmformat.converters.laid_out import LaidOutTask
from rmmformat.converters.names import check_name, task_name_of
from rmmformat.converters.tensors import SafetensorsStore, TensorStore
from rmmformat.errors import SourceError, UnsupportedError
from rmmformat.model import (
    Action,
    LedgerLine,
)

__all__ = ["find_files", "looks_like_lora", "open_file"]

_HEAD = 1 << 20  # bytes of a header in which a known name is looked for
_SIGNS = re.compile(
    rb'"(?:lora_(?:unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_[^".]+\.'
    rb'|"ss_network_module"'
    rb'|[._]lora[._](?:down|up)\.weight"'
    rb'|\.lora_linear_layer\.(?:down|up)\.weight"'
    rb'|"(?:unet|transformer|prior|text_encoder(?:_\d)?|diffusion_model)\.[^"]*\.lora_[AB]\.'
)
_DEFAULT_NAME = "pytorch_lora_weights"  # what diffusers calls every file
_PICKLES = (".pt", ".bin", ".ckpt", ".pth")


def looks_like_lora(path: Path) -> bool:
    """Say whether a safetensors file's header has names that these files have."""
    try:
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        with open_plain(path) as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(min(length, _HEAD))
    except (OSError, ValueError, SourceError):
        return False
    return head.startswith(b"{") and _SIGNS.search(head) is not None


def find_files(path: Path) -> list[tuple[str, Path]]:
    """Find the LoRA files at ``path``: itself, those in a folder, or one folder below."""
    if path.is_file():
        return [(_name_of(path), path)] if looks_like_lora(path) else []
    if not path.is_dir() or (path / "adapter_config.json").exists():
        return []
    here = [(_name_of(entry), entry) for entry in sorted(path.iterdir()) if looks_like_lora(entry)]
    if here:
        return here
    return [
        (_name_of(entry), entry)
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for entry in sorted(folder.glob("*.safetensors"))
        if looks_like_lora(entry) and not (folder / "adapter_config.json").exists()
    ]


def _name_of(path: Path) -> str:
    return task_name_of(path.parent) if path.stem == _DEFAULT_NAME else path.stem


def open_file(
    path: Path, name: str, options: Options, beside: tuple[Path, ...] = ()
) -> LaidOutTask:
    """Open one file; raises as an importer does.

    Parameters
    ----------
    beside
        Entries of its folder that are no LoRA files, for the ledger.
    """
    check_name(name, "task name", str(path))
    store = _open_store(path, options)
    metadata = _metadata(store)
    known = modules_of(options.base) if options.base is not None else {}
    mapped = {foreign: ours for ours, foreign in options.names.items()}
    notes: list[LedgerLine] = []

    def rename(module: str) -> str:
        if module in mapped:
            return mapped[module]
        if not known or not is_flat(module):
            return module
        found = known.get(module, "")
        if found is None:
            raise SourceError(
                f"{module!r} could be several modules of the base",
                path=str(path),
                hint="Say which with --map MODULE=NAME.",
            )
        if not found:
            detail = "notice: no module of the base has this name flattened; kept as it is"
            line = LedgerLine(f"module {module}", Action.USED, detail)
            if line not in notes:
                notes.append(line)
        return found or module

    def read_alpha(key: str) -> float:
        meta = store.metas[key]
        if meta.shape not in ((), (1,)) or meta.dtype.kind == "c":
            raise SourceError(
                f"tensor {key!r} of dtype {meta.dtype} and shape {meta.shape} is not one number",
                path=str(path),
            )
        return float(store.read(key).reshape(-1)[0])

    layout = lay_out(
        store.metas, metadata, read_alpha, rename, keep=not options.drop_private, path=str(path)
    )
    text, fields = _config(metadata)
    base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture", "")
    base = base.removesuffix("/lora").strip()
    ledger = (
        *fields,
        *layout.ledger,
        *notes,
        LedgerLine(f"file {path.name}", Action.USED, ""),
        *(
            LedgerLine(
                f"file {entry.name}{'/' if entry.is_dir() else ''}",
                Action.IGNORED,
                "notice: not a LoRA file",
            )
            for entry in beside
        ),
    )
    return LaidOutTask(
        name,
        path,
        check_name(base, "base model", str(path)) if base else "",
        text,
        store,
        layout,
        ledger,
        (path,),
        options.allow_nonfinite,
    )


def _open_store(path: Path, options: Options) -> TensorStore:
    if path.suffix not in _PICKLES:
        return SafetensorsStore((path,))
    if not options.allow_pickle:
        raise UnsupportedError(
            "a pickled file, and pickles are not allowed",
            path=str(path),
            hint="Use --allow-pickle (torch's restricted unpickler reads it), or save the file as "
            "safetensors.",
        )
    from rmmformat.converters.torch_pickle import TorchStore

    return TorchStore((path,))


def _metadata(store: TensorStore) -> dict[str, str]:
    return store.metadata() if isinstance(store, SafetensorsStore) else {}


def _config(metadata: Mapping[str, str]) -> tuple[str, list[LedgerLine]]:
    """Text of the metadata that is kept, and a ledger line for each of its fields."""
    kept = dict(metadata)
    lines = []
    while len(text := metadata_text(kept) if kept else "") > JSON_LIMIT // 4:
        longest = max(kept, key=lambda field: len(kept[field]))
        detail = f"notice: {len(kept.pop(longest))} characters, too long to keep"
        lines.append(LedgerLine(f"field {longest}", Action.IGNORED, detail))
    for field in sorted(kept):
        action = Action.USED if field == ADAPTER_METADATA else Action.STORED
        detail = "decides scales; kept" if field == ADAPTER_METADATA else "kept"
        lines.append(LedgerLine(f"field {field}", action, f"{detail} in the stored config"))
    return text, lines
