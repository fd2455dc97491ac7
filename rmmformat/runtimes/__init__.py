"""Tasks in the runtimes that serve them: one module a runtime, each imported at its first use.

:mod:`~rmmformat.runtimes.peft`
    PEFT adapters of a torch model.
:mod:`~rmmformat.runtimes.onnx`
    ONNX Runtime sessions.
:mod:`~rmmformat.runtimes.llamacpp`
    llama.cpp.
:mod:`~rmmformat.runtimes.vllm`
    vLLM, as a plug-in of its own.

Importing this package, or ``rmmformat``, imports no runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmmformat.runtimes import llamacpp as llamacpp
    from rmmformat.runtimes import onnx as onnx
    from rmmformat.runtimes import peft as peft
    from rmmformat.runtimes import vllm as vllm

_MODULES = ("llamacpp", "onnx", "peft", "vllm")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
