"""Extract eight fine-tunes of one layer of a large model: time and peak memory, measured.

    python benchmarks/ptsvd.py --out build/ptsvd --whole

Writes a base and tasks of the shapes of one decoder layer of a 7-billion-parameter model (bfloat16;
4096 x 4096 and 4096 x 11008 matrices), converts them with `rmm convert` in a process of its own and
reports its time and peak resident memory; then times, on one matrix of each shape and one thread,
the extraction, torch's randomised decomposition and (--whole, of the square one) torch's whole one.
A change is 64 directions that fall like k^-0.7 with noise of a twentieth of their energy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from rmmformat.blas import one_thread
from rmmformat.merge.extract import Criterion, extract


def shapes(width: int, inner: int) -> dict[str, tuple[int, int]]:
    """Weights of a decoder layer, (out, in)."""
    layer = "model.layers.0"
    return {
        **{f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": (inner, width),
        f"{layer}.mlp.up_proj.weight": (inner, width),
        f"{layer}.mlp.down_proj.weight": (width, inner),
    }


def change(shape: tuple[int, int], seed: int) -> np.ndarray:
    """A change of a weight, float32."""
    random = np.random.default_rng(seed)
    fall = np.arange(1, 65, dtype=np.float32) ** -0.7
    left = random.standard_normal((shape[0], 64), dtype=np.float32) * fall
    delta = left @ random.standard_normal((64, shape[1]), dtype=np.float32)
    noise = random.standard_normal(shape, dtype=np.float32)
    noise *= np.float32(np.sqrt(0.05) * np.linalg.norm(fall))
    delta += noise
    delta *= np.float32(2.0 / np.sqrt(shape[0] * shape[1]))
    return delta


def write(out: Path, width: int, inner: int, tasks: int) -> None:
    """Write the base and its tasks, a file a model."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    base = {}
    for number, (name, shape) in enumerate(shapes(width, inner).items()):
        values = np.random.default_rng(number).standard_normal(shape, dtype=np.float32)
        base[name] = (values * np.float32(0.02)).astype(bfloat16)
    for task in range(-1, tasks):
        folder = out / ("base" if task < 0 else f"tuned/task{task}")
        folder.mkdir(parents=True)
        tensors = dict(base)
        if task >= 0:
            for number, (name, value) in enumerate(base.items()):
                new = value.astype(np.float32) + change(value.shape, 100 * task + number)
                tensors[name] = new.astype(bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def convert(out: Path, rank: int) -> tuple[float, float, list[float]]:
    """Seconds, peak resident MiB, and the tasks' extraction errors."""
    words = [
        *(sys.executable, "-m", "rmmformat", "convert", out / "tuned", "--base", out / "base"),
        *("--rank", rank, "--exact", "--json", "-o", out / "x.rmm"),
    ]
    report = out / "report.json"
    start = time.monotonic()
    with report.open("w") as stream:
        process = subprocess.Popen([str(word) for word in words], stdout=stream)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    tasks = json.loads(report.read_text())["tasks"]
    return seconds, usage.ru_maxrss / 1024, [task["extraction_error"] for task in tasks]


def left_out(delta: np.ndarray, product: np.ndarray) -> float:
    """Relative error in per cent; summed in float64, since float32 would be off by a hundredth."""
    rest = np.float64(0)
    for row, other in zip(delta, product, strict=True):
        rest += np.sum((row - other).astype(np.float64) ** 2)
    return float(100 * np.sqrt(rest / np.einsum("ij,ij->", delta, delta, dtype=np.float64)))


def one_matrix(shape: tuple[int, int], rank: int, whole: bool) -> None:
    """Time the ways to decompose one matrix, on one thread."""
    import torch

    torch.set_num_threads(1)
    delta = change(shape, 1)
    tensor = torch.from_numpy(delta)
    print(f"{shape[0]} x {shape[1]}, one thread:", flush=True)
    start = time.monotonic()
    with one_thread():
        found = extract(delta, Criterion(rank=rank), "random")
    seconds = time.monotonic() - start
    error = left_out(delta, found.B @ found.A)
    print(f"  extract, random:             {seconds:7.2f} s, error {error:.3f} %", flush=True)
    ways = {f"svd_lowrank, niter={n}": n for n in (2, 6)} | ({"linalg.svd": 0} if whole else {})
    for name, rounds in ways.items():
        torch.manual_seed(0)
        start = time.monotonic()
        if rounds:
            u, s, v = torch.svd_lowrank(tensor, q=rank + 16, niter=rounds)
        else:
            u, s, right = torch.linalg.svd(tensor, full_matrices=False)
            v = right.T
        seconds = time.monotonic() - start
        error = left_out(delta, ((u[:, :rank] * s[:rank]) @ v[:, :rank].T).numpy())
        print(f"  torch.{name + ':':<22} {seconds:7.2f} s, error {error:.3f} %", flush=True)


def main() -> None:
    """Make, convert, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/ptsvd"))
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--whole",
        action="store_true",
        help="time the whole decomposition of the square matrix, too",
    )
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    # What this process takes would count as a child's, so it stays small until all is measured.
    given = (options.out, options.width, options.inner, options.tasks)
    writer = multiprocessing.get_context("spawn").Process(target=write, args=given)
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    size = sum(path.stat().st_size for path in options.out.rglob("*.safetensors"))
    n_matrices = 7 * options.tasks
    print(f"{options.tasks} tasks, {n_matrices} matrices, files {size / 2**30:.2f} GiB", flush=True)
    seconds, peak, errors = convert(options.out, options.rank)
    print(
        f"rmm convert --rank {options.rank}: {seconds:.1f} s, {seconds / n_matrices:.2f} s a "
        f"matrix, peak {peak:.0f} MiB, error {100 * sum(errors) / len(errors):.2f} %",
        flush=True,
    )
    if not options.keep:
        shutil.rmtree(options.out)
    one_matrix((options.width, options.width), options.rank, options.whole)
    one_matrix((options.inner, options.width), options.rank, False)


if __name__ == "__main__":
    main()
