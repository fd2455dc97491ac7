"""How conversion and loading grow: with tasks, rank, components, and the width of the model.

The points are those of benchmarks/scaling.py (`--sweeps`), which moves one of the four at a time
and takes each in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import scaling
from report import Column, Table
from setting import Setting

QUICK = {"n": (2, 3), "rank": (4,), "p": (1, 2), "width": (64,)}
LABELS = {
    "n": "tasks n",
    "rank": "rank r",
    "p": "components p",
    "width": "width of the model",
}


def tables(setting: Setting) -> list[Table]:
    if setting.quick:
        scaling.SWEEPS = QUICK
    names = list(scaling.SWEEPS)
    rows = scaling.sweeps(setting.folder("curves"), names, 1 if setting.quick else 3)
    found = []
    for axis in names:
        table = Table(
            f"scaling-{axis}",
            f"Scaling with {LABELS[axis]}",
            LABELS[axis],
            (
                Column("originals", "originals, MB"),
                Column("read", "read them, ms"),
                Column("convert", "convert, ms"),
                Column("rate", "MB a second", ".0f"),
                Column("load", "load a task, ms", ".3f"),
                Column("size", "factors kept, %", ".0f"),
            ),
        )
        for row in rows:
            if row["sweep"] == axis:
                table.put(
                    str(row[axis]),
                    originals=row["original_bytes"] / 1e6,
                    read=1e3 * row["read"],
                    convert=1e3 * (row["sources"] + row["convert"]),
                    rate=row["original_bytes"] / 1e6 / (row["sources"] + row["convert"]),
                    load=1e3 * row["load"],
                    size=100 * row["fraction"],
                )
        found.append(table)
    return found


def draw(found: list[Table], path: Path) -> None:
    """Draw the curves as one picture that needs nothing else."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rmm", "font.size": 8})
    from matplotlib import pyplot

    lines = {
        "of all tasks, ms": {"convert": "convert", "read": "read with safetensors"},
        "of one task, ms": {"load": "load"},
    }
    figure, axes = pyplot.subplots(
        2, len(found), figsize=(2.5 * len(found), 4.2), squeeze=False, layout="constrained"
    )
    for column, table in enumerate(found):
        x = [float(name) for name in table.rows]
        for line, (label, kinds) in enumerate(lines.items()):
            axis = axes[line][column]
            for number, (key, name) in enumerate(kinds.items()):
                y = [float(row[key]) for row in table.rows.values()]  # type: ignore[arg-type]
                axis.plot(x, y, "o-", markersize=3, linewidth=1.2, label=name)
                if number == 0 and len(x) > 1:  # growing as the axis does, to compare with
                    axis.plot(x, [y[-1] * v / x[-1] for v in x], ":", color="0.6", linewidth=1)
            axis.set(xscale="log", yscale="log")
            shown = x if len(x) < 9 else x[::3]
            axis.set_xticks(shown, [f"{v:g}" for v in shown])
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axis.grid(True, color="0.92")
            if line == len(lines) - 1:
                axis.set_xlabel(LABELS[table.name.removeprefix("scaling-")])
            if column == 0:
                axis.set_ylabel(label)
                axis.legend(frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
