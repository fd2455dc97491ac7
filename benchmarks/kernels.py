"""How fast the inner loops are on this machine: trellis rows decoded, positions merged.

    python benchmarks/kernels.py

Each kernel that the processor has, on one thread, beside what numpy offers; medians of the thread's
own time, so that other work on the machine shows little.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import numpy as np

from rmmformat import _native
from rmmformat.blas import one_thread
from rmmformat.format.trellis import encode_rows


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median time of this thread."""
    work()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def decoding(rounds: int) -> None:
    """Rows of a Gaussian, as the planner writes them."""
    names = _native.trellis_kernels()
    print(f"\ntrellis rows, million values a second\n{'values':>14} {'bits':>6}", end="")
    print("".join(f"{name:>14}" for name in names))
    rng = np.random.default_rng(0)
    for rows, length in ((16, 384), (16, 3072), (16, 8192)):
        values = rng.standard_normal((rows, length)).astype(np.float32)
        for step in (1.0, 0.26, 0.016):
            run, _ = encode_rows(values, np.full(rows, step), tied=False)
            bits = 8 * len(run) / values.size
            print(f"{rows:>6} x {length:<5} {bits:>6.2f}", end="")
            for name in names:
                decode = functools.partial(_native.trellis_decode, run, rows, length, kernels=name)
                print(f"{values.size / seconds(decode, rounds) / 1e6:>14.0f}", end="")
            print()


def merging(rounds: int) -> None:
    """Eight tasks of rank 16, three components, by position."""
    stack = np.random.default_rng(1).standard_normal((8, 16, 8192))
    points = np.ascontiguousarray(stack.transpose(2, 0, 1))
    points -= points.mean(axis=1, keepdims=True)
    gram = points @ points.transpose(0, 2, 1)
    ways: dict[str, Callable[[], object]] = {
        "numpy.linalg.svd of the points alone": lambda: np.linalg.svd(points, full_matrices=False),
        "numpy.linalg.eigh of the Gram matrices alone": lambda: np.linalg.eigh(gram),
        "rmm: mean, directions and coefficients": lambda: _native.find_principal(
            stack, 1, 3, True, 1
        ),
    }
    print(
        "\nmerging by position (8 tasks, rank 16, p = 3), thousand positions a second, one thread"
    )
    with one_thread():
        for name, work in ways.items():
            print(f"{stack.shape[2] / seconds(work, rounds) / 1e3:>8.0f}  {name}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    decoding(arguments.rounds)
    merging(arguments.rounds)


if __name__ == "__main__":
    main()
