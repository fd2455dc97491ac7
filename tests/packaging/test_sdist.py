"""The source distribution has every file of the repository that it should, and no other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from setuptools import build_meta
build_meta.build_sdist(sys.argv[1])
"""

#: Files of the workshop, not of the product.
LEFT_OUT = (".ci/", ".gitignore", ".pre-commit-config.yaml", ".github/", ".gitattributes")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of the repository")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def packed(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the archive of a clean copy, without its top folder."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "native" / "build").mkdir()
    (copy / "native" / "build" / "left.o").touch()
    subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True
    )
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        return [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]


def test_nothing_is_missing(tracked: list[str], packed: list[str]) -> None:
    wanted = {name for name in tracked if not name.startswith(LEFT_OUT)}
    assert wanted - set(packed) == set()


def test_nothing_else_is_in_it(tracked: list[str], packed: list[str]) -> None:
    made = {name for name in packed if name.startswith("rmmformat.egg-info/")}
    assert set(packed) - set(tracked) - made == {"PKG-INFO", "setup.cfg"}


def test_what_a_build_needs_is_in_it(packed: list[str]) -> None:
    needed = {
        "setup.py",
        "pyproject.toml",
        "native/include/rmm/rmm.h",
        "native/src/load.cpp",
        "rmmformat/py.typed",
        "rmmformat/_native.pyi",
        "converters/base.py",
        "spec/rmm-1.md",
        "tests/data/demo-adapters/imdb/adapter_config.json",
    }
    assert needed - set(packed) == set()


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "rmmformat").rglob("__init__.py")
    }
    assert listed == found | {"rmmformat.converters"}
