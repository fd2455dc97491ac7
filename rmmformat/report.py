"""A comparison as one self-contained HTML page: plots, table, and what was run.

Needs matplotlib (the extra ``plots``) for the plots, which are SVG within the page.  The page asks
for no other file and runs no script.
"""

from __future__ import annotations

import html
import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any

from rmmformat.compare import Comparison, Row
from rmmformat.contenders import FAMILIES
from rmmformat.errors import UnsupportedError

__all__ = ["check_plots", "render_page", "show_change"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.sub { opacity: .75; margin-top: .2rem; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, td.note { text-align: left; }
tr.best { font-weight: 600; } td.note { font-weight: 400; font-size: .85em; opacity: .8; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { opacity: .75; } dd { margin: 0; overflow-wrap: anywhere; }
"""

#: Family to colour and marker; what keeps tasks apart in strong colours, merges in grey.
_LOOKS = {
    "planned": ("#d62728", "o"),
    "exact": ("#000000", "*"),
    "rmm": ("#1f77b4", "s"),
    "aligned": ("#17becf", "D"),
    "factor": ("#6baed6", "v"),
    "subspace": ("#9467bd", "P"),
    "truncation": ("#8c564b", "^"),
    "blocks": ("#2ca02c", "o"),
    "emr": ("#e377c2", "X"),
    "flexmerge": ("#ff7f0e", "h"),
    "none": ("#777777", "."),
    "task-arithmetic": ("#777777", "x"),
    "nan": ("#777777", "1"),
    "ties": ("#777777", "+"),
    "dare": ("#777777", "2"),
    "lore": ("#777777", "3"),
}
_LINES = {"planned", "rmm", "factor", "subspace", "truncation", "blocks", "flexmerge"}


def check_plots() -> None:
    """Make sure that plots can be drawn.

    Raises
    ------
    UnsupportedError
        matplotlib is not installed; the hint says how to.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "the page's plots need matplotlib, which is not installed",
            hint="Install it with: pip install 'rmmformat[plots]'",
        )


def render_page(comparison: Comparison, sources: Sequence[str]) -> str:
    """Write a comparison as HTML.

    Parameters
    ----------
    comparison
        What :func:`rmmformat.compare.compare` found.
    sources
        What the user named, for the list of what was run.

    Raises
    ------
    UnsupportedError
        matplotlib is not installed.
    """
    check_plots()
    c = comparison
    plots = [
        ("Error against size", _plot(c.rows, "mean_error", "mean relative error of the deltas, %"))
    ]
    if c.evaluation:
        plots.insert(0, ("Score against size", _plot(c.rows, "score", f"mean of {c.evaluation}")))
    facts = [
        ("sources", ", ".join(sources)),
        ("base model", c.base_model or "not recorded"),
        ("tasks", ", ".join(c.tasks)),
        ("targets", f"{c.n_targets}, rank {'/'.join(map(str, c.ranks))}"),
        ("factors", f"{c.original_bytes:,} bytes as stored, {c.f32_bytes:,} in float32"),
        ("evaluation", c.evaluation or "none"),
        ("made by", c.producer),
    ]
    ran = [row for row in c.rows if row.n_bytes is not None]
    title = f"{len(c.tasks)} tasks, {len(ran)} ways to keep them"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        '<p class="sub">Size: bytes for all factors over their bytes in float32. '
        "Error: relative Frobenius error of each task's delta at each target. "
        "File: the whole file without private tensors (heads). "
        "Bold: nothing else here is as small and as close."
        + (
            " Change: score less that of the originals; where examples were scored singly, with "
            "its standard error, paired by example (the bars)."
            if any(row.change is not None for row in c.rows)
            else ""
        )
        + "</p>",
    ]
    for heading, svg in plots:
        parts.append(f"<h2>{html.escape(heading)}</h2><figure>{svg}</figure>")
    parts.append(f'<h2>All rows</h2><div class="wide">{_table(c)}</div>')
    listed = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts)
    present = {row.family for row in c.rows}
    words = "".join(
        f"<dt>{html.escape(word)}</dt><dd>{html.escape(text)}</dd>"
        for word, text in FAMILIES.items()
        if word in present
    )
    parts.append(f"<h2>What was run</h2><dl>{listed}</dl><h2>Methods</h2><dl>{words}</dl>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def show_change(row: Row) -> str:
    """Say how far a row's score is from the originals', and how sure that is; may be empty."""
    if row.change is None:
        return ""
    doubt = "" if row.change_error is None else f" ± {row.change_error:.2g}"
    return f"{row.change:+.3g}{doubt}"


def _table(c: Comparison) -> str:
    head = ["method", "bytes", "size, %", "of stored, %", "file, bytes",
            "mean error, %", "median", "max", "seconds"]  # fmt: skip
    if c.evaluation:
        head += ["score", "change", *c.tasks]
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in [*head, ""]) + "</tr>"]
    for row in c.rows:
        cells = [
            row.method,
            "" if row.n_bytes is None else f"{row.n_bytes:,}",
            _percent(row.fraction),
            _percent(row.fraction_stored),
            "" if row.file_bytes is None else f"{row.file_bytes:,}",
            _percent(row.mean_error),
            _percent(row.median_error),
            _percent(row.max_error),
            "" if row.seconds is None else f"{row.seconds:.2f}",
        ]
        if c.evaluation:
            scores = row.scores or {}
            cells += ["" if row.score is None else f"{row.score:.4g}", show_change(row)]
            cells += [f"{scores[task]:.4g}" if task in scores else "" for task in c.tasks]
        body = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        note = f'<td class="note">{html.escape(row.note)}</td>'
        lines.append(f"<tr{' class=best' if row.best else ''}>{body}{note}</tr>")
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def _plot(rows: Sequence[Row], what: str, label: str) -> str:
    """One quantity against size, as an SVG element."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rmm", "font.size": 10}):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.add_subplot()
        factor = 100.0 if what == "mean_error" else 1.0
        for family in FAMILIES:
            points = sorted(
                (100 * row.fraction, factor * value, row.change_error or 0.0)
                for row in rows
                if row.family == family and row.fraction
                for value in [getattr(row, what)]
                if value is not None and math.isfinite(value)
                and (value > 1e-6 or what != "mean_error")
            )  # fmt: skip
            if points:
                color, marker = _LOOKS[family]
                x, y, doubt = zip(*points, strict=True)
                if what == "score" and any(doubt):
                    axes.errorbar(x, y, doubt, linestyle="none", ecolor=color, elinewidth=1)
                axes.plot(
                    x, y,
                    linestyle="-" if family in _LINES else "none",
                    color=color, marker=marker, markersize=6, linewidth=1.4, label=family,
                )  # fmt: skip
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(plain)
        if what == "mean_error":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(plain)
        else:
            base = [r.score for r in rows if r.family == "none" and r.score is not None]
            whole = [r.score for r in rows if r.family == "exact" and r.score is not None]
            for value, name in [(v, "no delta") for v in base] + [(v, "originals") for v in whole]:
                axes.axhline(factor * value, color="#999999", linewidth=0.8, linestyle=":")
                axes.annotate(name, (1, factor * value), xycoords=("axes fraction", "data"),
                              ha="right", va="bottom", fontsize=8, color="#666666")  # fmt: skip
        axes.set_xlabel("size, % of the factors in float32")
        axes.set_ylabel(label)
        axes.grid(True, which="both", alpha=0.25)
        if axes.has_data():
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None,
                                                    "Type": None})  # fmt: skip
    text = out.getvalue()
    return text[text.index("<svg") :]
