"""Files that have grown, as the reader sees them that was written from the specification alone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat.format.disk import DISK

from .conftest import SCENARIOS, Scenario


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "spec")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("reference")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_reference_reader_agrees(
    scenario: Scenario, tmp_path: Path, reference: ModuleType
) -> None:
    path = tmp_path / "x.rmm"
    scenario.before(path)
    scenario.change(path, DISK)
    data = path.read_bytes()
    assert reference.validate(data) == []
    theirs = reference.open_file(data)
    with rmm.open(path) as collection:
        assert list(theirs.tasks) == list(collection.tasks)
        for name in collection.tasks:
            factors, loaded = theirs.load(name), collection.load(name)
            assert factors.keys() == loaded.keys()
            for target, (A, B, scale) in factors.items():
                assert scale == loaded[target].scale
                assert np.array_equal(A, loaded[target].A)
                assert np.array_equal(B, loaded[target].B)
