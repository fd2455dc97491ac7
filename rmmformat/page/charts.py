"""Pictures of a page as SVG elements: heat maps and lines.

They are drawn as elements here rather than by a plotting library so that the page needs none, that
their colours follow the reader's light or dark setting, and that every cell says its value when
pointed at.  Elements are built as a tree, so that text is escaped by the serialiser, wherever it
comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element, SubElement

import numpy as np
import numpy.typing as npt

from rmmformat.text import printable

__all__ = ["SHADES", "STYLE", "add", "heat_map", "lines"]

F64 = npt.NDArray[np.float64]

#: Steps of a heat map's scale.
SHADES = 12

#: Characters of a name that fit beside a picture, and in what a cell says.
_LABEL, _SAID = 28, 64
_COLD, _WARM = (0.26, 0.45, 0.77), (0.86, 0.34, 0.23)


def _style() -> str:
    rules = [
        "svg text { fill: currentColor; font: 11px system-ui, sans-serif; }",
        "svg text.in { font-size: 10px; pointer-events: none; }",
        "svg rect.none { fill: none; stroke: #8886; stroke-dasharray: 2 2; }",
        "svg rect.self { fill: #8883; }",
        "svg .axis { stroke: currentColor; opacity: .25; fill: none; }",
        "svg path.one { fill: none; stroke: var(--accent); stroke-width: 1.2; opacity: .45; }",
        "svg path.one:hover { stroke-width: 3; opacity: 1; }",
        "svg path.mid { fill: none; stroke: currentColor; stroke-width: 2.2; }",
    ]
    for kind, colour in (("w", _WARM), ("c", _COLD)):
        red, green, blue = (round(255 * part) for part in colour)
        for shade in range(SHADES):
            # Opacity over the page's own ground: pale is "little" in light and in dark alike.
            opacity = 0.06 + 0.94 * shade / (SHADES - 1)
            rules.append(
                f"svg .{kind}{shade} {{ fill: rgb({red} {green} {blue} / {opacity:.2f}); }}"
            )
    return "\n".join(rules)


STYLE = _style()


def add(parent: Element, tag: str, text: str = "", **attributes: object) -> Element:
    """Append an element; a trailing underscore of an attribute's name is dropped."""
    element = SubElement(
        parent,
        tag,
        {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()},
    )
    if text:
        element.text = printable(text)
    return element


def short(name: str, length: int = _LABEL) -> str:
    """Keep both ends of a name."""
    name = printable(name)
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[-(length - 1 - head) :]}"


def heat_map(
    parent: Element,
    values: F64,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    show: Callable[[float], str],
    limit: float,
    numbers: bool = False,
    diagonal: bool = False,
) -> None:
    """Append a map of values: warm above zero, cold below, dashed where there is none.

    Parameters
    ----------
    values
        (rows, columns); NaN where there is no value.
    label
        What the picture is, for those who cannot see it.
    show
        Gives a value as text.
    limit
        The value that has the full colour.
    numbers
        Write values into cells.
    diagonal
        The diagonal says nothing: leave it grey.
    """
    cell_w, cell_h = (34, 20) if numbers else (16, 16)
    if len(columns) <= 12 and not numbers:
        cell_w = 34
    row_names, column_names = [short(row) for row in rows], [short(name) for name in columns]
    # Room for 11-pixel text, whose letters are at most 7 wide on average; columns' are turned.
    left = 14 + 6.9 * max(map(len, row_names), default=0)
    top = 20 + 5.3 * max(map(len, column_names), default=0)
    right = 12 + 4.5 * max(map(len, column_names), default=0)
    width = left + cell_w * len(columns) + right
    height = top + cell_h * len(rows) + 6
    svg = _canvas(parent, width, height, label)
    for c, name in enumerate(column_names):
        x = left + cell_w * (c + 0.5) + 3
        text = add(svg, "text", name, transform=f"translate({x:.1f} {top - 6:.1f}) rotate(-58)")
        add(text, "title", short(columns[c], _SAID))
    for r, name in enumerate(row_names):
        y = top + cell_h * (r + 0.5) + 4
        text = add(svg, "text", name, x=f"{left - 6:.1f}", y=f"{y:.1f}", text_anchor="end")
        add(text, "title", short(rows[r], _SAID))
        for c in range(len(columns)):
            value = float(values[r, c])
            x = left + cell_w * c
            own = diagonal and r == c
            rect = add(
                svg, "rect", x=f"{x + 0.5:.1f}", y=f"{top + cell_h * r + 0.5:.1f}",
                width=cell_w - 1, height=cell_h - 1, class_="self" if own else _shade(value, limit),
            )  # fmt: skip
            said = "none" if math.isnan(value) else show(value)
            add(rect, "title", f"{short(rows[r], _SAID)} · {short(columns[c], _SAID)}: {said}")
            if numbers and not own and not math.isnan(value):
                middle, base = x + cell_w / 2, top + cell_h * (r + 0.5) + 3.5
                add(svg, "text", show(value), x=f"{middle:.1f}", y=f"{base:.1f}",
                    text_anchor="middle", class_="in")  # fmt: skip


def _shade(value: float, limit: float) -> str:
    if math.isnan(value):
        return "none"
    part = 0.0 if limit <= 0 else min(abs(value) / limit, 1.0)
    return f"{'w' if value >= 0 else 'c'}{round(part * (SHADES - 1))}"


def lines(parent: Element, curves: F64, names: Sequence[str], *, label: str) -> None:
    """Append falling curves over a logarithmic axis, one a task, their median bold.

    Parameters
    ----------
    curves
        (tasks, points) of shares between 0 and 1; NaN for a task that has none.
    """
    floor, left, top, plot_w, plot_h = 1e-4, 52.0, 12.0, 640.0, 240.0
    n_points = curves.shape[1]
    svg = _canvas(parent, left + plot_w + 16, top + plot_h + 40, label)

    def place(point: int, share: float) -> str:
        x = left + plot_w * (point + 0.5) / n_points
        y = top + plot_h * math.log(max(share, floor)) / math.log(floor)
        return f"{x:.1f} {y:.1f}"

    for decade in range(5):
        y = top + plot_h * decade / 4
        add(svg, "path", d=f"M{left} {y:.1f}h{plot_w}", class_="axis")
        add(svg, "text", f"{100 * 10.0**-decade:g} %", x=left - 6, y=f"{y + 4:.1f}",
            text_anchor="end")  # fmt: skip
    step = max(1, -(-n_points // 16))
    for point in range(0, n_points, step):
        x = left + plot_w * (point + 0.5) / n_points
        add(svg, "text", str(point + 1), x=f"{x:.1f}", y=top + plot_h + 16, text_anchor="middle")
    add(svg, "text", "singular component", x=left + plot_w / 2, y=top + plot_h + 34,
        text_anchor="middle")  # fmt: skip
    present = np.flatnonzero(~np.isnan(curves).all(axis=1))
    for t in present:
        path = add(svg, "path", d=_path(curves[t], place, floor), class_="one")
        add(path, "title", short(names[int(t)], _SAID))
    middle = np.median(curves[present], axis=0)
    add(svg, "path", d=_path(middle, place, floor), class_="mid")


def _path(curve: F64, place: Callable[[int, float], str], floor: float) -> str:
    """The curve down to the floor of the picture, where it ends."""
    points = []
    for point, share in enumerate(curve):
        points.append(place(point, float(share)))
        if share < floor:
            break
    if len(points) == 1:  # one component is a point, which only a line with round ends shows
        points *= 2
    return "M" + "L".join(points)


def _canvas(parent: Element, width: float, height: float, label: str) -> Element:
    frame = add(parent, "div", class_="wide")
    return add(
        frame, "svg", viewBox=f"0 0 {width:.0f} {height:.0f}", width=f"{width:.0f}",
        height=f"{height:.0f}", role="img", aria_label=label,
    )  # fmt: skip
