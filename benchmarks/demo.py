"""The main job on real adapters: convert, validate, load a task natively, give it back.

Usage: python benchmarks/demo.py ADAPTERS OUT_FOLDER
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import rmmformat as rmm


def run(*words: str) -> None:
    """Run one command of the product, showing it as a person would type it."""
    print(f"\n$ rmm {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "rmmformat", *words], check=True)


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    adapters, file = str(arguments.adapters), str(arguments.out / "skills.rmm")

    run("convert", adapters, "-o", file, "--force")
    run("validate", file, "--against", adapters)
    run("info", file)

    print(f"\n>>> collection = rmm.open({file!r})")
    with rmm.open(file) as collection:
        name = collection.tasks[0]
        seconds = []
        for _ in range(21):
            start = time.perf_counter()
            task = collection.load(name)
            seconds.append(time.perf_counter() - start)
        print(f">>> task = collection.load({name!r})  # {task}")
        for target in list(task)[:2]:
            A, B = task[target].A, task[target].B
            print(f"    {target}: A {A.shape} {A.dtype}, B {B.shape}, scale {task[target].scale}")
        print(f"    median of {len(seconds)} loads: {1e3 * statistics.median(seconds):.2f} ms")

    print("\nThe method as published, at its usual three components, for comparison:")
    published = str(arguments.out / "published.rmm")
    run("convert", adapters, "-o", published, "--components", "3", "--force")

    back = arguments.out / name
    shutil.rmtree(back, ignore_errors=True)
    run("export", file, name, "--to", "peft", "-o", str(back))


if __name__ == "__main__":
    main()
