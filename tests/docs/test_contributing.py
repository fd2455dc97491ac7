"""What CONTRIBUTING says of adding a part is how it is: one file, one line."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import rmmformat
from rmmformat import runtimes
from rmmformat.cli.main import VERBS
from rmmformat.converters import registry

from .pages import ROOT

PACKAGE = Path(rmmformat.__file__).parent


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}


def test_every_verb_is_a_module_and_every_module_a_verb() -> None:
    assert modules(PACKAGE / "cli") - {"main"} == set(VERBS)


def test_every_runtime_is_a_module_that_imports_without_its_library() -> None:
    for name in runtimes._MODULES:
        module = importlib.import_module(f"rmmformat.runtimes.{name}")
        assert module.__doc__
        assert getattr(runtimes, name) is module


def test_every_runtime_module_is_listed_or_part_of_one_that_is() -> None:
    for name in modules(PACKAGE / "runtimes"):
        assert any(name == r or name.startswith(f"{r}_") for r in runtimes._MODULES), name


def test_a_format_is_one_module_and_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one is detected, listed and opened once its row is there, with no other change."""
    (tmp_path / "rmm_test_format.py").write_text(
        "class Reader:\n"
        "    name = 'dots'\n"
        "    def detect(self, path):\n"
        "        return path.suffix == '.dots'\n"
        "    def open(self, path, *, name=None, options=None):\n"
        "        return [path.read_text()]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row = registry.Format("dots", "dots for a test", importer="rmm_test_format:Reader")
    monkeypatch.setattr(registry, "BUILT_IN", (*registry.BUILT_IN, row))
    (tmp_path / "x.dots").write_text("...")
    assert row in registry.formats()
    assert registry.detect(tmp_path / "x.dots") == "dots"
    assert registry.get_importer("dots").open(tmp_path / "x.dots") == ["..."]  # type: ignore[comparison-overlap]


def test_the_targets_that_are_named_exist() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    )
    named = set(re.findall(r"`make ([\w-]+)", text)) | set(
        re.findall(r"^make ([\w-]+)", text, re.MULTILINE)
    )
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named
    assert named - rules == set()


@pytest.mark.parametrize("folder", ["rmmformat", "converters"])
def test_no_module_is_long(folder: str) -> None:
    long = {
        str(path.relative_to(ROOT)): n
        for path in (ROOT / folder).rglob("*.py")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) >= 500
    }
    assert long == {}


def test_ci_runs_what_make_test_runs() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("not a checkout of the repository")
    assert "make test" in script.read_text()
