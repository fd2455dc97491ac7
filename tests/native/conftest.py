"""Makes the builder importable as ``native_build``, and builds the C programs once."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

if "native_build" not in sys.modules:
    spec = importlib.util.spec_from_file_location("native_build", HERE / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["native_build"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)


@pytest.fixture(scope="session")
def c_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with librmm, the examples and the replay drivers, built by the plain Makefile."""
    if shutil.which("make") is None or shutil.which("c++") is None or shutil.which("cc") is None:
        pytest.skip("no make and compilers here")
    build = tmp_path_factory.mktemp("native")
    command = [
        "make",
        "-s",
        "-j2",
        "-C",
        str(ROOT / "native"),
        f"BUILD={build}",
        "CXXFLAGS=-O1",
        f"PREFIX={build}/prefix",
        "all",
        "examples",
        "replay",
        "install",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return build
