"""How conversion and loading grow: with tasks, rank, components, and the width of the model.

One of the four moves, the others stay at 8 tasks of rank 16, three components, width 768 (seven
targets, the matrices of one layer).  Adapters are those of benchmarks/scaling.py, float32.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import Column, Table
from scaling import make_adapters
from setting import Setting

import rmmformat as rmm

START = {"n": 8, "r": 16, "p": 3, "width": 768}
SWEEPS = {
    "n": (4, 8, 16, 32, 64),
    "r": (4, 8, 16, 32, 64),
    "p": (1, 2, 3, 4, 5, 6, 7),
    "width": (256, 512, 1024, 2048, 4096),
}
QUICK = {"n": (2, 3), "r": (4,), "p": (1, 2), "width": (64,)}
LABELS = {
    "n": "tasks n",
    "r": "rank r",
    "p": "components p",
    "width": "width of the model",
}


def tables(setting: Setting) -> list[Table]:
    found = []
    for axis, values in (QUICK if setting.quick else SWEEPS).items():
        table = Table(
            f"scaling-{axis}",
            f"Scaling with {LABELS[axis]}",
            LABELS[axis],
            (
                Column("originals", "originals, MB"),
                Column("convert", "RMM: convert, s", ".3f"),
                Column("load", "load a task, ms", ".3f"),
                Column("size", "file, of the originals"),
                Column("exact_convert", "exact: convert, s", ".3f"),
                Column("exact_load", "load a task, ms", ".3f"),
            ),
        )
        for value in values:
            sizes = {**START, **({"width": 64} if setting.quick else {}), axis: value}
            table.put(str(value), **measure(setting.folder("curves"), **sizes))
        found.append(table)
    return found


def targets(width: int) -> dict[str, tuple[int, int]]:
    """Matrices of one layer, (in, out)."""
    inner = 8 * width // 3
    layer = "model.layers.0"
    return {
        **{f"{layer}.self_attn.{name}_proj": (width, width) for name in "qkvo"},
        f"{layer}.mlp.gate_proj": (width, inner),
        f"{layer}.mlp.up_proj": (width, inner),
        f"{layer}.mlp.down_proj": (inner, width),
    }


def measure(root: Path, n: int, r: int, p: int, width: int) -> dict[str, Any]:
    """Convert and load at one point; medians."""
    folder = root / f"r{r}-width{width}"
    make_adapters(folder, n, targets(width), r, np.float32)
    sources = sorted(folder.iterdir())[:n]
    originals = sum((path / "adapter_model.safetensors").stat().st_size for path in sources)
    found: dict[str, Any] = {"originals": originals / 1e6}
    for prefix, how in (("", {"components": p}), ("exact_", {"exact": True})):
        out = root / "x.rmm"
        times = repeat(lambda how=how, out=out: rmm.convert(sources, out, overwrite=True, **how), 3)
        found[f"{prefix}convert"] = times
        with rmm.open(out) as collection:
            names = iter(collection.tasks * 1000)
            arena = np.empty(collection.arena_bytes(collection.tasks[0]) + 64, np.uint8)
            arena = arena[-arena.ctypes.data % 64 :]

            def load(collection: Any = collection, names: Any = names, out: Any = arena) -> None:
                collection.load(next(names), out=out, threads=1)

            load()
            found[f"{prefix}load"] = 1e3 * repeat(load, 25)
        if not prefix:
            found["size"] = out.stat().st_size / originals
    return found


def repeat(work: Any, most: int, enough: float = 3.0) -> float:
    """Median seconds."""
    times: list[float] = []
    while len(times) < most and sum(times) < enough:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def draw(found: list[Table], path: Path) -> None:
    """Draw the curves as one picture that needs nothing else."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rmm", "font.size": 8})
    from matplotlib import pyplot

    rows = {"convert": "convert, seconds", "load": "load a task, ms"}
    figure, axes = pyplot.subplots(
        2, len(found), figsize=(2.5 * len(found), 4.2), squeeze=False, layout="constrained"
    )
    for column, table in enumerate(found):
        x = [float(name) for name in table.rows]
        for line, (key, label) in enumerate(rows.items()):
            axis = axes[line][column]
            for prefix, name in (("", f"RMM, p = {START['p']}"), ("exact_", "exact")):
                y = [float(row[f"{prefix}{key}"]) for row in table.rows.values()]  # type: ignore[arg-type]
                axis.plot(x, y, "o-", markersize=3, linewidth=1.2, label=name)
                if not prefix:
                    # Growing as the axis does: the slope to compare with.
                    axis.plot(x, [y[-1] * v / x[-1] for v in x], ":", color="0.6", linewidth=1)
            axis.set(xscale="log", yscale="log", ylim=(None, None))
            axis.set_xticks(x, [f"{v:g}" for v in x])
            axis.minorticks_off()
            axis.grid(True, color="0.92")
            if line == len(rows) - 1:
                axis.set_xlabel(LABELS[table.name.removeprefix("scaling-")])
            if column == 0:
                axis.set_ylabel(label)
    axes[0][0].legend(frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
