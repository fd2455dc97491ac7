"""``rmm compare``: table, JSON, page, evaluation, exit codes."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rmmformat.cli.main import main
from rmmformat.contenders import FAMILIES

from .conftest import rmm

NUMBER = {"type": ["number", "null"], "minimum": 0}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["producer", "base_model", "tasks", "n_targets", "ranks", "f32_bytes",
                 "original_bytes", "evaluation", "rows"],
    "properties": {
        "producer": {"type": "string", "pattern": "^rmmformat "},
        "base_model": {"type": "string"},
        "tasks": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "n_targets": {"type": "integer", "minimum": 1},
        "ranks": {"type": "array", "items": {"type": "integer"}},
        "f32_bytes": {"type": "integer"},
        "original_bytes": {"type": "integer"},
        "evaluation": {"type": "string"},
        "rows": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["family", "method", "parameters", "keeps_tasks", "n_bytes",
                             "file_bytes", "fraction", "fraction_stored", "mean_error",
                             "median_error", "max_error", "seconds", "scores", "score", "change",
                             "change_error", "best", "note"],
                "properties": {
                    "family": {"enum": list(FAMILIES)},
                    "method": {"type": "string"},
                    "parameters": {"type": "object"},
                    "keeps_tasks": {"type": "boolean"},
                    "n_bytes": {"type": ["integer", "null"], "minimum": 0},
                    "file_bytes": {"type": ["integer", "null"], "minimum": 0},
                    "fraction": NUMBER,
                    "fraction_stored": NUMBER,
                    "mean_error": NUMBER,
                    "median_error": NUMBER,
                    "max_error": NUMBER,
                    "seconds": NUMBER,
                    "scores": {"type": ["object", "null"],
                               "additionalProperties": {"type": "number"}},
                    "score": {"type": ["number", "null"]},
                    "change": {"type": ["number", "null"]},
                    "change_error": NUMBER,
                    "best": {"type": "boolean"},
                    "note": {"type": "string"},
                },
            },
        },
    },
}  # fmt: skip

EVALUATION = '''
def targets(task, deltas, privates):
    """Any function will do: here how many deltas there are, less their distance from rank 16."""
    assert len(privates) == 2
    assert all(d.A.shape[0] == d.B.shape[1] for d in deltas.values())
    return len(deltas) + deltas["bert.encoder.layer.0.attention.self.query"].A.shape[0] / 100

def some(task, deltas, privates):
    return 1.0 if task in ("imdb", "bbc") else None

def examples(task, deltas, privates):
    """Ten examples in amazon, twenty elsewhere; no delta errs in one more, and in two of bbc."""
    right = [1.0] * (9 if task == "amazon" else 19) + [0.0]
    if not deltas["bert.encoder.layer.0.attention.self.query"].A.shape[0]:
        right[: {"amazon": 1, "bbc": 2}.get(task, 0)] = [0.0] * {"amazon": 1, "bbc": 2}.get(task, 0)
    return right

def shapes(task, deltas, privates):
    return [[1.0]]

def fickle(task, deltas, privates):
    return [1.0] * (2 + deltas["bert.encoder.layer.0.attention.self.query"].A.shape[0])

def broken(task, deltas, privates):
    return {}["nothing"]

number = 3
'''


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "an_evaluation.py").write_text(EVALUATION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "an_evaluation", raising=False)
    return "an_evaluation"


def read(*words: object) -> Any:
    done = rmm("compare", *words, "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    jsonschema.validate(value, SCHEMA)
    return value


def test_table(demo_adapters: Path) -> None:
    done = rmm("compare", demo_adapters, "--methods", "rmm,ties,exact", "--components", 3)
    assert done.exit_code == 0, done.output
    assert re.search(r"RMM p=3.*68.75 %.*137.50 %.*48.78 %", done.stdout)
    assert re.search(r"\* .*exact.*50.00 %.*100.00 %.* 0 %", done.stdout)
    assert "RMM p=1" not in done.stdout
    assert "TIES, on products" in done.stdout


def test_json(demo_adapters: Path) -> None:
    found = read(demo_adapters, "--methods", "planned,blocks", "--size", 0.05)
    assert [row["method"] for row in found["rows"]][:2] == ["planned, 5 %", "8-bit blocks"]
    assert found["rows"][0]["parameters"] == {"size": 0.05}
    assert found["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_one_task_alone(demo_adapters: Path) -> None:
    found = read(demo_adapters / "imdb")
    assert not [row for row in found["rows"] if row["family"] in ("rmm", "factor", "aligned")]
    mean = next(r for r in found["rows"] if r["method"] == "Task Arithmetic, on factors")
    assert mean["mean_error"] < 1e-6


def test_too_large_for_dense_methods(demo_adapters: Path) -> None:
    limit = 8 * 384 * 384
    words = (demo_adapters, "--methods", "ties,task-arithmetic", "--dense-limit")
    assert all(row["n_bytes"] is not None for row in read(*words, limit)["rows"])
    rows = read(*words, limit - 1)["rows"]
    skipped = [row for row in rows if row["n_bytes"] is None]
    assert [row["method"] for row in skipped] == ["TIES, on products"]
    assert "1,179,648 values" in skipped[0]["note"]
    assert "--dense-limit" in skipped[0]["note"]
    done = rmm("compare", *words, limit - 1)
    assert "TIES, on products: not run" in done.stderr


def test_evaluation(demo_adapters: Path, evaluation: str) -> None:
    found = read(demo_adapters, "--methods", "none,exact,truncation,ties,emr",
                 "--eval", f"{evaluation}:targets")  # fmt: skip
    assert found["evaluation"] == "an_evaluation:targets"
    scores = {row["method"]: row["score"] for row in found["rows"]}
    assert scores["exact"] == pytest.approx(12.16)
    assert scores["no delta"] == pytest.approx(12.0)
    assert scores["rank 4"] == pytest.approx(12.04)
    assert scores["TIES, on factors"] == pytest.approx(12.16)
    assert scores["TIES, on products"] == pytest.approx(12 + 3.84)
    assert all(set(row["scores"]) == set(found["tasks"]) for row in found["rows"])


def test_evaluation_of_some_tasks(demo_adapters: Path, evaluation: str) -> None:
    (row,) = read(demo_adapters, "--methods", "exact", "--eval", f"{evaluation}:some")["rows"]
    assert row["scores"] == {"bbc": 1.0, "imdb": 1.0}
    assert row["score"] == 1.0


def test_change_and_its_error_are_paired_by_example(
    demo_adapters: Path, tmp_path: Path, evaluation: str
) -> None:
    words = (demo_adapters, "--methods", "none,exact,rmm", "--components", 1, "--eval",
             f"{evaluation}:examples")  # fmt: skip
    rows = {row["method"]: row for row in read(*words)["rows"]}
    assert rows["exact"]["score"] == pytest.approx((0.9 + 7 * 0.95) / 8)
    assert (rows["exact"]["change"], rows["exact"]["change_error"]) == (0.0, 0.0)
    assert rows["no delta"]["change"] == pytest.approx(-(1 / 10 + 2 / 20) / 8)
    # Differences are -1 in one of ten examples, and in two of twenty; var with n - 1.
    square = (1 / 10) * (9 / 10) * (10 / 9) / 10 + (2 / 20) * (18 / 20) * (20 / 19) / 20
    assert rows["no delta"]["change_error"] == pytest.approx(square**0.5 / 8)
    page = tmp_path / "page.html"
    shown = rmm("compare", *words, "--html", page).stdout
    assert re.search(r"-0\.025 ± 0\.015", shown)
    text = page.read_text(encoding="utf-8")
    assert "<td>-0.025 ± 0.015</td>" in text


def test_change_without_examples_or_originals(demo_adapters: Path, evaluation: str) -> None:
    words = (demo_adapters, "--eval", f"{evaluation}:targets", "--methods")
    none, _ = read(*words, "none,exact")["rows"]
    assert none["change"] == pytest.approx(-0.16)
    assert none["change_error"] is None
    (none,) = read(*words, "none")["rows"]
    assert (none["change"], none["change_error"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("shapes", 1, "the evaluation gave an array of shape (1, 1) for task 'amazon'"),
        ("fickle", 1, "gave 2 numbers for task 'amazon', and 18 for its original"),
        ("broken", 1, "the evaluation failed on task 'amazon': KeyError: 'nothing'"),
        ("number", 2, "has no function number"),
        ("nothing", 2, "has no function nothing"),
    ],
)
def test_evaluations_that_fail(
    demo_adapters: Path, evaluation: str, name: str, code: int, words: str
) -> None:
    done = rmm(
        "compare", demo_adapters, "--methods", "none,exact", "--eval", f"{evaluation}:{name}"
    )
    assert done.exit_code == code
    assert words in done.stderr


@pytest.mark.parametrize("text", ["no_such_module_at_all:f", "json", ":f"])
def test_evaluations_that_are_not_there(demo_adapters: Path, text: str) -> None:
    assert rmm("compare", demo_adapters, "--eval", text).exit_code == 2


class _Page(html.parser.HTMLParser):
    """Collects every attribute that could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.asked.append(value or "")


def test_page_is_self_contained(demo_adapters: Path, tmp_path: Path, evaluation: str) -> None:
    path = tmp_path / "page.html"
    words = ("compare", f"a<b>={demo_adapters / 'imdb'}", demo_adapters / "bbc",
             "--methods", "none,exact,rmm,blocks,ties", "--html", path,
             "--eval", f"{evaluation}:targets")  # fmt: skip
    done = rmm(*words)
    assert done.exit_code == 0, done.output
    assert str(path) in done.stderr
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("svg") == 2
    assert all(value.startswith("#") for value in page.asked)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text
    assert "8-bit blocks" in text
    assert rmm(*words).exit_code == 1  # it is there already
    before = path.read_bytes()
    done = rmm(*words, "--force")
    assert done.exit_code == 0
    assert re.sub(rb"\d+\.\d\d</td>", b"", path.read_bytes()) == re.sub(
        rb"\d+\.\d\d</td>", b"", before
    )


def test_page_without_matplotlib(
    demo_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "matplotlib" else find(name)
    )
    done = rmm("compare", demo_adapters, "--html", tmp_path / "page.html")
    assert done.exit_code == 4
    assert "pip install 'rmmformat[plots]'" in done.stderr


def test_exit_codes(demo_adapters: Path, tmp_path: Path) -> None:
    assert rmm("compare").exit_code == 2
    done = rmm("compare", demo_adapters, "--methods", "rmm,best")
    assert done.exit_code == 2
    assert "best; known: none, exact" in done.stderr
    assert rmm("compare", demo_adapters, "--size", 0).exit_code == 2
    assert rmm("compare", tmp_path / "nothing").exit_code == 3
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((demo_adapters / "imdb" / name).read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/other"
    (other / "adapter_config.json").write_text(json.dumps(config))
    mixed = ("compare", demo_adapters / "bbc", other, "--methods", "exact,rmm")
    assert rmm(*mixed).exit_code == 1
    assert rmm(*mixed, "--allow-base-mismatch").exit_code == 0


def test_interrupt_is_clean(
    demo_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("rmmformat.compare.compare_with_sources", stop)
    page = tmp_path / "page.html"
    done = rmm("compare", demo_adapters, "--methods", "exact", "--html", page)
    assert done.exit_code == 1
    assert "interrupted" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_methods_and_ends_with_an_example() -> None:
    done = rmm("compare", "--list-methods")
    assert done.exit_code == 0
    assert all(word in done.stdout for word in FAMILIES)
    assert "rmm compare adapters/" in rmm("compare", "--help").stdout
    assert "compare" in main.list_commands(None)  # type: ignore[arg-type]
