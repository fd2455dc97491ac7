"""Taking times: everybody in turn, medians; and whole programs, each in a process of its own."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Packages whose versions the header names.
PACKAGES = (
    "numpy",
    "torch",
    "safetensors",
    "transformers",
    "peft",
    "vlora-dev",
    "mergekit",
    "onnxruntime",
    "llama_cpp_python",
    "zstandard",
)


def available(*modules: str) -> bool:
    """Whether modules can be imported; nothing is imported."""
    return all(find_spec(name) is not None for name in modules)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians of one contender, in seconds: on the clock, and of the processor."""

    clock: float
    cpu: float
    fastest: float


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm: int = 1,
    least: int = 3,
    enough: float = 20,
) -> dict[str, Timing]:
    """Let each contender work once a round, so that all meet the same noise.

    After the `least` rounds there is no further one once `enough` seconds are over.
    """
    clocks: dict[str, list[float]] = {name: [] for name in contenders}
    cpus: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()
    begin = time.perf_counter()
    for number in range(-warm, rounds):
        if number >= least and time.perf_counter() - begin > enough:
            break
        for name, work in contenders.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            cpu, clock = time.process_time() - cpu_start, time.perf_counter() - start
            if number >= 0:
                clocks[name].append(clock)
                cpus[name].append(cpu)
    gc.unfreeze()
    return {
        name: Timing(statistics.median(clocks[name]), statistics.median(cpus[name]), min(clock))
        for name, clock in clocks.items()
    }


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program took.

    Attributes
    ----------
    seconds
        From its start to its end, the interpreter's included.
    importing
        Seconds of that for its imports.
    cpu
        The processors' time after its imports, of all threads.
    peak
        Most resident memory, bytes; pages of mapped files count while they are resident.
    """

    seconds: float
    importing: float
    cpu: float
    peak: int
    out: str


def run_program(where: str, words: Sequence[object], threads: int) -> Program:
    """Run a console script, ``MODULE:FUNCTION`` as packages declare it, and watch it.

    Raises
    ------
    RuntimeError
        It failed; its last words are in the message.
    """
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = {**os.environ, **dict.fromkeys(variables, str(threads)), "HF_HUB_OFFLINE": "1"}
    child = Path(__file__).with_name("child.py")
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        command = [sys.executable, str(child), str(told), where, *map(str, words)]
        start = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode or not told.exists():
            raise RuntimeError(f"{where}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(told.read_text())
    return Program(seconds, found["importing"], found["cpu"], found["peak"], done.stdout)


def machine() -> list[str]:
    """What the figures were measured on, one fact a line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    found = {
        d.name.lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()
    }
    versions = (
        f"{package} {found.get(package.lower().replace('-', '_'), 'not installed')}"
        for package in ("rmmformat", *PACKAGES)
    )
    return [
        f"{name}, {len(cpus())} processors, {platform.system()} {platform.release()}{load}",
        f"Python {platform.python_version()}, {', '.join(versions)}",
    ]


def cpus() -> Sequence[int]:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)
