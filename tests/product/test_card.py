"""The model card: what the hub's own library reads from it, its figures, that names stay data."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import rmmformat as rmm
from rmmformat import card
from rmmformat.cli.main import main
from rmmformat.errors import OptionError
from rmmformat.inspect import file_info
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert
from rmmformat.text import printable

from .conftest import make_tasks

EVIL = [
    "<script>alert(1)</script>",
    "`` ` ```x``` `",
    "a|b|c",
    "]( javascript:x) ![i](u) **b**",
    "line\u2028break\u2029---\x85# head",
    "\u202eevil",
    "$x$ &lt; \\ \"'",
]


@pytest.fixture(scope="module")
def skills(demo_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card") / "skills.rmm"
    rmm.convert(demo_adapters, path, max_error=0.1)
    return path


def card_of(path: Path, **options: str) -> str:
    with rmm.open(path) as collection:
        return card.model_card(collection, **options)


def test_the_hub_library_reads_its_head(skills: Path) -> None:
    read = ModelCard(card_of(skills, repo="me/skills", licence="apache-2.0"))
    assert read.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert read.data.library_name == "rmmformat"
    assert read.data.license == "apache-2.0"
    assert set(read.data.tags) >= {"rmm", "lora", "adapter"}
    assert read.data.to_dict()["base_model_relation"] == "adapter"
    assert read.text.strip().startswith("# skills")


def tables(text: str) -> list[list[str]]:
    """Cells of every row of the card's table, as a Markdown reader gives them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    rows: list[list[str]] = []
    for before, token in itertools.pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            assert token.children is not None
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_its_figures_are_those_of_the_file(skills: Path) -> None:
    rows = tables(card_of(skills))[1:]
    with rmm.open(skills) as collection:
        info = file_info(collection)
    assert [row[0] for row in rows] == [task.name for task in info.tasks]
    for row, task in zip(rows, info.tasks, strict=True):
        assert row[1] == "12"
        assert row[2] == "16"
        assert float(row[5].split()[0]) == pytest.approx(100 * (task.mean_error or 0), abs=0.006)
        assert float(row[6].split()[0]) == pytest.approx(100 * (task.max_error or 0), abs=0.006)


def test_its_snippet_runs(skills: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(skills.parent)
    code = re.search(r"```python\n(.*?)```", card_of(skills), re.DOTALL)
    assert code
    scope: dict[str, object] = {}
    exec(code[1], scope)  # noqa: S102  # our own text
    assert len(scope["task"]) == 12  # type: ignore[arg-type]


def test_with_a_repository_the_snippet_opens_it_there(skills: Path) -> None:
    text = card_of(skills, repo="me/skills")
    assert 'rmm.open("hf://me/skills/skills.rmm")' in text


@pytest.mark.parametrize("options", [{"repo": "me"}, {"repo": "../x/y"}, {"licence": "a\nb: c"}])
def test_what_is_no_repository_or_licence(options: dict[str, str], skills: Path) -> None:
    with pytest.raises(OptionError):
        card_of(skills, **options)


def test_names_are_data(tmp_path: Path) -> None:
    tasks = make_tasks(len(EVIL))
    for task, name in zip(tasks, EVIL, strict=True):
        task.name = name
        task.base_model = "x\n---\nlicense: mit"
    path = tmp_path / "a_b_*c*.rmm"
    convert(tasks, path, choose_method(encoding="q8"))
    text = card_of(path)
    read = ModelCard(text)
    assert read.data.license is None
    assert read.data.base_model is None
    tokens = MarkdownIt("commonmark").enable("table").parse(read.text)
    assert not [token for token in tokens if token.type.startswith("html")]
    inline = [child for token in tokens for child in token.children or []]
    assert not {"html_inline", "image", "strong_open", "em_open"} & {c.type for c in inline}
    links = [child.attrs["href"] for child in inline if child.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2510.14163"]
    shown = [" ".join(row[0].split()) for row in tables(text)[1:]]
    assert sorted(shown) == sorted(" ".join(printable(name).split()) for name in EVIL)
    code = re.search(r"(`{3,})python\n(.*?)\n\1", text, re.DOTALL)
    assert code
    called = re.search(r"load\((.*)\)\n", code[2])
    assert called
    assert eval(called[1]) == sorted(EVIL)[0]  # noqa: S307  # a literal of ours


def test_a_path_is_no_base_model_of_the_hub(tmp_path: Path) -> None:
    tasks = make_tasks(1, base_model="/home/someone/models/x")
    convert(tasks, tmp_path / "x.rmm", choose_method(exact=True))
    assert ModelCard(card_of(tmp_path / "x.rmm")).data.base_model is None


def test_many_tasks_stay_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "MAX_ROWS", 4)
    convert(make_tasks(9, dtype=np.float32), tmp_path / "x.rmm", choose_method(encoding="q4"))
    text = card_of(tmp_path / "x.rmm")
    assert len(tables(text)) == 5
    assert "The 4 of 9 tasks with the largest errors" in text


def test_the_verb(skills: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    out = tmp_path / "README.md"
    shown = runner.invoke(main, ["card", str(skills)])
    assert shown.exit_code == 0
    done = runner.invoke(main, ["card", str(skills), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_text(encoding="utf-8") == shown.stdout
    assert runner.invoke(main, ["card", str(skills), "-o", str(out)]).exit_code == 1
    assert runner.invoke(main, ["card", str(skills), "--repo", "x"]).exit_code == 2
