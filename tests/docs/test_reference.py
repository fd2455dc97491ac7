"""Every public name is on the page of the Python interface, and says what it is."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

import rmmformat

from .pages import ROOT

PAGE = ROOT / "docs" / "reference" / "python.md"
MODULES = re.findall(r"automodule:: (rmmformat[\w.]*)", PAGE.read_text(encoding="utf-8"))
#: Not functions or classes: a string, and a package with a section of its own.
PLAIN = {"__version__", "runtimes"}


def test_all_that_the_package_offers_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = set(re.findall(r"auto(?:function|class):: ([\w.]+)", text))
    shown |= {name for module in MODULES for name in _members(module, text)}
    missing = set(rmmformat.__all__) - {name.rpartition(".")[2] for name in shown} - PLAIN
    assert missing == set()


def _members(module: str, text: str) -> set[str]:
    match = re.search(rf"automodule:: {re.escape(module)}\n((?:   :.*\n)*)", text)
    assert match
    listed = re.search(r":members:(.*)", match[1])
    if listed is None:
        return set()
    names = [name.strip() for name in listed[1].split(",") if name.strip()]
    return set(names or importlib.import_module(module).__all__)


@pytest.mark.parametrize("module", MODULES)
def test_members_that_the_page_names_exist_and_are_described(module: str) -> None:
    found = importlib.import_module(module)
    assert inspect.getdoc(found)
    for name in _members(module, PAGE.read_text(encoding="utf-8")):
        member = getattr(found, name)
        if inspect.isclass(member) or inspect.isfunction(member):
            assert inspect.getdoc(member), f"{module}.{name}"


@pytest.mark.parametrize("name", sorted(set(rmmformat.__all__) - PLAIN))
def test_parameters_are_described(name: str) -> None:
    """Each parameter of a public function stands in its docstring."""
    member = getattr(rmmformat, name)
    doc = inspect.getdoc(member)
    assert doc
    if inspect.isfunction(member):
        for parameter in inspect.signature(member).parameters:
            assert re.search(rf"\b{parameter}\b", doc), f"{name}: {parameter}"


def test_the_hub_is_a_file_system_that_fsspec_knows() -> None:
    """What the guide says of ``hf://``: the protocol is huggingface_hub's, and is ours to open."""
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("huggingface_hub")
    from rmmformat.remote import is_url

    assert is_url("hf://me/skills/skills.rmm")
    assert fsspec.get_filesystem_class("hf").__name__ == "HfFileSystem"
