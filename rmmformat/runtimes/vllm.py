"""Tasks in vLLM: a LoRA resolver that looks the adapters of requests up in a collection.

vLLM calls :func:`register` through the entry point ``rmm_resolver`` of the group
``vllm.general_plugins``, in each of its processes.  A request that names an adapter which the
server does not know is then answered by :meth:`Resolver.resolve_lora`: the task of that name is
written as a PEFT folder in memory, and vLLM loads it from there.

Settings come from the environment, since that is all that a plug-in has: :class:`Settings`.

Source: vLLM's documentation, "LoRA Resolver Plugins", and its ``vllm.lora.resolver`` (LoRAResolver,
LoRAResolverRegistry) and ``vllm.lora.request`` (LoRARequest).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmmformat.collection import Collection, open_collection
from rmmformat.converters.base import Options
from rmmformat.converters.peft import PeftExporter
from rmmformat.errors import NotFoundError, OptionError, RmmError
from rmmformat.model import Action
from rmmformat.runtimes.vllm_folders import Scratch

__all__ = ["Resolver", "Settings", "register"]

#: A child of vLLM's own logger, so that its handlers show what is said here.
_LOG = logging.getLogger("vllm.rmmformat")

_NAME = "RMM resolver"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment says.

    Parameters
    ----------
    collection
        ``RMM_VLLM_COLLECTION``: the file.
    cache
        ``RMM_VLLM_CACHE``: where adapter folders go; by default into memory.
    dtype
        ``RMM_VLLM_DTYPE``: ``"f32"``, ``"f16"`` or ``"bf16"`` of factors; by default the task's.
    any_base
        ``RMM_VLLM_ANY_BASE=1``: serve tasks whatever base model the file names.
    """

    collection: Path
    cache: Path | None = None
    dtype: str | None = None
    any_base: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings | None:
        """Read them; None where no collection is named.

        Raises
        ------
        OptionError
            A dtype or switch that does not exist.
        NotFoundError
            The file or the cache's folder is not there.
        """
        name = environment.get("RMM_VLLM_COLLECTION", "")
        if not name:
            return None
        if not Path(name).is_file():
            raise NotFoundError("RMM_VLLM_COLLECTION names no file", path=name)
        cache = environment.get("RMM_VLLM_CACHE", "")
        if cache and not Path(cache).is_dir():
            raise NotFoundError("RMM_VLLM_CACHE names no folder", path=cache)
        dtype = environment.get("RMM_VLLM_DTYPE", "")
        if dtype not in ("", "f32", "f16", "bf16"):
            raise OptionError(f"RMM_VLLM_DTYPE is f32, f16 or bf16, got {dtype!r}")
        any_base = environment.get("RMM_VLLM_ANY_BASE", "0")
        if any_base not in ("0", "1"):
            raise OptionError(f"RMM_VLLM_ANY_BASE is 0 or 1, got {any_base!r}")
        return cls(Path(name), Path(cache) if cache else None, dtype or None, any_base == "1")


class Resolver:
    """Tasks of one file as adapter folders, each written once.

    The file is opened when a task is first asked for, and anew when it has changed: tasks that were
    added since are found, and folders that vLLM may hold stay as they are.

    Parameters
    ----------
    settings
        Which file, and how.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._collection: Collection | None = None
        self._stamp: tuple[int, ...] = ()
        self._scratch: Scratch | None = None
        self._folders: dict[str, Path] = {}
        self._complained: set[str] = set()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Answer vLLM: a LoRARequest, or None where the file has no such task for this base model.

        What is wrong with file or task is logged, and answered with None.
        """
        path = await asyncio.to_thread(self.folder, base_model_name, lora_name)
        if path is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name=lora_name, lora_int_id=_number(path), lora_path=str(path))

    def folder(self, base_model: str, task: str) -> Path | None:
        """Write a task's folder unless it is there; None where vLLM should look elsewhere."""
        with self._lock:
            try:
                return self._folder(base_model, task)
            except (RmmError, OSError) as error:
                _LOG.error("%s cannot be served: %s", ascii(task), error)
                return None

    def close(self) -> None:
        """Remove the folders, and close the file."""
        with self._lock:
            self._folders.clear()
            if self._scratch is not None:
                self._scratch.close()
                self._scratch = None
            if self._collection is not None:
                self._collection.close()
                self._collection = None

    def _folder(self, base_model: str, task: str) -> Path | None:
        collection = self._opened()
        if task not in collection.tasks:
            return None
        named = str(collection.metadata.get("base_model", {}).get("id", ""))
        if named and named != base_model and not self.settings.any_base:
            if base_model not in self._complained:
                self._complained.add(base_model)
                _LOG.warning(
                    "%s is of base model %s, not of %s: it serves nothing here "
                    "(RMM_VLLM_ANY_BASE=1 allows it)",
                    self.settings.collection, ascii(named), ascii(base_model),
                )  # fmt: skip
            return None
        if task not in self._folders:
            if self._scratch is None:
                self._scratch = Scratch(self.settings.cache)
            out = self._scratch.new_path()
            # vLLM adapts weights alone, and refuses adapters that bring modules of their own.
            options = Options(drop_private=True, dtype=self.settings.dtype)
            lines = PeftExporter().export(collection.source(task), out, options=options)
            dropped = [
                line.item
                for line in lines
                if line.action is Action.IGNORED and line.item.startswith("tensor ")
            ]
            if dropped:
                _LOG.warning("%s goes without %s", ascii(task), ascii(", ".join(dropped)))
            self._folders[task] = out
        return self._folders[task]

    def _opened(self) -> Collection:
        about = self.settings.collection.stat()
        stamp = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        if self._collection is None or stamp != self._stamp:
            collection = open_collection(self.settings.collection)
            if self._collection is not None:
                self._collection.close()
                self._folders.clear()  # tasks may have been replaced; the folders themselves stay
            self._collection, self._stamp = collection, stamp
        return self._collection


def _number(path: Path) -> int:
    """An id that is vLLM's for this folder and no other: positive, within 63 bits."""
    return 1 + int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:7], "little")


def register() -> None:
    """Join vLLM's resolvers, if ``RMM_VLLM_COLLECTION`` names a file; once, however often called.

    Raises
    ------
    OptionError, NotFoundError
        A setting that cannot be: better at the start of a server than at its first request.
    """
    settings = Settings.read(os.environ)
    if settings is None:
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if _NAME in LoRAResolverRegistry.get_supported_resolvers():
        return

    class RmmResolver(Resolver, LoRAResolver):  # type: ignore[misc]  # vLLM has no types here
        """vLLM's interface over :class:`Resolver`."""

    LoRAResolverRegistry.register_resolver(_NAME, RmmResolver(settings))
