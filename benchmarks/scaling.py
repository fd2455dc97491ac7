"""How conversion and loading scale: with adapters, rank, components, width of the model.

    python benchmarks/scaling.py             # time a task, n = 10, 100, 1,000 tiny adapters
    python benchmarks/scaling.py --memory    # peak memory, n = 25 to 400 adapters of 7B shapes
    python benchmarks/scaling.py --speed     # converting beside reading the same files
    python benchmarks/scaling.py --merge     # positions merged a second, beside numpy's SVD
    python benchmarks/scaling.py --sweeps    # n, rank, components and width, one at a time
    python benchmarks/scaling.py --json FILE # the rows of any of them, too

The first makes PEFT folders of twelve tiny targets each and reports seconds per task of opening the
sources, converting, opening the file and loading a task.  Memory and speed are of adapters with the
shapes of one layer of a 7B model (q, k, v, o of 4096 x 4096; up, gate, down of 4096 x 11008) at
rank 16 in float32: a thirty-second part of a whole adapter of 160 MB.  Conversion goes target by
target, so its memory does not depend on how many layers there are, which can be shown with
--layers.  Every conversion that is measured is a process of its own, and sources are read from the
system's page cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Shapes = dict[str, tuple[int, int]]
Row = dict[str, Any]

TINY: Shapes = {f"m{i}": (16, 12) for i in range(12)}
LAYER: Shapes = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.up_proj": (4096, 11008),
    "mlp.gate_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}
METHODS: dict[str, dict[str, Any]] = {
    "components": {"components": 3},
    "exact": {"exact": True},
    "planned": {"max_error": 0.05},
}
#: Different files; further adapters are links to them.
DISTINCT = 50
CONSOLE = Console(width=120)


def make_adapters(folder: Path, n: int, targets: Shapes, rank: int, dtype: Any) -> None:
    """PEFT folders that are there already are kept.

    They have something in common, as adapters of one model do, and spectra that fall.
    """
    from safetensors.numpy import save_file

    common = np.random.default_rng(0)
    bases = {
        name: (
            common.standard_normal((rank, n_in), np.float32),
            common.standard_normal((n_out, rank), np.float32),
        )
        for name, (n_in, n_out) in targets.items()
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "synthetic/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in targets}),
    }
    fall = (1.0 / np.arange(1, rank + 1, dtype=np.float32)) ** 0.5
    big = sum(n_in + n_out for n_in, n_out in targets.values()) * rank > 10**5
    for number in range(n):
        path = folder / f"task-{number:04}"
        if path.exists():
            continue
        path.mkdir(parents=True)
        weights = path / "adapter_model.safetensors"
        if big and number >= DISTINCT:
            first = folder / f"task-{number % DISTINCT:04}"
            os.link(first / weights.name, weights)
        else:
            rng = np.random.default_rng(number + 1)
            tensors = {}
            for name, (a, b) in bases.items():
                own_a, own_b = (rng.standard_normal(x.shape, np.float32) for x in (a, b))
                own_a = (0.3 * a + own_a) * fall[:, None] / np.float32(a.shape[1] ** 0.5)
                own_b = (0.3 * b + own_b) * np.float32(0.01)
                tensors[f"base_model.model.{name}.lora_A.weight"] = own_a.astype(dtype)
                tensors[f"base_model.model.{name}.lora_B.weight"] = own_b.astype(dtype)
            save_file(tensors, weights)
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


def read_all(paths: list[Path]) -> int:
    """Copy every tensor of every file, as the safetensors library gives them."""
    from safetensors import safe_open

    total = 0
    opener: Any = safe_open
    for path in paths:
        with opener(str(path / "adapter_model.safetensors"), framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118  # not a dictionary
                total += handle.get_tensor(name).nbytes
    return total


def one(folder: str, n: int, method: str, out: str, rounds: int) -> Row:
    """Convert n adapters in this process and load tasks of the result."""
    import rmmformat as rmm
    from rmmformat.methods import choose_method
    from rmmformat.pipeline import convert, open_sources

    clock = time.perf_counter
    options = json.loads(method)
    paths = sorted(Path(folder).iterdir())[:n]
    open_sources(paths[:1])  # imports
    reads, opened, converted, worked = [], [], [], []
    with Watch() as watch:
        for _ in range(rounds):
            start = clock()
            read_all(paths if rounds > 1 else paths[:1])
            reads.append(clock() - start)
            start, worked_before = clock(), time.process_time()
            tasks = open_sources(paths)
            opened.append(clock() - start)
            report = convert(tasks, out, choose_method(**options), overwrite=True)
            converted.append(clock() - start - opened[-1])
            worked.append(time.process_time() - worked_before)
    found = {
        "read": statistics.median(reads),
        "sources": statistics.median(opened),
        "convert": statistics.median(converted),
        "processor": statistics.median(worked),
        "peak": watch.peak,
        "grown": watch.peak - watch.start,
        "with_mapped": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "file_bytes": report.file_bytes,
        "original_bytes": report.original_bytes,
        "fraction": report.fraction,
        "error": report.mean_error,
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
    return {**found, "open": statistics.median(opens), "load": statistics.median(loads)}


def measure(folder: Path, n: int, options: dict[str, Any], out: Path, rounds: int = 1) -> Row:
    """Run :func:`one` in a process of its own."""
    command = [sys.executable, __file__, "--one", str(folder), str(n), json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(out), str(rounds)], env=env, check=True, capture_output=True, text=True
    )
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return {"n": n, **found}


Columns = dict[str, Callable[[Row], str]]


def show(title: str, rows: list[Row], columns: Columns) -> None:
    """Print a table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "") else "right")
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    CONSOLE.print(table)


def measured(folder: Path, counts: list[int], methods: list[str], out: Path) -> list[Row]:
    """A row for each method and number of adapters."""
    return [
        {"method": method, **measure(folder, n, METHODS[method], out)}
        for method in methods
        for n in counts
    ]


def times(work: Path, counts: list[int], methods: list[str]) -> list[Row]:
    """Seconds per task."""
    folder = work / "tiny"
    make_adapters(folder, max(counts), TINY, 2, np.float32)
    rows = measured(folder, counts, methods, work / "x.rmm")
    show(
        f"tiny adapters of {len(TINY)} targets, rank 2; milliseconds per task",
        rows,
        {
            "method": lambda row: row["method"],
            "n": lambda row: f"{row['n']}",
            "open sources": lambda row: f"{1e3 * row['sources'] / row['n']:.2f}",
            "convert": lambda row: f"{1e3 * row['convert'] / row['n']:.2f}",
            "bytes a task": lambda row: f"{row['file_bytes'] / row['n']:.0f}",
            "open file": lambda row: f"{1e3 * row['open']:.2f}",
            "load": lambda row: f"{1e3 * row['load']:.3f}",
        },
    )
    return rows


def layers_of(work: Path, n: int, layers: int) -> Path:
    """Adapters with the shapes of so many layers of a 7B model."""
    targets = {
        f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()
    }
    folder = work / f"layers-{layers}"
    make_adapters(folder, n, targets, 16, np.float32)
    return folder


def memory(work: Path, counts: list[int], methods: list[str], layers: int) -> list[Row]:
    """Peak memory."""
    folder = layers_of(work, max(counts), layers)
    rows = measured(folder, counts, methods, work / "x.rmm")
    show(
        f"adapters with the shapes of {layers} of 32 layers of a 7B model, rank 16, float32",
        rows,
        {
            "method": lambda row: row["method"],
            "n": lambda row: f"{row['n']}",
            "originals": lambda row: f"{row['original_bytes'] / 1e6:.0f} MB",
            "file": lambda row: f"{row['file_bytes'] / 1e6:.1f} MB",
            "seconds": lambda row: f"{row['convert']:.1f}",
            "peak": lambda row: f"{row['peak'] / 2**20:.0f} MiB",
            "grown by": lambda row: f"{row['grown'] / 2**20:.0f} MiB",
            "mapped files too": lambda row: f"{row['with_mapped'] / 2**20:.0f} MiB",
        },
    )
    return rows


def speed(work: Path, counts: list[int], methods: list[str], rounds: int) -> list[Row]:
    """Time to convert beside time to read, in one process."""
    folder = layers_of(work, max(counts), 1)
    rows = [
        {"method": method, **measure(folder, n, METHODS[method], work / "x.rmm", rounds)}
        for method in methods
        for n in counts
    ]
    show(
        "adapters with the shapes of one layer of a 7B model, rank 16, float32, in page cache",
        rows,
        {
            "method": lambda row: row["method"],
            "n": lambda row: f"{row['n']}",
            "originals": lambda row: f"{row['original_bytes'] / 1e6:.0f} MB",
            "read, ms": lambda row: f"{1e3 * row['read']:.0f}",
            "convert, ms": lambda row: f"{1e3 * (row['sources'] + row['convert']):.0f}",
            "processor, ms": lambda row: f"{1e3 * row['processor']:.0f}",
            "MB a second": lambda row: f"{row['original_bytes'] / 1e6 / row['convert']:.0f}",
            "convert / read": lambda row: f"{row['convert'] / row['read']:.1f}",
        },
    )
    return rows


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median time."""
    work()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def merging(rounds: int) -> list[Row]:
    """Positions a second, beside numpy's batched SVD of the centred points alone."""
    from rmmformat import _native
    from rmmformat.blas import one_thread

    rows: list[Row] = []
    for n, rank, p in ((8, 4, 3), (8, 16, 3), (8, 64, 3), (25, 16, 3), (100, 16, 3), (8, 16, 7)):
        length = 8192 * 128 // (n * rank)
        stack = np.random.default_rng(1).standard_normal((n, rank, length))
        points = np.ascontiguousarray(stack.transpose(2, 0, 1))
        points -= points.mean(axis=1, keepdims=True)
        row: Row = {"n": n, "rank": rank, "p": p}
        with one_thread():
            # Turn and turn about, so that other work on the machine meets all of them alike.
            svd = functools.partial(np.linalg.svd, points, full_matrices=False)
            ways: dict[str, Callable[[], object]] = {"numpy": svd}
            for threads in (1, 2):
                ways[f"threads_{threads}"] = functools.partial(
                    _native.find_principal, stack, 1, p, True, threads
                )
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    found[name].append(seconds(way, 1))
        for name, all_of_it in found.items():
            row[name] = length / statistics.median(all_of_it)
        rows.append(row)
    show(
        "merging by position, thousand positions a second",
        rows,
        {
            "n": lambda row: f"{row['n']}",
            "rank": lambda row: f"{row['rank']}",
            "p": lambda row: f"{row['p']}",
            "numpy.linalg.svd": lambda row: f"{row['numpy'] / 1e3:.0f}",
            "rmm, 1 thread": lambda row: f"{row['threads_1'] / 1e3:.0f}",
            "rmm, 2 threads": lambda row: f"{row['threads_2'] / 1e3:.0f}",
            "2 threads / numpy": lambda row: f"{row['threads_2'] / row['numpy']:.1f}",
        },
    )
    return rows


#: One of n, rank, p and width at a time; the others stay as they are here.
MIDDLE = {"n": 8, "rank": 16, "p": 3, "width": 1024}
SWEEPS = {
    "n": (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000),
    "rank": (4, 8, 16, 32, 64),
    "p": (1, 2, 3, 4, 5, 6, 7, 8),
    "width": (256, 512, 1024, 2048, 4096),
}


def sweeps(work: Path, names: list[str], rounds: int) -> list[Row]:
    """RMM with components, beside reading; with many adapters the model is 128 wide."""
    rows = []
    for name in names:
        for value in SWEEPS[name]:
            given = {**MIDDLE, name: value}
            if name == "n":
                given["width"] = 128
            if name == "p":
                given["n"] = 10
            width = given["width"]
            shapes: Shapes = {
                f"layers.{i}.{kind}": (width, width) for i in range(2) for kind in "qv"
            }
            folder = work / f"sweep-{width}-{given['rank']}"
            make_adapters(folder, given["n"], shapes, given["rank"], np.float32)
            options = {"components": given["p"]}
            found = measure(folder, given["n"], options, work / "x.rmm", rounds)
            rows.append({"sweep": name, **given, **found})
    show(
        "four targets of a model: convert(components=p) beside reading",
        rows,
        {
            "": lambda row: row["sweep"],
            "n": lambda row: f"{row['n']}",
            "rank": lambda row: f"{row['rank']}",
            "p": lambda row: f"{row['p']}",
            "width": lambda row: f"{row['width']}",
            "read, ms": lambda row: f"{1e3 * row['read']:.1f}",
            "open, ms": lambda row: f"{1e3 * row['sources']:.1f}",
            "convert, ms": lambda row: f"{1e3 * row['convert']:.1f}",
            "a task, ms": lambda row: f"{1e3 * row['convert'] / row['n']:.2f}",
            "MB a second": lambda row: f"{row['original_bytes'] / 1e6 / row['convert']:.0f}",
            "size": lambda row: f"{100 * row['fraction']:.1f} %",
            "error": lambda row: f"{100 * row['error']:.1f} %",
            "load, ms": lambda row: f"{1e3 * row['load']:.2f}",
        },
    )
    return rows


def main() -> None:
    """Measure what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--memory", action="store_true", help="peak memory instead of time a task")
    parts.add_argument("--speed", action="store_true", help="converting beside reading")
    parts.add_argument("--merge", action="store_true", help="positions merged a second")
    parts.add_argument("--sweeps", nargs="*", choices=SWEEPS, help="these, or all of them")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of adapters")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that fit")
    parser.add_argument("--layers", type=int, default=1, help="with --memory")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many")
    parser.add_argument("--work", type=Path, help="keep what is made in this folder")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, n, method, out, rounds = given.one
        print(json.dumps(one(folder, int(n), method, out, int(rounds))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if given.memory:
            counts = given.counts or [25, 100, 200, 400]
            name = "memory"
            rows = memory(work, counts, given.methods or ["components", "exact"], given.layers)
        elif given.speed:
            name, counts = "speed", given.counts or [8, 25]
            rows = speed(work, counts, given.methods or list(METHODS), given.rounds)
        elif given.merge:
            name, rows = "merge", merging(given.rounds)
        elif given.sweeps is not None:
            name, rows = "sweeps", sweeps(work, given.sweeps or list(SWEEPS), given.rounds)
        else:
            name, counts = "times", given.counts or [10, 100, 1000]
            rows = times(work, counts, given.methods or ["components", "exact"])
    if given.json:
        given.json.write_text(json.dumps({"part": name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
