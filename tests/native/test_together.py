"""Many threads on one open file while it grows, in C++; under ThreadSanitizer in ``make trust``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import rmmformat as rmm

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ROOT / "tests" / "data" / "demo-adapters"
ROUNDS = int(os.environ.get("RMM_TOGETHER_ROUNDS", "3"))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("together")
    before, after = folder / "before.rmm", folder / "after.rmm"
    rmm.convert([ADAPTERS / name for name in ("bbc", "spam", "imdb")], before, max_error="10%")
    shutil.copy(before, after)
    rmm.add(after, ADAPTERS / "yelp")
    return before, after


def test_threads_read_one_file_while_it_grows(
    c_programs: Path, grown: tuple[Path, Path], tmp_path: Path
) -> None:
    program = c_programs / "test_together"
    make = ["make", "-s", "-C", ROOT / "native", f"BUILD={c_programs}", "CXXFLAGS=-O1", program]
    done = subprocess.run([str(word) for word in make], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [program, *grown, tmp_path, str(ROUNDS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(", 0 faults\n")


@pytest.mark.skipif("RMM_TSAN" not in os.environ, reason="set RMM_TSAN=1 (make trust does)")
def test_no_race_is_found(grown: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = grown
    done = subprocess.run(
        [
            "make", "-s", "-C", str(ROOT / "native"), f"BUILD={tmp_path}", f"BEFORE={before}",
            f"AFTER={after}", f"ROUNDS={ROUNDS}", "tsan",
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING: ThreadSanitizer" not in done.stderr
    print(f"ThreadSanitizer: {done.stdout}")  # noqa: T201
