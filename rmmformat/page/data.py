"""What the page of a collection shows: figures out of an open file, nothing of their looks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rmmformat.blas import with_one_thread
from rmmformat.collection import Collection
from rmmformat.inspect import FileInfo, TaskInfo, file_info
from rmmformat.merge.gauge import delta_svd
from rmmformat.merge.similarity import cosines, delta_products
from rmmformat.model import Array, TargetInfo

__all__ = ["MAX_COLUMNS", "MAX_TARGETS", "MAX_TASKS", "Overview", "TaskRow", "overview"]

F64 = npt.NDArray[np.float64]

#: Bounds of a page, whatever the file: tasks in it, columns of the errors' map, and targets that
#: spectra and likeness are computed from.
MAX_TASKS, MAX_COLUMNS, MAX_TARGETS = 100, 96, 64

_ENERGY = 0.9


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """One task of the page.

    Attributes
    ----------
    private_bytes
        Of its private tensors; tensors that are equal in several tasks count for each.
    components
        Mean over targets of how many singular components hold 90 % of the energy; None where it
        was not computed (deltas that are zero or not finite).
    files
        Name, bytes and SHA-256 of what it was converted from.
    """

    info: TaskInfo
    private_bytes: int
    components: float | None
    files: tuple[tuple[str, int, str], ...]


@dataclasses.dataclass(frozen=True)
class Overview:
    """A collection as the page shows it.

    Attributes
    ----------
    rows
        The tasks shown, by name; all of them, or the :data:`MAX_TASKS` with the largest errors.
    columns
        What the errors' map has along its side: targets, or layers where targets are many.
    by_layer
        Whether `columns` are layers; an error is then the largest among the layer's targets.
    errors
        (tasks, columns): relative errors; NaN where not measured or not adapted.
    spectra
        (tasks, components): mean over targets of each singular component's share of a delta's
        energy; NaN for a task without any.
    likeness
        (tasks, tasks): cosines between tasks, all deltas of a task taken as one vector; NaN where
        there is none.
    n_sampled
        How many targets spectra and likeness are of, evenly chosen among `info.targets`.
    """

    info: FileInfo
    rows: tuple[TaskRow, ...]
    columns: tuple[str, ...]
    by_layer: bool
    errors: F64
    spectra: F64
    likeness: F64
    n_sampled: int


def overview(
    collection: Collection, progress: Callable[[str, int, int], None] | None = None
) -> Overview:
    """Gather the figures; factors of at most :data:`MAX_TARGETS` targets are read.

    Parameters
    ----------
    progress
        Called with what is being done, how much is done, and how much there is.

    Raises
    ------
    FormatError, UnsupportedError
        The file cannot be decoded.
    """
    info = file_info(collection)
    shown = _shown(info.tasks)
    targets = {task.name: collection.targets(task.name) for task in shown}
    columns, of_target = _columns(info.targets)
    errors = np.full((len(shown), len(columns)), np.nan)
    index = collection.index
    recorded = index.table("erro")["error"]
    numbers = {name: number for number, name in enumerate(index.task_names)}
    for t, task in enumerate(shown):
        number = numbers[task.name]
        first = int(index.table("TASK")[number]["first_entry"])
        for position, target in enumerate(index.task_targets(number)):
            if first + position < len(recorded):
                column = of_target[index.target_names[int(target)]]
                errors[t, column] = np.fmax(errors[t, column], recorded[first + position])
    chosen = _evenly(info.targets, MAX_TARGETS)
    spectra, components, likeness = with_one_thread(
        _deltas, collection, [task.name for task in shown], targets, chosen, progress
    )
    described = collection.metadata.get("tasks", {})
    rows = tuple(
        TaskRow(
            task,
            sum(tensor.nbytes for tensor in collection.privates(task.name).values()),
            None if np.isnan(components[t]) else float(components[t]),
            tuple(
                (str(f.get("name", "")), int(f.get("n_bytes", 0)), str(f.get("sha256", "")))
                for f in described.get(task.name, {}).get("files", ())
            ),
        )
        for t, task in enumerate(shown)
    )
    by_layer = columns != list(_natural(info.targets))
    return Overview(
        info, rows, tuple(columns), by_layer, errors, spectra, likeness, len(chosen)
    )  # fmt: skip


def _shown(tasks: Sequence[TaskInfo]) -> list[TaskInfo]:
    worst = sorted(tasks, key=lambda task: (-(task.max_error or 0.0), task.name))[:MAX_TASKS]
    return sorted(worst, key=lambda task: _count_key(task.name))


def _count_key(name: str) -> list[tuple[int, int, str]]:
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]


def _natural(names: Sequence[str]) -> list[str]:
    """Names in the order that people count in: layer.2 before layer.10."""
    return sorted(names, key=_count_key)


def _columns(targets: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """Columns of the map, and which of them each target belongs to."""
    ordered = _natural(targets)
    if len(ordered) <= MAX_COLUMNS:
        return ordered, {name: number for number, name in enumerate(ordered)}
    found = {name: re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", name) for name in ordered}
    layers = sorted({int(match[1]) for match in found.values() if match})
    bundle = max(1, -(-len(layers) // (MAX_COLUMNS - 1)))  # neighbours, where layers are many
    place = {layer: number // bundle for number, layer in enumerate(layers)}
    names = [
        f"layer {part[0]}" if len(part) == 1 else f"layers {part[0]} to {part[-1]}"
        for part in (layers[i : i + bundle] for i in range(0, len(layers), bundle))
    ]
    others = [name for name, match in found.items() if match is None]
    if others:
        names.append("elsewhere")
    return names, {
        name: place[int(match[1])] if match else len(names) - 1 for name, match in found.items()
    }


def _evenly(names: Sequence[str], count: int) -> list[str]:
    ordered = _natural(names)
    if len(ordered) <= count:
        return ordered
    return [ordered[i] for i in np.linspace(0, len(ordered) - 1, count).round().astype(int)]


def _deltas(
    collection: Collection,
    tasks: Sequence[str],
    targets: Mapping[str, Mapping[str, TargetInfo]],
    chosen: Sequence[str],
    progress: Callable[[str, int, int], None] | None,
) -> tuple[F64, F64, F64]:
    """Spectra, components for most of the energy, and likeness, target by target."""
    products = np.zeros((len(tasks), len(tasks)))
    shares: list[list[F64]] = [[] for _ in tasks]
    for done, target in enumerate(chosen, 1):
        groups: dict[tuple[int, int], list[tuple[int, tuple[Array, Array, float]]]] = {}
        for t, task in enumerate(tasks):
            info = targets[task].get(target)
            if info is None:
                continue
            delta = _factors(collection, task, target, info)
            if not (np.isfinite(delta[0]).all() and np.isfinite(delta[1]).all()):
                continue
            groups.setdefault((info.shape.n_in, info.shape.n_out), []).append((t, delta))
            energy = np.square(delta_svd(delta[0], delta[1])[1])
            if energy.sum() > 0.0:
                shares[t].append(energy / energy.sum())
        for members in groups.values():
            numbers = [t for t, _ in members]
            products[np.ix_(numbers, numbers)] += delta_products([delta for _, delta in members])
        if progress is not None:
            progress("deltas", done, len(chosen))
    width = max((len(share) for task in shares for share in task), default=0)
    spectra = np.full((len(tasks), width), np.nan)
    components = np.full(len(tasks), np.nan)
    for t, found in enumerate(shares):
        if found:
            padded = np.array([np.pad(share, (0, width - len(share))) for share in found])
            spectra[t] = padded.mean(axis=0)
            components[t] = np.mean(1 + (np.cumsum(padded, axis=1) < _ENERGY).sum(axis=1))
    return spectra, components, cosines(products)


def _factors(
    collection: Collection, task: str, target: str, info: TargetInfo
) -> tuple[Array, Array, float]:
    A = np.empty((info.rank, info.shape.n_in), np.float32)
    B = np.empty((info.shape.n_out, info.rank), np.float32)
    collection.load_factor(task, target, "A", A)
    collection.load_factor(task, target, "B", B)
    return A, B, info.scale
