"""Names of tasks, and the parts of a PEFT tensor name."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from rmmformat.errors import SourceError

__all__ = [
    "NAME_LIMIT",
    "AdapterKey",
    "check_name",
    "check_task_names",
    "parse_adapter_key",
    "strip_wrappers",
    "task_name_of",
]

NAME_LIMIT = 1024  # bytes of UTF-8: the container's limit for any string

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_name(name: str, what: str, path: str) -> str:
    """Return ``name`` if the container can hold it.

    Raises
    ------
    SourceError
        It is empty, too long, not Unicode, or holds control characters.
    """
    try:
        n_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise SourceError(f"{what} {name!a} is not valid Unicode", path=path) from error
    if not 1 <= n_bytes <= NAME_LIMIT:
        raise SourceError(
            f"{what} {name[:40]!r}... has {n_bytes} bytes, expected 1 to {NAME_LIMIT}", path=path
        )
    if _CONTROL.search(name):
        raise SourceError(f"{what} {name!r} holds control characters", path=path)
    return name


def check_task_names(tasks: Sequence[tuple[str, str]]) -> None:
    r"""Refuse a collection in which two task names could be taken for one another.

    Names count as equal if they are so after Unicode normalisation (NFKC), case folding, and taking
    ``/``, ``\`` and ``_`` for one character: file systems, registries and servers do each of these.

    Parameters
    ----------
    tasks
        (name, path) of every task.

    Raises
    ------
    SourceError
        Two names collide, or a name cannot be stored or cannot be a file name.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, path in tasks:
        check_name(name, "task name", path)
        if name.strip(" .") == "" or name != name.strip():
            raise SourceError(
                f"task name {name!r} has no letters or has blanks at its ends",
                path=path,
                hint="Give it another name: NAME=SOURCE.",
            )
        folded = unicodedata.normalize("NFKC", name).casefold()
        folded = unicodedata.normalize("NFKC", re.sub(r"[/\\_]", "_", folded))
        if folded in seen:
            other, other_path = seen[folded]
            how = "are the same" if other == name else "differ only in case, form or separators"
            raise SourceError(
                f"task names {other!r} (from {other_path}) and {name!r} {how}",
                path=path,
                hint="Give one of them another name: NAME=SOURCE.",
            )
        seen[folded] = (name, path)


def task_name_of(folder: Path) -> str:
    """Name a task after its folder; a folder of the Hub's cache is named after its repository."""
    resolved = Path(folder.absolute()) if folder.name not in ("", ".", "..") else folder.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent.name.split("--")[-1]
    return resolved.name


# --- tensor names -----------------------------------------------------------------------------

_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def strip_wrappers(key: str) -> tuple[str, int]:
    """Strip what PEFT and torch put around a model from a tensor name.

    Returns
    -------
    name, n_prefixes
        The name inside the model and how often PEFT's ``base_model.model.`` stood before it: 1 as
        saved by PEFT, 0 where a tool left it out, 2 where wrappers were stacked.
    """
    if not _WRAPPERS.isdisjoint(key.split(".")):
        key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    key = key.removeprefix("module.") if key.startswith("module." + _PREFIX) else key
    n_prefixes = 0
    while key.startswith(_PREFIX):
        key = key[len(_PREFIX) :]
        n_prefixes += 1
    return key, n_prefixes


@dataclasses.dataclass(frozen=True)
class AdapterKey:
    """A tensor name taken apart.

    Parameters
    ----------
    module
        Path of the adapted module.
    part
        ``lora_A``, ``lora_B``, ``lora_embedding_A``, ``lora_embedding_B``, ``lora_B.bias`` or
        ``lora_magnitude_vector``.
    adapter
        The adapter's name where the tensor name holds it, else None.
    """

    module: str
    part: str
    adapter: str | None


# The last occurrence of a part counts and parts are whole path segments, so that modules and
# adapters may be called "lora", "weight" or even "lora_A".
_PATTERNS = (
    re.compile(
        r"(?:(?P<module>.+)\.)?(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)",
    ),
    re.compile(r"(?:(?P<module>.+)\.)?(?P<part>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?"),
    re.compile(
        r"(?:(?P<module>.+)\.)?(?P<part>lora_magnitude_vector)"
        r"(?:\.(?!weight\Z)(?P<adapter>[^.]+))?(?:\.weight)?"
    ),
)


def parse_adapter_key(name: str) -> AdapterKey | None:
    """Take a tensor name apart, wrappers already stripped; None if it is not part of an adapter.

    >>> parse_adapter_key("msa_pair_weighted_avg.lin.lora_A.default.weight")
    AdapterKey(module='msa_pair_weighted_avg.lin', part='lora_A', adapter='default')
    """
    for pattern in _PATTERNS:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        part, adapter = match["part"], match["adapter"]
        if match.groupdict().get("leaf") == "bias":
            if part == "lora_A":
                return None
            part = "lora_B.bias"
        if part.startswith("lora_embedding") and adapter == "weight":
            adapter = None
        return AdapterKey(match["module"] or "", part, adapter)
    return None
