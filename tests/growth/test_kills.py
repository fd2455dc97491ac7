"""Random kills of real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("RMM_KILLS", "50"))


def test_killed_processes_leave_the_old_or_the_new_collection(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp(
        "kills"
    )  # on a disk: there writing and syncing take their time
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill.py")), str(folder), str(KILLS)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
