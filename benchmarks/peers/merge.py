"""Merging by position beside other ways to do it, and whole conversions beside vlora's.

The first table merges both factors of one target of eight tasks: what is timed is all of it, from
the factors as they are, (tasks, rank, length) float32, to mean, directions and coefficients.  Its
error is that of the factors, since factors are what is merged.  The second converts folders of
adapters into files; its error is that of the deltas, measured on the file.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import switch_models as models
import vlora_ways
from deltas import errors_of_file
from measure import Timing, available, cpus, take_turns
from report import Column, Table
from setting import Setting
from threadpoolctl import threadpool_limits

import rmmformat as rmm
from rmmformat import _native
from rmmformat.merge.rmm import merge, reconstruct

TASKS, RANK, COMPONENTS = 8, 16, 3
Merged = tuple[np.ndarray, np.ndarray, np.ndarray]  # mean (L, r), basis (L, p, r), coefs (L, n, p)
KINDS: dict[str, dict[str, Any]] = {
    "rmm exact": {"exact": True},
    "rmm q8": {"encoding": "q8"},
    "rmm p = 3 in f32": {"components": 3, "encoding": "f32"},
    "rmm p = 3 in f16": {"components": 3, "encoding": "f16"},
    "rmm planned, 5 % error (default)": {"max_error": 0.05},
}


def tables(setting: Setting) -> list[Table]:
    return [positions(setting), conversion(setting)]


def positions(setting: Setting) -> Table:
    length = 256 if setting.quick else 8192
    stacks = made_up(length)
    table = Table(
        "merge",
        f"{TASKS} tasks of rank {RANK}, p = {COMPONENTS}; thousand positions a second",
        "way",
        (
            Column("one", "1 thread", ".0f"),
            *((Column("all", f"{len(cpus())} threads", ".0f"),) if len(cpus()) > 1 else ()),
            Column("ratio", "times ours, 1 thread", ".3f"),
            Column("error", "left out, %"),
            Column("kept", "values kept, %", ".0f"),
        ),
    )
    for key, threads in (("one", 1), ("all", len(cpus())))[: len(cpus())]:
        with threadpool_limits(threads):
            for name, timing in in_turn(stacks, threads, setting.rounds).items():
                table.put(name, **{key: 2 * length / timing.clock / 1e3})
    for name, (error, kept) in errors(stacks).items():
        table.put(name, error=100 * error, kept=100 * kept)
    table.compare("rmm, by position", "one")
    if not available("torch"):
        table.notes.append("torch is not installed.")
    if not available("vlora"):
        table.notes.append("vlora is not installed.")
    return table


def made_up(length: int) -> list[np.ndarray]:
    """Two factors: half of every task's energy is common to all, and tasks fall off by rank."""
    random = np.random.default_rng(0)
    fall = np.arange(1, RANK + 1) ** -0.5
    shape = (TASKS, RANK, length)
    return [
        (
            fall[:, None] * (random.standard_normal(shape[1:]) + random.standard_normal(shape))
        ).astype(np.float32)
        for _ in range(2)
    ]


def in_turn(stacks: list[np.ndarray], threads: int, rounds: int) -> dict[str, Timing]:
    """Times of all ways, with so many threads."""
    work: dict[str, Callable[[], object]] = {
        "rmm, by position": lambda: [
            _native.find_principal(stack, 1, COMPONENTS, True, threads) for stack in stacks
        ],
        "rmm, one group a factor (vlora's model)": lambda: [
            merge(stack, COMPONENTS, "factor") for stack in stacks
        ],
        "numpy.linalg.svd": lambda: [numpy_svd(stack) for stack in stacks],
        "numpy.linalg.eigh of the Gram matrices": lambda: [numpy_eigh(stack) for stack in stacks],
    }
    if available("torch"):
        import torch

        torch.set_num_threads(threads)
        tensors = [torch.from_numpy(stack) for stack in stacks]
        work["torch.linalg.svd"] = lambda: [torch_svd(tensor) for tensor in tensors]
        work["torch.linalg.eigh of the Gram matrices"] = lambda: [
            torch_eigh(tensor) for tensor in tensors
        ]
    if available("vlora"):
        adapters = vlora_ways.adapters_of(stacks)
        work["vlora SharedSubspace.from_adapters"] = lambda: vlora_ways.compress(
            adapters, COMPONENTS
        )
    return take_turns(work, rounds)


def numpy_svd(stack: np.ndarray) -> Merged:
    """Principal directions of (n, r, L) by position, as somebody would write it with numpy."""
    points = stack.transpose(2, 0, 1)
    mean = points.mean(axis=1, keepdims=True)
    points = points - mean
    basis = np.linalg.svd(points, full_matrices=False)[2][:, :COMPONENTS]
    return mean[:, 0], basis, points @ basis.transpose(0, 2, 1)


def numpy_eigh(stack: np.ndarray) -> Merged:
    """The same by way of the tasks' Gram matrices, which are half the size of the points."""
    points = stack.transpose(2, 0, 1)
    mean = points.mean(axis=1, keepdims=True)
    points = points - mean
    values, vectors = np.linalg.eigh(points @ points.transpose(0, 2, 1))
    top = vectors[:, :, : -COMPONENTS - 1 : -1]
    length = np.sqrt(np.maximum(values[:, None, : -COMPONENTS - 1 : -1], 1e-20))
    coefs = top * length
    return mean[:, 0], (top / length).transpose(0, 2, 1) @ points, coefs


def torch_svd(stack: Any) -> tuple[Any, Any, Any]:
    import torch

    points = stack.permute(2, 0, 1)
    mean = points.mean(dim=1, keepdim=True)
    points = points - mean
    basis = torch.linalg.svd(points, full_matrices=False)[2][:, :COMPONENTS]
    return mean[:, 0], basis, points @ basis.mT


def torch_eigh(stack: Any) -> tuple[Any, Any, Any]:
    import torch

    points = stack.permute(2, 0, 1)
    mean = points.mean(dim=1, keepdim=True)
    points = points - mean
    values, vectors = torch.linalg.eigh(points @ points.mT)
    top = vectors[:, :, -COMPONENTS:].flip(2)
    length = values[:, None, -COMPONENTS:].flip(2).clamp_min(1e-20).sqrt()
    return mean[:, 0], (top / length).mT @ points, top * length


def errors(stacks: list[np.ndarray]) -> dict[str, tuple[float, float]]:
    """Relative error of the factors, and values kept as a part of the originals'."""

    def rebuilt(found: tuple[Any, Any, Any]) -> np.ndarray:
        mean, basis, coefs = (np.asarray(part) for part in found)
        return (mean[:, None] + coefs @ basis).transpose(1, 2, 0)

    def ours(stack: np.ndarray, grouping: Any) -> np.ndarray:
        shared, coefs = merge(stack, COMPONENTS, grouping)
        return np.stack([reconstruct(shared, coef) for coef in coefs])

    by_position = (RANK * (1 + COMPONENTS) + TASKS * COMPONENTS) / (TASKS * RANK)
    by_factor = (1 + COMPONENTS) / TASKS
    found: dict[str, tuple[list[np.ndarray], float]] = {
        "rmm, by position": ([ours(stack, "position") for stack in stacks], by_position),
        "rmm, one group a factor (vlora's model)": (
            [ours(stack, "factor") for stack in stacks],
            by_factor,
        ),
        "numpy.linalg.svd": ([rebuilt(numpy_svd(stack)) for stack in stacks], by_position),
        "numpy.linalg.eigh of the Gram matrices": (
            [rebuilt(numpy_eigh(stack)) for stack in stacks],
            by_position,
        ),
    }
    if available("torch"):
        import torch

        tensors = [torch.from_numpy(stack) for stack in stacks]
        for name, way in (("svd", torch_svd), ("eigh of the Gram matrices", torch_eigh)):
            there = [rebuilt(way(tensor)) for tensor in tensors]
            found[f"torch.linalg.{name}"] = there, by_position
    if available("vlora"):
        subspace = vlora_ways.compress(vlora_ways.adapters_of(stacks), COMPONENTS)
        found["vlora SharedSubspace.from_adapters"] = vlora_ways.stacks_of(subspace), by_factor
    norm = np.linalg.norm(np.stack(stacks))
    return {
        name: (float(np.linalg.norm(np.stack(there) - np.stack(stacks)) / norm), kept)
        for name, (there, kept) in found.items()
    }


def conversion(setting: Setting) -> Table:
    """Folders of adapters into files."""
    root = setting.folder("convert")
    if setting.quick:
        sources = models.copy_demo_adapters(root)
        rounds, what = 1, "demo adapters"
    else:
        sources = models.write_adapters(root, TASKS)
        rounds, what = 5, "adapters of BERT-base size (48 targets, rank 16, f32)"
    n_bytes = sum((source / "adapter_model.safetensors").stat().st_size for source in sources)
    table = Table(
        "convert",
        f"{len(sources)} {what}, {n_bytes / 1e6:.1f} MB, into files, {len(cpus())} threads",
        "way",
        (
            Column("seconds", "seconds"),
            Column("rate", "MB a second", ".0f"),
            Column("bytes", "MB written", ".1f"),
            Column("mean", "mean error, %"),
            Column("worst", "largest, %"),
        ),
    )
    for name, timing, size, found in conversions(sources, root, rounds):
        table.put(
            name,
            seconds=timing.clock,
            rate=n_bytes / 1e6 / timing.clock,
            bytes=size / 1e6,
            mean=100 * statistics.mean(found),
            worst=100 * max(found),
        )
    if not available("vlora"):
        table.notes.append("vlora is not installed.")
    return table


def conversions(
    sources: list[Path], root: Path, rounds: int
) -> Iterator[tuple[str, Timing, int, list[float]]]:
    """Name, time, bytes of the result, and errors of the deltas."""
    for name, how in KINDS.items():
        out = root / "x.rmm"
        work = {name: lambda how=how, out=out: rmm.convert(sources, out, overwrite=True, **how)}
        timing = take_turns(work, rounds, warm=0, least=1, enough=3)[name]
        yield name, timing, out.stat().st_size, errors_of_file(out, sources)
    if not available("vlora"):
        return
    for name, way in vlora_ways.WAYS.items():
        out = root / "subspace"
        shutil.rmtree(out, ignore_errors=True)
        work = {name: lambda way=way, out=out: way(sources, out)}
        timing = take_turns(work, rounds, warm=0, least=1, enough=3)[name]
        size = sum(file.stat().st_size for file in out.iterdir())
        yield name, timing, size, vlora_ways.errors(out, sources)
