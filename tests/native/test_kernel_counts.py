"""Instructions that the inner loops take for a value, counted by valgrind: the same every time.

Times depend on the machine and on what else it does; these depend on the compiler alone.  Each
bound is some per cent above what GCC 12 makes of the loop, so that a loop that is no longer
vectorised, or takes a second pass, is over it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Instructions a value, at most, of the loops that valgrind can run: AVX2 and portable.
BOUNDS = {
    ("portable", "widen f16"): 8.90,
    ("portable", "widen bf16"): 1.54,
    ("portable", "narrow f16"): 19.40,
    ("portable", "narrow bf16"): 6.93,
    ("portable", "mean and 3 products f32"): 4.65,
    ("portable", "mean and 3 multiples f32"): 5.45,
    ("portable", "mean and 3 products f16"): 38.40,
    ("portable", "mean and 3 multiples f16"): 38.28,
    ("portable", "mean and 3 products bf16"): 6.35,
    ("portable", "mean and 3 multiples bf16"): 6.35,
    ("portable", "add rows"): 1.93,
    ("portable", "blocks q1"): 5.71,
    ("portable", "blocks q2"): 5.61,
    ("portable", "blocks q3"): 5.61,
    ("portable", "blocks q4"): 3.32,
    ("portable", "blocks q5"): 5.45,
    ("portable", "blocks q6"): 5.45,
    ("portable", "blocks q7"): 5.45,
    ("portable", "blocks q8"): 2.97,
    ("portable", "transpose 32"): 2.64,
    ("portable", "transpose 16"): 1.74,
    ("avx2", "widen f16"): 1.14,
    ("avx2", "widen bf16"): 1.27,
    ("avx2", "narrow f16"): 1.01,
    ("avx2", "narrow bf16"): 2.22,
    ("avx2", "mean and 3 products f32"): 2.37,
    ("avx2", "mean and 3 multiples f32"): 1.98,
    ("avx2", "mean and 3 products f16"): 2.03,
    ("avx2", "mean and 3 multiples f16"): 2.04,
    ("avx2", "mean and 3 products bf16"): 2.56,
    ("avx2", "mean and 3 multiples bf16"): 2.57,
    ("avx2", "add rows"): 0.88,
    ("avx2", "blocks q1"): 1.65,
    ("avx2", "blocks q2"): 1.59,
    ("avx2", "blocks q3"): 1.54,
    ("avx2", "blocks q4"): 1.30,
    ("avx2", "blocks q5"): 1.53,
    ("avx2", "blocks q6"): 1.53,
    ("avx2", "blocks q7"): 1.54,
    ("avx2", "blocks q8"): 1.08,
    ("avx2", "transpose 32"): 1.30,
    ("avx2", "transpose 16"): 0.79,
    ("portable", "trellis"): 52.32,
    ("avx2", "trellis"): 8.65,
    ("processor", "crc32c"): 0.56,
}


def need_valgrind() -> None:
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the bounds are those of x86-64 and GCC")
    if shutil.which("valgrind") is None:
        assert "RMM_NEED_VALGRIND" not in os.environ, "make memcheck needs valgrind"
        pytest.skip("no valgrind here; make memcheck needs it")


def counts(program: Path, folder: Path) -> dict[tuple[str, str], float]:
    """Instructions a value of each kernel."""
    run = folder / "run"
    subprocess.run([program, "write", run], check=True)
    done = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            "--dump-before=kernel_mark",
            f"--callgrind-out-file={folder}/count",
            program,
            "count",
            run,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    # Dump 1 is what comes before the first mark; then one of a kernel and one of what is between.
    found = {}
    for place, line in enumerate(done.stdout.splitlines()):
        kernels, name, n_values = line.split("\t")
        text = (folder / f"count.{2 * place + 2}").read_text()
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        assert total is not None
        found[kernels, name] = int(total[1]) / int(n_values)
    return found


def test_instructions_a_value(tmp_path: Path) -> None:
    need_valgrind()
    if shutil.which("make") is None or shutil.which("c++") is None:
        pytest.skip("no make and compiler here")
    command = ["make", "-s", "-j2", "-C", ROOT / "native", f"BUILD={tmp_path}"]
    subprocess.run([*map(str, command), f"{tmp_path}/test_kernel_counts"], check=True)
    found = counts(tmp_path / "test_kernel_counts", tmp_path)
    over = {
        key: f"{count:.3f}, at most {BOUNDS[key]:.3f}"
        for key, count in found.items()
        if count > BOUNDS[key]
    }
    assert over == {}
    assert set(found) == set(BOUNDS)
