"""How fast the inner loops are on this machine: rows restored and decoded, positions merged.

    python benchmarks/kernels.py

Each kernel that the processor has, on one thread, beside what numpy offers; medians of the thread's
own time, so that other work on the machine shows little.  Factors are restored one at a time, which
no cache of a core holds: A row by row, B turned, beside a copy of as many bytes by numpy.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import rmmformat as rmm
from rmmformat import _native
from rmmformat.blas import one_thread
from rmmformat.format.trellis import encode_rows

#: How one target is stored, and the dtypes that it is restored as.
STORED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "f32": ({"encoding": "f32"}, ("f32", "f16")),
    "f16": ({"encoding": "f16"}, ("f32", "f16")),
    "bf16": ({"encoding": "bf16"}, ("f32", "bf16")),
    **{f"q{bits}": ({"encoding": f"q{bits}"}, ("f32",)) for bits in (8, 6, 5, 4, 3, 2)},
    "RMM p = 3, f32": ({"components": 3, "encoding": "f32"}, ("f32",)),
    "RMM p = 3, f16": ({"components": 3, "encoding": "f16"}, ("f32", "f16")),
    "RMM p = 3, bf16": ({"components": 3, "encoding": "bf16"}, ("f32",)),
    "RMM p = 3, q8": ({"components": 3, "encoding": "q8"}, ("f32",)),
}
SIDE, RANK, TASKS = 65536, 16, 4


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median time of this thread."""
    work()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def write_adapters(folder: Path) -> None:
    """PEFT folders of one target of SIDE inputs and outputs."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "synthetic/base",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj"],
    }
    for number in range(TASKS):
        path = folder / f"task-{number}"
        path.mkdir(parents=True)
        tensors = {
            f"base_model.model.q_proj.lora_{letter}.weight": rng.standard_normal(shape, np.float32)
            for letter, shape in (("A", (RANK, SIDE)), ("B", (SIDE, RANK)))
        }
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))


def restoring(rounds: int) -> None:
    """Factors of every encoding, against copies of as many bytes."""
    dtypes = {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}
    print("\nfactors restored, GB a second of output (and part of what a copy makes)")
    print(f"{'stored':<18}{'as':>6}{'A':>18}{'B':>18}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder / "sources")
        for stored, (options, outputs) in STORED.items():
            rmm.convert(folder / "sources", folder / "file.rmm", overwrite=True, **options)
            with rmm.open(folder / "file.rmm") as collection:
                (target,) = collection.targets(collection.tasks[0])
                for output in outputs:
                    print(f"{stored:<18}{output:>6}", end="")
                    for letter, shape in (("A", (RANK, SIDE)), ("B", (SIDE, RANK))):
                        out = np.zeros(shape, dtypes[output])
                        other = np.ones_like(out)
                        work = functools.partial(
                            collection.load_factor, collection.tasks[0], target, letter, out
                        )
                        own = out.nbytes / seconds(work, rounds)
                        copy = out.nbytes / seconds(lambda: np.copyto(out, other), rounds)  # noqa: B023
                        print(f"{own / 1e9:>10.1f} ({own / copy:>4.0%})", end="")
                    print()


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
    restoring(arguments.rounds)
    decoding(arguments.rounds)
    merging(arguments.rounds)


if __name__ == "__main__":
    main()
