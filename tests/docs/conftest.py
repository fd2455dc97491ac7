"""A folder as the documents assume it: the demo adapters, and two that are new."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import rmmformat as rmm


@pytest.fixture
def desk(tmp_path: Path, demo_adapters: Path) -> Path:
    """A fresh folder with ``adapters/`` (eight) and ``new/`` (two more)."""
    shutil.copytree(demo_adapters, tmp_path / "adapters")
    (tmp_path / "new").mkdir()
    shutil.copytree(demo_adapters / "spam", tmp_path / "new" / "sms")
    shutil.copytree(demo_adapters / "yelp", tmp_path / "new" / "imdb-v2")
    return tmp_path


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, demo_adapters: Path) -> Path:
    """The demo adapters in one file, made once."""
    path = tmp_path_factory.mktemp("converted") / "skills.rmm"
    rmm.convert(demo_adapters, path, encoding="q8")
    return path
