"""A collection as one self-contained HTML page: sizes, errors, spectra, likeness, provenance.

The page asks for no other file and runs no script, and says so to the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element, tostring

import numpy as np

from rmmformat.collection import Collection
from rmmformat.inspect import FileInfo
from rmmformat.page import charts
from rmmformat.page.charts import add
from rmmformat.page.data import Overview, TaskRow, overview
from rmmformat.text import percent, size

__all__ = ["collection_page", "render"]

#: Files listed of one task.
_MOST_FILES = 8

_STYLE = """
:root { color-scheme: light dark; --accent: #2f6fd0; --paper: #fff; --ink: #1b1d21; --line: #8884;
  --shared: #7a5bc7; --own: #2f6fd0; --private: #d9822b; --rest: #8a8f98; }
@media (prefers-color-scheme: dark) { :root { --accent: #7fb0ff; --paper: #16181c; --ink: #e6e7ea;
  --shared: #a98df0; --own: #6aa3f5; --private: #f0a457; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  background: var(--paper); color: var(--ink); }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; }
p { max-width: 46rem; margin: .3rem 0 .8rem; } p.sub, .legend { opacity: .8; }
div.wide { overflow-x: auto; } svg { display: block; }
ul.facts { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .6rem; }
ul.facts li { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; }
ul.facts b { display: block; font-size: 1.2rem; } ul.facts { margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child, .text { text-align: left; }
td.name { overflow-wrap: anywhere; white-space: normal; min-width: 7rem; max-width: 22rem; }
.bar { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; background: var(--line);
  min-width: 8rem; }
.bar i { display: block; } .bar .shared, .key .shared { background: var(--shared); }
.bar .own, .key .own { background: var(--own); } .bar .rest, .key .rest { background: var(--rest); }
.bar .private, .key .private { background: var(--private); }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .35em 0 1em; }
.key i:first-child { margin-left: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { opacity: .75; } dd { margin: 0; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; font-size: .85em; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def collection_page(
    collection: Collection, progress: Callable[[str, int, int], None] | None = None
) -> str:
    """Make the page of an open file.

    Parameters
    ----------
    progress
        As for :func:`rmmformat.page.data.overview`.

    Raises
    ------
    FormatError, UnsupportedError
        The file cannot be decoded.
    """
    return render(overview(collection, progress))


def render(o: Overview) -> str:
    """Write gathered figures as HTML; every name in it is escaped as data."""
    info = o.info
    page = Element("html", lang="en")
    head = add(page, "head")
    add(head, "meta", charset="utf-8")
    add(head, "meta", http_equiv="Content-Security-Policy",
        content="default-src 'none'; style-src 'unsafe-inline'")  # fmt: skip
    add(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    title = info.path.replace("\\", "/").rsplit("/", 1)[-1] or "a collection"
    add(head, "title", title)
    # Not through `add`, which would show the line ends as escapes; there is no name in it.
    add(head, "style").text = _STYLE + charts.STYLE
    body = add(page, "body")
    add(body, "h1", title)
    base = info.base_model or "a base model that is not recorded"
    tasks = "1 task" if len(info.tasks) == 1 else f"{len(info.tasks)} tasks"
    add(body, "p", f"{tasks} of {base} in one file", class_="sub")
    _facts(body, info)
    _sizes(body, o)
    _errors(body, o)
    _spectra(body, o)
    _likeness(body, o)
    _provenance(body, o)
    text: str = tostring(page, encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n"


def _facts(body: Element, info: FileInfo) -> None:
    measured = [task for task in info.tasks if task.max_error is not None]
    worst = max(measured, key=lambda task: task.max_error or 0.0, default=None)
    facts = add(body, "ul", class_="facts")
    cards = [
        (str(len(info.tasks)), "task" if len(info.tasks) == 1 else "tasks"),
        (str(len(info.targets)), "target" if len(info.targets) == 1 else "targets"),
        (size(info.file_bytes), "the whole file"),
    ]
    if info.fraction is not None and info.original_bytes:
        cards.append(
            (percent(info.fraction), f"of the originals' {size(info.original_bytes)} of factors")
        )
    if worst is not None:
        means = [task.mean_error for task in measured if task.mean_error is not None]
        cards.append((percent(sum(means) / len(means)), "mean error of the deltas"))
        cards.append((percent(worst.max_error), f"largest error: {worst.name}"))
    for value, what in cards:
        item = add(facts, "li")
        add(item, "b", value)
        add(item, "span", what)


def _bar(parent: Element, parts: Sequence[tuple[str, str, int]], whole: int) -> None:
    bar = add(parent, "div", class_="bar")
    for kind, what, n_bytes in parts:
        if n_bytes > 0 and whole > 0:
            add(bar, "i", class_=kind, title=f"{what}: {size(n_bytes)}",
                style=f"width:{100 * n_bytes / whole:.3f}%")  # fmt: skip


def _sizes(body: Element, o: Overview) -> None:
    info = o.info
    add(body, "h2", "Sizes")
    rest = info.index_bytes + info.metadata_bytes
    own = info.factor_bytes - info.shared_bytes
    parts = [
        ("shared", "shared by several tasks", info.shared_bytes),
        ("own", "each task's own", own),
        ("private", "private tensors (heads and the like)", info.private_bytes),
        ("rest", "index and metadata", rest),
    ]
    _bar(body, parts, info.file_bytes)
    key = add(body, "p", class_="key legend")
    for kind, what, n_bytes in parts:
        if n_bytes:
            add(key, "i", class_=kind).tail = f"{what}: {size(n_bytes)}"
    left = info.file_bytes - sum(n_bytes for _, _, n_bytes in parts)
    notes = [f"{size(left)} of the file are header, padding and free space."] if left > 0 else []
    if len(o.rows) < len(info.tasks):
        notes.append(f"Shown are the {len(o.rows)} tasks with the largest errors.")
    notes.append(
        "A task's bar is its own bytes and its private tensors over its original factors; "
        "components are how many singular components hold 90 % of a delta's energy."
    )
    add(body, "p", " ".join(notes), class_="sub")
    table = add(add(body, "div", class_="wide"), "table")
    header = add(add(table, "thead"), "tr")
    for heading in ("task", "targets", "rank", "original", "own", "private", "", "mean error",
                    "largest", "components"):  # fmt: skip
        add(header, "th", heading)
    last = add(header, "th", "worst target")
    last.set("class", "text")
    lines = add(table, "tbody")
    start = (
        len(o.info.targets[0]) - len(_without_common(o.info.targets)[0]) if o.info.targets else 0
    )
    for row in o.rows:
        _task(lines, row, start)


def _task(lines: Element, row: TaskRow, start: int) -> None:
    """One line of the table; `start` is where names of targets begin to differ."""
    task = row.info
    line = add(lines, "tr")
    add(line, "td", task.name, class_="name")
    for cell in (
        str(task.n_targets),
        "/".join(map(str, task.ranks)),
        "-" if task.original_bytes is None else size(task.original_bytes),
        size(task.own_bytes),
        size(row.private_bytes),
    ):
        add(line, "td", cell)
    bar = add(line, "td")
    if task.original_bytes:
        whole = max(task.original_bytes, task.own_bytes + row.private_bytes)
        _bar(bar, [("own", "own", task.own_bytes), ("private", "private", row.private_bytes)],
             whole)  # fmt: skip
    add(line, "td", percent(task.mean_error))
    add(line, "td", percent(task.max_error))
    add(line, "td", "-" if row.components is None else f"{row.components:.1f}")
    add(line, "td", (task.worst_target or "")[start:] or "-", class_="name text")


def _errors(body: Element, o: Overview) -> None:
    add(body, "h2", "Errors")
    known = o.errors[np.isfinite(o.errors)]
    if not known.size:
        add(body, "p", "None is recorded in the file.")
        return
    limit = float(known.max())
    if limit == 0.0:
        add(body, "p", "Every delta is its original, to the last bit.")
        return
    side = "layer; the largest of its targets" if o.by_layer else "target"
    add(
        body,
        "p",
        f"Relative Frobenius error of each task's delta by {side}, measured when the file was "
        f"written: {percent(float(known.min()))} to {percent(limit)}. Pale is 0, full colour the "
        "largest; dashed: not adapted or not measured. Point at a cell for its value.",
        class_="legend",
    )
    names = [row.info.name for row in o.rows]
    charts.heat_map(
        body, o.errors, names, _without_common(o.columns), label="errors by task and target",
        show=percent, limit=limit,
    )  # fmt: skip


def _without_common(names: Sequence[str]) -> list[str]:
    """Names without the leading parts that all of them have."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and (
        len({parts[shared] for parts in split}) == 1
    ):
        shared += 1
    return [".".join(parts[shared:]) for parts in split] if len(names) > 1 else list(names)


def _sample(o: Overview) -> str:
    total = len(o.info.targets)
    return "" if o.n_sampled == total else f" Of {o.n_sampled} of the {total} targets."


def _spectra(body: Element, o: Overview) -> None:
    add(body, "h2", "Singular spectra")
    if np.isnan(o.spectra).all():
        add(body, "p", "No delta here has any.")
        return
    add(body, "p", "Share of a delta's energy in each of its singular components, mean over the "
        "targets: one line a task, their median bold. What falls fast would do with a smaller rank."
        + _sample(o), class_="legend")  # fmt: skip
    charts.lines(body, o.spectra, [row.info.name for row in o.rows], label="singular spectra")


def _likeness(body: Element, o: Overview) -> None:
    if len(o.rows) < 2:
        return
    add(body, "h2", "How alike the tasks are")
    off = o.likeness[~np.eye(len(o.rows), dtype=bool)]
    known = np.abs(off[np.isfinite(off)])
    limit = float(known.max()) if known.size else 1.0
    add(body, "p", "Cosine between tasks, all deltas of a task taken as one vector: 1 the same "
        "direction, 0 unrelated, below 0 opposed (blue). Full colour is "
        f"{limit:.2f}." + _sample(o), class_="legend")  # fmt: skip
    names = [row.info.name for row in o.rows]
    charts.heat_map(
        body, o.likeness, names, names, label="cosines between tasks", limit=limit,
        show=lambda value: f"{value:.2f}".replace("-0.00", "0.00"), numbers=len(names) <= 16,
        diagonal=True,
    )  # fmt: skip


def _provenance(body: Element, o: Overview) -> None:
    info = o.info
    add(body, "h2", "Provenance")
    method = ", ".join(
        f"{key} {value}"
        for key, value in info.method.items()
        if key != "name" and value is not None
    )
    name = str(info.method.get("name", "not recorded"))
    facts = [
        ("base model", info.base_model or "not recorded"),
        ("method", f"{name} ({method})" if method else name),
        ("written by", info.producer or "not recorded"),
        ("format", info.version),
        ("rows", ", ".join(f"{n} {kind}" for kind, n in info.encodings.items()) or "none"),
    ]
    if info.recovered:
        facts.append(("notice", "one header slot is damaged; the other one is used"))
    listed = add(body, "dl")
    for term, text in facts:
        add(listed, "dt", term)
        add(listed, "dd", text)
    if not any(row.files for row in o.rows):
        return
    details = add(body, "details")
    add(details, "summary", "Files that the tasks were converted from")
    table = add(add(details, "div", class_="wide"), "table")
    header = add(add(table, "thead"), "tr")
    for heading in ("task", "file", "bytes", "SHA-256"):
        add(header, "th", heading)
    lines = add(table, "tbody")
    for row in o.rows:
        for file, n_bytes, digest in row.files[:_MOST_FILES]:
            line = add(lines, "tr")
            add(line, "td", row.info.name, class_="name")
            add(line, "td", file, class_="name text")
            add(line, "td", f"{n_bytes:,}")
            add(add(line, "td", class_="text"), "code", digest)
