"""``make bench``: every part runs on tiny input with what is installed; figures are not tested."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks" / "peers"
#: A row that the quick run spares itself.
LEFT_OUT = {"rmm --max-error 5% (default)"}


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", PEERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look for it there
    spec.loader.exec_module(found)
    return found


def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PEERS), *map(str, words)],
        check=check, capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ...]]:
    """Those of the page's first table."""
    monkeypatch.syspath_prepend(str(PEERS))
    before = set(sys.modules)
    yield importlib.import_module("summary").QUESTIONS
    for name in ("summary", "report"):
        if name not in before:
            del sys.modules[name]


def test_every_part_runs_and_the_page_has_a_place_for_each_table(
    tmp_path: Path, questions: tuple[Any, ...]
) -> None:
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    before = page.read_text(encoding="utf-8")
    options = ["--quick", "--json", tmp_path / "x.json", "--markdown", page]
    if importlib.util.find_spec("matplotlib"):
        options += ["--plot", tmp_path / "x.svg"]
    done = run(*options)
    assert "no mark" not in done.stdout, done.stdout
    found = json.loads((tmp_path / "x.json").read_text())
    tables = found["tables"]
    assert {"open", "load", "merge", "convert", "extract", "size", "scaling-n"} <= set(tables)
    # Rows that the first table of the page asks for are there; some parts have no quick form.
    for question in questions:
        if question.table in tables and question.ours not in LEFT_OUT:
            assert question.ours in tables[question.table]["rows"], question
    assert any("rmmformat" in line for line in found["machine"])
    for name in ("load", "merge", "convert", "extract", "size"):
        rows = tables[name]["rows"]
        assert any(row.startswith("rmm") for row in rows), name
    # What does not depend on the machine is right: sizes, and errors against the originals.
    size = tables["size"]["rows"]
    assert size["rmm --exact"]["worst"] < 1e-9
    assert size["rmm --components 3"]["mean"] == pytest.approx(48.78, abs=0.1)
    assert size["a zip of them"]["bytes"] < size["the folders: safetensors and config"]["bytes"]
    merged = tables["merge"]["rows"]
    ours, theirs = merged["rmm, by position"], merged["numpy.linalg.svd"]
    assert ours["error"] == pytest.approx(theirs["error"], rel=1e-4)  # the same optimum
    assert merged["numpy.linalg.eigh of the Gram matrices"]["error"] == pytest.approx(
        theirs["error"], rel=1e-4
    )
    extracted = tables["extract"]["rows"]
    whole = extracted["rmm, f32, whole decompositions"]["error"]
    assert extracted["rmm, factors in f32"]["error"] == pytest.approx(whole, rel=1e-3)
    if "mergekit-extract-lora" in extracted:
        assert extracted["mergekit-extract-lora"]["error"] == pytest.approx(whole, rel=1e-3)
    after = page.read_text(encoding="utf-8")
    assert after != before
    assert module("report").marks(after) == module("report").marks(before)
    if "--plot" in options:
        assert "</svg>" in (tmp_path / "x.svg").read_text()


def test_an_unknown_part_is_refused_by_name() -> None:
    done = run("--only", "load,speed", check=False)
    assert done.returncode == 2
    assert "speed" in done.stderr
    assert "extract" in done.stderr


def test_tables_go_where_the_page_has_marks(tmp_path: Path) -> None:
    report = module("report")
    page = tmp_path / "x.md"
    page.write_text(
        "one\n<!-- bench: a -->\nold\n<!-- end -->\ntwo\n<!-- bench: b -->\n<!-- end -->"
    )
    assert report.write_markdown(page, {"a": r"new \1", "c": "x"}) == ["c"]
    assert page.read_text() == (
        "one\n<!-- bench: a -->\nnew \\1\n<!-- end -->\ntwo\n<!-- bench: b -->\n<!-- end -->"
    )
    assert report.write_markdown(tmp_path / "new.md", {"a": "1", "b": "2"}) == []
    assert report.marks((tmp_path / "new.md").read_text()) == ["a", "b"]


def test_a_table_writes_numbers_ratios_and_what_is_missing() -> None:
    report = module("report")
    table = report.Table(
        "t", "title", "way", (report.Column("s", "s"), report.Column("ratio", "x"))
    )
    table.put("rmm", s=2.0)
    table.put("other", s=5.0)
    table.put("gone", s=None)
    table.compare("rmm", "s")
    assert table.markdown().splitlines()[2:] == [
        "| rmm | 2.00 | 1.00 |",
        "| other | 5.00 | 2.50 |",
        "| gone | – | – |",
    ]


def test_everybody_gets_as_many_turns() -> None:
    measure = module("measure")
    calls: list[str] = []
    found = measure.take_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"}, 3, warm=1
    )
    assert calls == ["a", "b"] * 4
    assert set(found) == {"a", "b"}
    calls.clear()
    slow = {"a": lambda: calls.append("a")}
    measure.take_turns(slow, 50, warm=0, least=2, enough=0)
    assert len(calls) == 2
