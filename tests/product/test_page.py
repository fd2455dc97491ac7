"""The page of a collection: its figures, that names stay data, its bounds."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import rmmformat as rmm
from rmmformat.cli.main import main
from rmmformat.methods import choose_method
from rmmformat.model import Factors
from rmmformat.page import collection_page
from rmmformat.page import data as page_data
from rmmformat.pipeline import convert

from .conftest import MemoryTask, make_tasks

EVIL = "<script>alert(1)</script>\"'&\u202e"


class Reader(HTMLParser):
    """Collects elements, their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(path: Path) -> str:
    with rmm.open(path) as collection:
        return collection_page(collection)


def write(tmp_path: Path, tasks: list[MemoryTask], **options: object) -> Path:
    path = tmp_path / "x.rmm"
    convert(tasks, path, choose_method(**options))  # type: ignore[arg-type]
    return path


def test_figures_are_those_of_the_deltas(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "skills.rmm"
    rmm.convert(demo_adapters, path, exact=True)
    with rmm.open(path) as collection:
        found = page_data.overview(collection)
        tasks = [collection.load(name) for name in collection.tasks]
    assert [row.info.name for row in found.rows] == [task.name for task in tasks]
    assert found.errors.shape == (8, 12)
    assert not found.errors.any()
    assert len(found.columns) == 12
    assert not found.by_layer
    whole = np.array([
        np.concatenate([(f.scale * f.B @ f.A).ravel() for f in (task[t] for t in sorted(task))])
        for task in tasks
    ])  # fmt: skip
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(found.likeness, whole @ whole.T, atol=1e-5)
    shares = []
    for f in tasks[0].values():
        s = np.linalg.svd(f.B @ f.A, compute_uv=False)[:16] ** 2
        shares.append(s / s.sum())
    np.testing.assert_allclose(found.spectra[0], np.mean(shares, axis=0), atol=1e-5)
    want = np.mean([1 + np.sum(np.cumsum(share) < 0.9) for share in shares])
    assert found.rows[0].components == want


def test_the_page_shows_what_info_shows(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "skills.rmm"
    rmm.convert(demo_adapters, path, max_error=0.05)
    done = CliRunner().invoke(main, ["info", str(path), "--html", str(tmp_path / "p.html")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    seen = Reader(text)
    assert "sentence-transformers/all-MiniLM-L6-v2" in seen.text
    assert "planned (max_error 0.05)" in seen.text
    with rmm.open(path) as collection:
        for task in collection.tasks:
            assert task in seen.text
    assert seen.tags.count("svg") == 3
    # 8 x 12 errors and 8 x 8 cosines, each with what it says
    assert seen.tags.count("rect") == 8 * 12 + 8 * 8
    again = CliRunner().invoke(main, ["info", str(path), "--html", str(tmp_path / "p.html")])
    assert again.exit_code == 1
    assert "exists already" in again.output


def test_the_page_needs_nothing_else(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "skills.rmm"
    rmm.convert(demo_adapters, path, max_error=0.05)
    text = page_of(path)
    seen = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(seen.tags)
    assert not {"src", "href", "srcset", "onload"} & {name for name, _ in seen.attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_names_are_data(tmp_path: Path) -> None:
    tasks = make_tasks(3)
    factors = {f"{EVIL}.{i}": f for i, f in enumerate(tasks[0]._factors.values())}
    tasks[0] = MemoryTask(f"a{EVIL}", factors, base_model=f"b{EVIL}",
                          privates={EVIL: np.ones(3, np.float32)})  # fmt: skip
    path = tmp_path / "x.rmm"
    convert(tasks, path, choose_method(encoding="q4"), allow_base_mismatch=True)
    text = page_of(path)
    assert "<script" not in text
    assert "\u202e" not in text
    seen = Reader(text)
    assert "script" not in seen.tags
    assert f"a{EVIL[:-1]}\\u202e" in seen.text


@pytest.mark.parametrize("n", [1, 2, 100])
def test_from_one_task_to_a_hundred(n: int, tmp_path: Path) -> None:
    path = write(tmp_path, make_tasks(n, sides=((12, 9),)), encoding="q8")
    text = page_of(path)
    assert len(text) < 2_500_000
    seen = Reader(text)
    for t in range(n):
        assert f"task{t}" in seen.text


def test_many_tasks_and_targets_stay_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_data, "MAX_TASKS", 5)
    monkeypatch.setattr(page_data, "MAX_COLUMNS", 6)
    monkeypatch.setattr(page_data, "MAX_TARGETS", 3)
    tasks = make_tasks(9, sides=((12, 9),) * 40)
    for task in tasks:
        task._factors["head"] = next(iter(task._factors.values()))
    tasks = [MemoryTask(task.name, task._factors) for task in tasks]
    path = write(tmp_path, tasks, encoding="q4")
    with rmm.open(path) as collection:
        found = page_data.overview(collection)
        info = found.info
    worst = sorted(info.tasks, key=lambda task: -(task.max_error or 0))[:5]
    assert {row.info.name for row in found.rows} == {task.name for task in worst}
    assert found.by_layer
    assert len(found.columns) == 6
    assert found.columns[0] == "layers 0 to 7"
    assert found.columns[-1] == "elsewhere"
    for row, errors in zip(found.rows, found.errors, strict=True):
        assert errors.max() == pytest.approx(row.info.max_error)
    assert found.n_sampled == 3
    text = page_of(path)
    assert "the 5 tasks with the largest errors" in text
    assert "Of 3 of the 41 targets" in text


def test_zero_deltas_and_missing_targets(tmp_path: Path) -> None:
    tasks = make_tasks(3)
    first = next(iter(tasks[0]._factors.items()))
    zero = Factors(first[1].A, np.zeros_like(first[1].B), 1.0)
    tasks[1] = MemoryTask("zero", {first[0]: zero})
    tasks[2] = MemoryTask("other", {"other.7": first[1]})
    path = write(tmp_path, tasks, exact=True)
    text = page_of(path)
    assert re.search(r"zero · task0: none", text)
    assert "other.7" in text


def test_html_stands_alone(tmp_path: Path) -> None:
    path = write(tmp_path, make_tasks(1), exact=True)
    done = CliRunner().invoke(main, ["info", str(path), "--html", "p.html", "--json"])
    assert done.exit_code == 2
