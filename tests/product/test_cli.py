"""The command line: what it prints, and the exit code of every kind of failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rmmformat.cli.main import VERBS, main
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert

from .conftest import make_tasks


def rmm(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.rmm"
    convert(make_tasks(), path, choose_method(components=1))
    return path


def test_the_main_job(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "skills.rmm"
    done = rmm("convert", demo_adapters, "-o", path, "--components", 3, "--ledger")
    assert done.exit_code == 0, done.output
    assert "68.75 %" in done.output
    assert "adapter_config.json" in done.output
    done = rmm("validate", path, "--against", demo_adapters)
    assert done.exit_code == 0, done.output
    assert done.output.count("as recorded") == 8
    done = rmm("info", path)
    assert done.exit_code == 0
    assert "all-MiniLM-L6-v2" in done.output
    done = rmm("export", path, "imdb", "--to", "peft", "-o", tmp_path / "imdb")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "imdb" / "adapter_model.safetensors").is_file()
    done = rmm("export", path, "imdb", "--to", "peft", "-o", tmp_path / "imdb")
    assert done.exit_code != 0


def test_names_can_be_given(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    source = f"reviews={demo_adapters / 'imdb'}"
    assert rmm("convert", source, "-o", path, "--exact").exit_code == 0
    assert [t["name"] for t in json.loads(rmm("info", path, "--json").output)["tasks"]] == [
        "reviews"
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_ends_in_an_example(verb: str) -> None:
    done = rmm(verb, "--help")
    assert done.exit_code == 0
    text = done.output
    assert f"rmm {verb}" in text.split("Example:")[1]


def test_json_is_json(file: Path, demo_adapters: Path, tmp_path: Path) -> None:
    report = rmm("convert", demo_adapters, "-o", tmp_path / "y.rmm", "--exact", "--json")
    assert json.loads(report.output)["fraction"] == 1.0
    info = json.loads(rmm("info", file, "--json").output)
    assert [task["name"] for task in info["tasks"]] == ["task0", "task1", "task2"]
    entries = json.loads(rmm("info", file, "--task", "task0", "--json").output)
    assert [entry["target"] for entry in entries] == ["layer.0", "layer.1"]
    verdict = json.loads(rmm("validate", file, "--json").output)
    assert verdict["ok"] is True
    assert verdict["violations"] == []
    fields = json.loads(rmm("dump", file, "--json").output)
    assert fields[0]["name"] == "signature"
    assert {row["name"] for row in json.loads(rmm("formats", "--json").output)} >= {"peft"}


def test_a_broken_file_is_exit_3(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[700] ^= 1
    file.write_bytes(raw)
    done = rmm("validate", file)
    assert done.exit_code == 3
    assert "RMM-081" in done.output
    raw[100] ^= 1
    file.write_bytes(raw)
    done = rmm("info", file)
    assert done.exit_code == 3
    assert "RMM-010" in done.output


def test_a_newer_file_is_exit_4(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[8] = 2
    file.write_bytes(raw)
    for verb in ("info", "validate"):
        done = rmm(verb, file)
        assert done.exit_code == 4, verb
        assert "RMM-002" in done.output


def test_an_existing_output_is_exit_5(file: Path, demo_adapters: Path) -> None:
    done = rmm("convert", demo_adapters, "-o", file, "--exact")
    assert done.exit_code == 5
    assert "--force" in done.output


@pytest.mark.parametrize(
    "words",
    [
        ("convert",),
        ("convert", "a", "-o", "b", "--components", "-1"),
        ("convert", "a", "-o", "b", "--exact", "--components", "3"),
        ("convert", "a", "-o", "b", "--grouping", "position", "--exact"),
        ("convert", "a", "-o", "b", "--grouping", "nonsense", "--components", "3"),
        ("nonsense",),
    ],
)
def test_misuse_is_exit_2(words: tuple[str, ...]) -> None:
    assert rmm(*words).exit_code == 2


def test_what_is_not_there_is_exit_1_or_3(file: Path, tmp_path: Path) -> None:
    assert rmm("info", tmp_path / "none.rmm").exit_code == 1
    done = rmm("export", file, "tosk1", "--to", "peft", "-o", tmp_path / "o")
    assert done.exit_code == 1
    assert "There is task1" in done.output
    done = rmm("convert", tmp_path / "none", "-o", tmp_path / "o.rmm", "--exact")
    assert done.exit_code == 3
    assert not (tmp_path / "o.rmm").exists()


def test_against_other_sources_is_exit_1(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    rmm("convert", demo_adapters / "imdb", "-o", path, "--exact")
    done = rmm("validate", path, "--against", f"imdb={demo_adapters / 'yelp'}")
    assert done.exit_code == 1
    assert "differs" in done.output
    done = rmm("validate", path, "--against", demo_adapters / "yelp")
    assert done.exit_code == 1
    assert "no such task" in done.output


def test_names_cannot_reach_the_terminal_as_markup_or_escapes(tmp_path: Path) -> None:
    tasks = make_tasks(1)
    tasks[0].name = "[bold]x[/bold]\u202eevil\u009b31m"
    convert(tasks, tmp_path / "x.rmm", choose_method(exact=True))
    output = rmm("info", tmp_path / "x.rmm").output
    assert "[bold]x[/bold]" in output
    assert "\u202e" not in output
    assert "\u009b" not in output
