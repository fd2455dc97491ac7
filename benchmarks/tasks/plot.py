"""Draw accuracy against size, the picture that README opens with.

    cd docs/accuracy && python ../../benchmarks/tasks/plot.py ../accuracy.svg lora.json ptsvd.json

Reads what ``rmm compare --eval evaluate:score --json`` wrote, a panel a file.  Sizes are of the
whole file without heads where the method has a file, of its factors otherwise.  The square root of
the loss is drawn, so that a quarter of a point and forty points are both to be seen.  The picture
is a card with its own ground, which follows the reader's light or dark setting.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TITLES = {
    "lora": "LoRA adapters of eight tasks",
    "ptsvd": "full fine-tunes of eight tasks (PT-SVD)",
    "shared": "LoRA adapters trained elsewhere",
}

#: Colour in the figure: what it is in light and in dark.
COLPLANNER = {
    "#010101": ("ink", "#1f2328", "#e6edf3"),
    "#020202": ("quiet", "#59636e", "#9198a1"),
    "#030303": ("grid", "#d1d9e0", "#3d444d"),
    "#040404": ("paper", "#ffffff", "#151b23"),
    "#050505": ("planner", "#cf222e", "#ff7b72"),
    "#060606": ("published", "#0969da", "#58a6ff"),
    "#070707": ("aligned", "#8250df", "#bc8cff"),
    "#080808": ("blocks", "#1a7f37", "#3fb950"),
    "#090909": ("emr", "#9a6700", "#d29922"),
}
INK, QUIET, GRID, PAPER, PLANNER, PUBLISHED, ALIGNED, BLOCKS, EMR = COLPLANNER

#: Of each family: name, colour, marker, line.
SERIES = {
    "planned": ("planner: rmm convert --size", PLANNER, "o", "-"),
    "rmm": ("RMM as published, p = 1, 3", PUBLISHED, "s", "-"),
    "aligned": ("RMM p = 3 aligned (SVD)", ALIGNED, "D", "none"),
    "blocks": ("plain blocks of 2, 3, 4, 8 bits", BLOCKS, "v", "-"),
    "emr": ("EMR-Merging", EMR, "P", "none"),
    "task-arithmetic": ("Task Arithmetic", QUIET, "x", "none"),
    "ties": ("TIES", QUIET, "+", "none"),
    "dare": ("DARE", QUIET, "1", "none"),
}
#: Largest loss, in points, that is aimed at for a size in per cent.
AIM = ((3.0, 0.25), (1.5, 0.5), (1.0, 1.0))
TICKS = (0, 0.25, 1, 2.5, 5, 10, 20, 30, 40, 50)


def root(value: Any) -> Any:
    """The square root, with the sign kept."""
    return np.sign(value) * np.sqrt(np.abs(value))


def square(value: Any) -> Any:
    """Undo :func:`root`."""
    return np.sign(value) * np.square(value)


def size(row: Mapping[str, Any], whole: int) -> float:
    """Per cent of the originals' float32 factors."""
    n_bytes = row["n_bytes"] if row["file_bytes"] is None else row["file_bytes"]
    return 100.0 * n_bytes / whole


def panel(axes: Any, found: Mapping[str, Any], title: str) -> None:
    """One comparison."""
    rows = [row for row in found["rows"] if row["change"] is not None]
    for family, (name, colour, marker, line) in SERIES.items():
        chosen = [row for row in rows if row["family"] == family and row["n_bytes"]]
        if family == "aligned":
            chosen = [row for row in chosen if row["method"].endswith("svd")]
        points = sorted((size(row, found["f32_bytes"]), -row["change"]) for row in chosen)
        if not points:
            continue
        x, y = zip(*points, strict=True)
        axes.plot(x, y, linestyle=line, color=colour, marker=marker, label=name, zorder=3,
                  markersize=6 if line == "-" else 7, linewidth=2 if family == "planned" else 1.3,
                  markeredgewidth=1.6)  # fmt: skip
        if family == "planned":
            bars = sorted((size(row, found["f32_bytes"]), row["change_error"]) for row in chosen)
            low, high = ([b + s * e for b, (_, e) in zip(y, bars, strict=True)] for s in (-1, 1))
            axes.vlines(x, low, high, color=colour, linewidth=1.2, zorder=2)
    x, y = zip(*AIM, strict=True)
    axes.plot(x, y, linestyle="none", marker="_", markersize=15, markeredgewidth=1.6, color=INK,
              label="aim: ¼, ½, 1 point at 3, 1.5, 1 %", zorder=4)  # fmt: skip
    (exact,) = (row["score"] for row in rows if row["family"] == "exact")
    axes.axhline(0, color=INK, linewidth=1, zorder=1)
    axes.annotate(f"originals: {exact:.1f} %", (0.99, 0), xycoords=("axes fraction", "data"),
                  xytext=(0, 4), textcoords="offset points", ha="right", color=INK)  # fmt: skip
    for row in rows:
        if row["family"] == "none":
            axes.axhline(-row["change"], color=QUIET, linewidth=1, linestyle=":", zorder=1)
            axes.annotate(f"no delta: {row['score']:.1f} %", (0.01, -row["change"]),
                          xycoords=("axes fraction", "data"), xytext=(0, 4),
                          textcoords="offset points", color=QUIET)  # fmt: skip
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.set_xscale("log")
    axes.set_xlim(0.38, 300)
    ticks = (0.5, 1, 1.5, 3, 6, 12, 25, 50, 100)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("size, % of the originals (float32)", color=INK)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_facecolor("none")


def draw(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """All panels side by side, as SVG text."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rmm", "font.size": 10,
                         "font.family": "sans-serif"}):  # fmt: skip
        figure = Figure(figsize=(5.2 * len(found), 5.0), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (title, comparison) in zip(panels, found, strict=True):
            panel(axes, comparison, title)
        worst = max(-row["change"] for _, c in found for row in c["rows"] if row["change"])
        panels[0].set_yscale("function", functions=(root, square))
        panels[0].set_ylim(worst * 1.08, -0.6)
        ticks = [tick for tick in TICKS if tick <= worst * 1.05]
        panels[0].set_yticks(ticks, ["0", "¼", *(f"{tick:g}" for tick in ticks[2:])])
        panels[0].minorticks_off()
        panels[0].set_ylabel("points of mean accuracy lost", color=INK)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False,
                      labelcolor=INK)  # fmt: skip
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None,
                                                    "Type": None})  # fmt: skip
    return _coloured(out.getvalue())


def _coloured(text: str) -> str:
    """Name the colours, say what they are, and put the card behind."""
    text = text[text.index("<svg") :]
    for colour, (name, _, _) in COLPLANNER.items():
        text = text.replace(colour, f"var(--{name})")
    light, dark = (
        " ".join(f"--{colour[0]}: {colour[at]};" for colour in COLPLANNER.values()) for at in (1, 2)
    )
    style = (
        f"<style>svg {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>\n"
        '<rect width="100%" height="100%" rx="8" style="fill: var(--paper)"/>\n'
    )
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    head = text.index(">") + 1
    return f"{text[:head]}\n{style}{text[head:].lstrip()}"


if __name__ == "__main__":
    comparisons = [
        (TITLES.get(Path(name).stem, Path(name).stem), json.loads(Path(name).read_text()))
        for name in sys.argv[2:]
    ]
    Path(sys.argv[1]).write_text(draw(comparisons), encoding="utf-8")
