"""The native core for another machine gives the same bits: run under emulation, held against this.

Usage: python cross.py BUILD_FOLDER PREFIX RUNNER..., for instance
``python cross.py build/arm64 aarch64-linux-gnu- qemu-aarch64 -L /usr/aarch64-linux-gnu``
(Debian: ``apt-get install g++-aarch64-linux-gnu qemu-user``).

Both builds check every vector of the specification, with the same verdicts and rules, and load
every task of the valid ones and of the demo adapters at several settings, with the same CRC32C of
every factor.  What they compute when they write, trellis runs and principal directions, is the same
(native/tests/same_everywhere.cpp), and all kernels of the other machine agree on sound and damaged
runs (native/tests/trellis_kernels.cpp).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import rmmformat as rmm

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, dict[str, object]] = {
    "planned": {"max_error": 0.05},
    "published": {"components": 3},
    "q8": {"encoding": "q8"},
    "q3": {"encoding": "q3"},
    "bf16": {"encoding": "bf16"},
    "exact": {"exact": True},
}


def build(folder: Path, prefix: str) -> Path:
    folder = folder.resolve()
    words = ["make", "-s", "-C", str(ROOT / "native"), f"BUILD={folder}", "examples"]
    words += [str(folder / f"test_{name}") for name in ("same_everywhere", "trellis_kernels")]
    if prefix:
        words += [f"CC={prefix}gcc", f"CXX={prefix}g++", f"AR={prefix}ar"]
    subprocess.run(words, check=True)
    return folder


def said(words: list[str]) -> tuple[int, str, str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=1800)
    return done.returncode, done.stdout, done.stderr


def main() -> int:
    out, prefix, runner = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    here, there = build(out / "here", ""), build(out / "there", prefix)
    files = sorted((ROOT / "spec" / "vectors").glob("*/*.rmm"))
    for name, options in SETTINGS.items():
        path = out / f"{name}.rmm"
        rmm.convert(
            ROOT / "tests" / "data" / "demo-adapters", path, overwrite=True, **options  # type: ignore[arg-type]
        )  # fmt: skip
        files.append(path)
    n_checked = n_tasks = 0
    wrong = []
    mine = said([str(here / "test_same_everywhere")])
    if mine[0] or mine != said([*runner, str(there / "test_same_everywhere")]):
        wrong.append("what is computed for writing (test_same_everywhere)")
    kernels = said([*runner, str(there / "test_trellis_kernels"), "6"])
    print(f"trellis kernels there: {kernels[1].strip()}")  # noqa: T201
    if kernels[0]:
        wrong.append("trellis kernels (test_trellis_kernels)")
    for path in files:
        n_checked += 1
        for words in (["check", str(path)], ["check", "--open", str(path)]):
            mine = said([str(here / words[0]), *words[1:]])
            if mine != said([*runner, str(there / words[0]), *words[1:]]):
                wrong.append(f"{path}: {' '.join(words[:-1])}")
        try:
            with rmm.open(path) as collection:
                tasks = collection.tasks
        except rmm.RmmError:
            continue
        for task in tasks:
            n_tasks += 1
            mine = said([str(here / "list_and_load"), str(path), task])
            if mine != said([*runner, str(there / "list_and_load"), str(path), task]):
                wrong.append(f"{path}: load {task!a}")
    for line in wrong:
        print(f"differs: {line}")  # noqa: T201
    print(f"{n_checked} files checked, {n_tasks} tasks loaded, {len(wrong)} differences")  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
