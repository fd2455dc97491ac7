"""A web server, and files for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rmmformat.methods import choose_method
from rmmformat.pipeline import convert

from ..product.conftest import make_tasks
from .server import Server, running


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as site:
        yield site


@pytest.fixture(scope="session")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tasks with frames that all use, and private tensors of their own."""
    heads = {"head": np.arange(3000, dtype=np.float32)}
    tasks = make_tasks(12, sides=((300, 200), (170, 330), (64, 64)))
    for number, task in enumerate(tasks):
        own = make_tasks(1, privates={"head": heads["head"] + number})[0]
        task._privates, task.privates = own._privates, own.privates
    path = tmp_path_factory.mktemp("remote") / "shared.rmm"
    convert(tasks, path, choose_method(components=2, encoding="f32"))
    return path
