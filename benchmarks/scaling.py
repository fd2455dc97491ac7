"""How conversion and loading scale with the number of adapters.

    python benchmarks/scaling.py             # time a task, n = 10, 100, 1,000 tiny adapters
    python benchmarks/scaling.py --memory    # peak memory, n = 25, 50, 100 adapters of 7B shapes

The first makes PEFT folders of twelve tiny targets each and reports seconds per task of opening the
sources, converting, opening the file and loading a task.  The second makes adapters with the shapes
of one layer of a 7B model (q, k, v, o of 4096 x 4096; up, gate, down of 4096 x 11008) at rank 16 in
float32: a thirty-second part of a whole adapter of 160 MB.  Conversion goes target by target, so
its memory does not depend on how many layers there are, which is also shown (--layers).  Every
measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

TINY = {f"m{i}": (16, 12) for i in range(12)}
LAYER = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.up_proj": (4096, 11008),
    "mlp.gate_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}
METHODS: dict[str, dict[str, Any]] = {
    "components": {"components": 2},
    "exact": {"exact": True},
    "planned": {"max_error": 0.05},
}


def make_adapters(
    folder: Path, n: int, targets: dict[str, tuple[int, int]], rank: int, dtype: Any
) -> None:
    """PEFT folders that are there already are kept.

    They have something in common, as adapters of one model do, and spectra that fall.
    """
    from safetensors.numpy import save_file

    common = np.random.default_rng(0)
    bases = {
        name: (common.standard_normal((rank, n_in)), common.standard_normal((n_out, rank)))
        for name, (n_in, n_out) in targets.items()
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "synthetic/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in targets}),
    }
    fall = (1.0 / np.arange(1, rank + 1)) ** 0.5
    for number in range(n):
        path = folder / f"task-{number:04}"
        if path.exists():
            continue
        rng = np.random.default_rng(number + 1)
        tensors = {}
        for name, (a, b) in bases.items():
            own_a = (0.3 * a + rng.standard_normal(a.shape)) * fall[:, None] / a.shape[1] ** 0.5
            own_b = (0.3 * b + rng.standard_normal(b.shape)) * 0.01
            tensors[f"base_model.model.{name}.lora_A.weight"] = own_a.astype(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = own_b.astype(dtype)
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))


class Watch:
    """Peak of this process's own memory, looked at every 5 ms.

    Pages of mapped source files are left out: they are the system's to take back at any time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self.start = self.peak = _anonymous()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split() for line in status.splitlines()}
    return 1024 * (int(found["RssAnon"][1]) + int(found["RssShmem"][1]))


def one(folder: str, n: int, method: str, out: str) -> dict[str, float]:
    """Convert n adapters in this process and load tasks of the result."""
    import rmmformat as rmm
    from rmmformat.methods import choose_method
    from rmmformat.pipeline import convert, open_sources

    clock = time.perf_counter
    paths = sorted(Path(folder).iterdir())[:n]
    open_sources(paths[:1])  # imports
    with Watch() as watch:
        start = clock()
        tasks = open_sources(paths)
        opened = clock()
        report = convert(tasks, out, choose_method(**METHODS[method]), overwrite=True)
        converted = clock()
    found = {
        "sources": opened - start,
        "convert": converted - opened,
        "peak": watch.peak,
        "grown": watch.peak - watch.start,
        "file_bytes": report.file_bytes,
        "original_bytes": report.original_bytes,
    }
    opens, loads = [], []
    for _ in range(20):
        start = clock()
        rmm.open(out).close()
        opens.append(clock() - start)
    with rmm.open(out) as collection:
        step = max(1, n // 50)
        for name in collection.tasks[::step]:
            start = clock()
            collection.load(name)
            loads.append(clock() - start)
    return {**found, "open": float(np.median(opens)), "load": float(np.median(loads))}


def measure(folder: Path, n: int, method: str, out: Path) -> dict[str, float]:
    """Run :func:`one` in a process of its own."""
    command = [sys.executable, __file__, "--one", str(folder), str(n), method, str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def times(work: Path, counts: list[int], methods: list[str]) -> None:
    """Print seconds per task."""
    folder = work / "tiny"
    make_adapters(folder, max(counts), TINY, 2, np.float32)
    table = Table(title=f"tiny adapters of {len(TINY)} targets, rank 2; milliseconds per task")
    for column in ("method", "n", "open sources", "convert", "bytes a task", "open file", "load"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in methods:
        for n in counts:
            found = measure(folder, n, method, work / "x.rmm")
            table.add_row(
                method,
                f"{n}",
                f"{1e3 * found['sources'] / n:.2f}",
                f"{1e3 * found['convert'] / n:.2f}",
                f"{found['file_bytes'] / n:.0f}",
                f"{1e3 * found['open']:.2f}",
                f"{1e3 * found['load']:.3f}",
            )
    Console().print(table)


def memory(work: Path, counts: list[int], methods: list[str], layers: int) -> None:
    """Print peak memory."""
    targets = {
        f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()
    }
    folder = work / f"layers-{layers}"
    make_adapters(folder, max(counts), targets, 16, np.float32)
    title = f"adapters with the shapes of {layers} of 32 layers of a 7B model, rank 16, float32"
    table = Table(title=title)
    for column in ("method", "n", "originals", "file", "seconds", "peak", "grown by"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in methods:
        for n in counts:
            found = measure(folder, n, method, work / "x.rmm")
            table.add_row(
                method,
                f"{n}",
                f"{found['original_bytes'] / 1e6:.0f} MB",
                f"{found['file_bytes'] / 1e6:.1f} MB",
                f"{found['convert']:.1f}",
                f"{found['peak'] / 2**20:.0f} MiB",
                f"{found['grown'] / 2**20:.0f} MiB",
            )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of adapters")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that fit")
    parser.add_argument("--layers", type=int, default=1, help="with --memory")
    parser.add_argument("--work", type=Path, help="keep what is made in this folder")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, n, method, out = given.one
        print(json.dumps(one(folder, int(n), method, out)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if given.memory:
            counts = given.counts or [25, 50, 100]
            memory(work, counts, given.methods or ["components", "exact"], given.layers)
        else:
            times(work, given.counts or [10, 100, 1000], given.methods or ["components", "exact"])


if __name__ == "__main__":
    main()
