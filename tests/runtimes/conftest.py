"""Small ONNX models that several files of tests use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two linear layers as an ONNX file."""
    return _saved(tmp_path / "base.onnx", head=False)


@pytest.fixture
def headed(tmp_path: Path) -> Path:
    """The same with a head behind them."""
    return _saved(tmp_path / "headed.onnx", head=True)


def _saved(path: Path, *, head: bool) -> Path:
    onnx = pytest.importorskip("onnx")
    from .onnx_models import network

    onnx.save(network(head=head), path)
    return path
