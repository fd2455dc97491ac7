"""Hostile files cost time in proportion to their length: opening and validating, in every reader.

What the Python readers do is counted in calls, so that the test does not hang on the machine; the
compiled core has a generous bound in seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import drafts
import google_crc32c
import pytest
from drafts import NONE, Collection, Draft, Entry, Private, Side, Target, Task, Trellis
from readers import ADAPTERS, Reader

CALLS_PER_BYTE = 10
SECONDS = 1.0  # in the compiled core, for what takes it a few milliseconds


class TooMuch(Exception):  # noqa: N818
    """More calls than allowed."""


def tables(n_targets: int, encodings: list[int]) -> Draft:
    """Targets of different lengths, one layout of runs of one row each, and a form for it."""
    d = Draft(Collection())
    d.strings = [b"%06d" % i for i in range(n_targets + 1)]
    n = len(encodings)
    d.tables |= {
        "TARG": [{"n_in": 1 + i, "n_out": 1, "name": i} for i in range(n_targets)],
        "RUNS": [{"count": 1, "encoding": code} for code in encodings],
        "LAYO": [{"first_run": 0, "n_runs": n, "n_rows": n}],
        "FORM": [
            {"scale": 1.0, "rank": n, "coefficients_a": NONE, "residual_a": 0,
             "coefficients_b": NONE, "residual_b": NONE, "dtype_a": 1, "dtype_b": 1}
        ],
    }  # fmt: skip
    return d


def entries_by_runs(last: int = 2, length: int = 0) -> Draft:
    """A few thousand entries, whose layout has a few tens of thousands of runs."""
    n = 2000
    d = tables(n, [*[0, 1] * 7500, last])
    d.tables["ENTR"] = [{"length": length, "form": 0, "crc": 0}] * n
    d.tables["TLST"] = [{"target": i} for i in range(n)]
    run = d.place(bytes(n * length)) if length else {}
    d.tables["TASK"] = [{"first_entry": 0, "n_entries": n, "name": n, **run}]
    return d


def frames_by_runs() -> Draft:
    """Frames of the same bytes, each as long as its runs of a few tens of thousands take."""
    n = 1000
    d = tables(n, [0, 1] * 7500)
    extent = d.place(bytes(4 * 7500))
    d.tables["FRAM"] = [
        {"target": i, "crc": 0, **extent, "length": 4 * 7500 * (1 + i), "group_a": 1,
         "rank_a": 15000, "mean_a": 0, "basis_a": NONE, "mean_b": NONE, "basis_b": NONE}
        for i in range(n)
    ]  # fmt: skip
    return d


def frames_of_nothing() -> Draft:
    """As many frames as fit, of rows of zeros that are as many as a frame may have."""
    n = 1500
    d = tables(n, [0])
    d.tables["RUNS"][0]["count"] = d.tables["LAYO"][0]["n_rows"] = 2**20
    d.tables["FORM"] = []
    d.tables["FRAM"] = [
        {"target": i, "crc": 0, "group_a": 1, "rank_a": 2**20, "mean_a": 0, "basis_a": NONE,
         "mean_b": NONE, "basis_b": NONE}
        for i in range(n)
    ]  # fmt: skip
    return d


def privates() -> Draft:
    """Thousands of private tensors, all of one blob."""
    first = Private("000000", 6, (64,), bytes(64))
    d = Draft(Collection([Task("t", [], [first])]))
    n = 8000
    d.strings = [*[b"%06d" % i for i in range(n)], b"t"]
    d.tables["PRIV"] = [d.tables["PRIV"][0] | {"name": i} for i in range(n)]
    d.tables["TASK"][0] |= {"n_privates": n, "name": n}
    return d


def tasks() -> Draft:
    """Thousands of tasks that share one list of targets."""
    n = 2500
    d = tables(1, [0])
    d.strings = [b"%06d" % i for i in range(n)]
    d.tables["TLST"] = [{"target": 0}]
    d.tables["ENTR"] = [{"length": 0, "form": 0, "crc": 0}] * n
    d.tables["TASK"] = [{"first_entry": i, "n_entries": 1, "name": i} for i in range(n)]
    return d


def trellis_runs() -> Draft:
    """An entry of thousands of trellis runs of one value."""
    run, n = Trellis([(1, [0])], 1), 10000
    entry = Entry(Target("t", 1, 1), n, Side(residual=[run.run()] * n), Side())
    return Draft(Collection([Task("task", [entry])]))


def unknown_runs() -> Draft:
    """Entries of an encoding that nobody knows, behind thousands of runs."""
    return entries_by_runs(0xEE)


CASES: list[tuple[Callable[[], Draft], str | None]] = [
    (entries_by_runs, "RMM-061"),
    (lambda: entries_by_runs(0x20), "RMM-062"),
    (lambda: entries_by_runs(2, 64), "RMM-061"),
    (unknown_runs, "RMM-062"),
    (frames_by_runs, "RMM-071"),
    (frames_of_nothing, None),
    (privates, None),
    (tasks, None),
    (trellis_runs, None),
]
NAMES = [
    "entries of no bytes", "runs that end in trellis", "entries of 64 bytes", "unknown runs",
    "frames by runs", "frames of nothing", "privates", "tasks", "trellis runs",
]  # fmt: skip


def checksum(data: Any) -> int:
    return int(google_crc32c.value(bytes(data)))


@pytest.fixture(params=zip(CASES, NAMES, strict=True), ids=lambda case: case[1])
def hostile(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes, str | None]:
    (make, rule), _ = request.param
    monkeypatch.setattr(drafts, "crc32c", checksum)
    return make().pack(), rule


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_work_is_in_proportion_to_length(adapter: Any, hostile: tuple[bytes, str | None]) -> None:
    try:
        reader: Reader = adapter()
    except ImportError as error:
        pytest.skip(f"{adapter.name} reader: {error}")
    data, rule = hostile
    calls, limit = 0, CALLS_PER_BYTE * len(data)

    def count(_frame: Any, event: str, _what: Any) -> None:
        nonlocal calls
        calls += event.endswith("call")
        if calls > limit:
            sys.setprofile(None)
            raise TooMuch

    before = time.perf_counter()
    sys.setprofile(count)
    try:
        found = reader.validate(data)
    finally:
        sys.setprofile(None)
    if reader.name == "native":
        assert time.perf_counter() - before < SECONDS
    assert (found[0][0] if found else None) == rule
