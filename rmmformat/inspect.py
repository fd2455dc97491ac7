"""What a file holds and whether it is right: sizes, fidelity, comparison with sources."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import mmap
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmmformat.blas import with_one_thread
from rmmformat.collection import Collection
from rmmformat.errors import FormatError, NotFoundError, UnsupportedError
from rmmformat.format import layout
from rmmformat.format.encodings import ENCODINGS
from rmmformat.format.reader import Index, nearest, raise_violation, while_growing
from rmmformat.format.validate import Report, validate_bytes
from rmmformat.merge.error import relative_error, summarize
from rmmformat.model import SourceTask, TargetKind
from rmmformat.remote import is_url

__all__ = [
    "Comparison",
    "EntryInfo",
    "FileInfo",
    "TaskInfo",
    "compare_with_sources",
    "entry_infos",
    "file_info",
    "validate_path",
]


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """One task of a file; errors are None where not measured.

    `extraction_error` is what was left out when factors were cut out of the change of whole
    weights; the other errors are against those factors.
    """

    name: str
    n_targets: int
    ranks: tuple[int, ...]
    own_bytes: int
    original_bytes: int | None
    n_privates: int
    mean_error: float | None
    max_error: float | None
    worst_target: str | None
    extraction_error: float | None


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """A file at one glance.

    Attributes
    ----------
    base_digest
        Of the base model's weights, if they were at hand (specification, 9.1); else empty.
    shared_bytes, own_bytes
        Bytes of frames; bytes of the tasks' runs.
    factor_bytes
        Their sum without padding; `fraction` is this over the originals' factor bytes.
    private_bytes, index_bytes, metadata_bytes, free_bytes
        The rest of the file; `index_bytes` is without metadata.
    overhead
        Header, index and padding over the file's length.
    """

    path: str
    version: str
    file_bytes: int
    base_model: str
    base_digest: str
    producer: str
    method: dict[str, Any]
    tasks: tuple[TaskInfo, ...]
    targets: tuple[str, ...]
    encodings: dict[str, int]
    shared_bytes: int
    own_bytes: int
    factor_bytes: int
    private_bytes: int
    index_bytes: int
    metadata_bytes: int
    free_bytes: int
    original_bytes: int | None
    fraction: float | None
    overhead: float
    recovered: bool


@dataclasses.dataclass(frozen=True)
class EntryInfo:
    """What one task stores at one target."""

    task: str
    target: str
    rank: int
    n_in: int
    n_out: int
    kind: str
    scale: float
    components: tuple[int, int]
    layouts: dict[str, str]
    n_bytes: int
    error: float | None


def file_info(collection: Collection) -> FileInfo:
    """Summarise an open file from its index and metadata alone."""
    index, metadata = collection.index, collection.metadata
    described = metadata.get("tasks", {})
    tasks = tuple(
        _task_info(index, number, name, described.get(name, {}))
        for number, name in enumerate(index.task_names)
    )
    lengths = {name: _total(index, name) for name in ("FRAM", "ENTR", "BLOB", "free")}
    own = int(index.table("TASK")["length"].sum(dtype=np.uint64))
    factor_bytes = lengths["FRAM"] + lengths["ENTR"]
    originals = [task.original_bytes for task in tasks]
    original = None if None in originals else sum(o for o in originals if o is not None)
    meta = index.sections.get("meta")
    metadata_bytes = 0 if meta is None else meta.length
    payload = factor_bytes + lengths["BLOB"] + lengths["free"] + metadata_bytes
    targets = sorted({index.target_names[i] for i in index.table("TLST")["target"]})
    return FileInfo(
        collection.path,
        f"{layout.MAJOR}.{index.minor}",
        index.file_length,
        str(metadata.get("base_model", {}).get("id", "")),
        str(metadata.get("base_model", {}).get("fingerprint", {}).get("digest", "")),
        str(metadata.get("producer", "")),
        metadata.get("method", {}),
        tasks,
        tuple(targets),
        _encoding_rows(index),
        lengths["FRAM"],
        own,
        factor_bytes,
        lengths["BLOB"],
        int(index.active["index_length"]) - metadata_bytes,
        metadata_bytes,
        lengths["free"],
        original,
        factor_bytes / original if original else None,
        (index.file_length - payload) / index.file_length,
        collection.recovered,
    )


def _total(index: Index, name: str) -> int:
    return int(index.table(name)["length"].sum(dtype=np.uint64))


def _task_info(index: Index, number: int, name: str, described: dict[str, Any]) -> TaskInfo:
    record = index.table("TASK")[number]
    first, count = int(record["first_entry"]), int(record["n_entries"])
    forms = index.table("FORM")[index.table("ENTR")["form"][first : first + count]]
    errors = index.table("erro")["error"][first : first + count]
    measured = errors[~np.isnan(errors)]
    worst = None
    if len(measured):
        position = int(np.nanargmax(errors))
        worst = index.target_names[int(index.task_targets(number)[position])]
    return TaskInfo(
        name,
        count,
        tuple(sorted({int(rank) for rank in forms["rank"]})),
        int(record["length"]),
        described.get("factor_bytes"),
        int(record["n_privates"]),
        float(measured.astype(np.float64).mean()) if len(measured) else None,
        float(measured.max()) if len(measured) else None,
        worst,
        described.get("extraction", {}).get("error"),
    )


def _encoding_rows(index: Index) -> dict[str, int]:
    """Number of stored rows by encoding, frames and entries together."""
    rows: Counter[str] = Counter()
    uses: Counter[int] = Counter()
    forms = index.table("FORM")
    for form, count in zip(
        *np.unique(index.table("ENTR")["form"], return_counts=True), strict=True
    ):
        for array in ("coefficients_a", "residual_a", "coefficients_b", "residual_b"):
            uses[int(forms[form][array])] += int(count)
    for frame in index.table("FRAM"):
        for part in ("a", "b"):
            uses[int(frame[part]["mean"])] += 1
            uses[int(frame[part]["basis"])] += 1
    for layout_id, count in uses.items():
        for code, n_rows in index.layout_runs(layout_id):
            name = ENCODINGS[code].name if code in ENCODINGS else f"{code:#04x}"
            rows[name] += count * n_rows
    return dict(rows.most_common())


def entry_infos(
    collection: Collection, task: str | None = None, target: str | None = None
) -> list[EntryInfo]:
    """List entries, of tasks and targets that match the globs `task` and `target`.

    Raises
    ------
    NotFoundError
        Nothing matches.
    """
    index = collection.index
    rows = []
    for number, name in enumerate(index.task_names):
        if task is not None and not fnmatch.fnmatchcase(name, task):
            continue
        for position, target_id in enumerate(index.task_targets(number)):
            target_name = index.target_names[int(target_id)]
            if target is None or fnmatch.fnmatchcase(target_name, target):
                rows.append(_entry_info(index, number, position, int(target_id)))
    if not rows and (task is not None or target is not None):
        what, names = (
            (task, index.task_names)
            if task is not None and not any(fnmatch.fnmatchcase(n, task) for n in index.task_names)
            else (target, tuple(dict.fromkeys(index.target_names)))
        )
        raise NotFoundError(f"nothing matches {what!r}", hint=nearest(str(what), names))
    return rows


def _entry_info(index: Index, task: int, position: int, target_id: int) -> EntryInfo:
    number = int(index.table("TASK")[task]["first_entry"]) + position
    entry, target = index.table("ENTR")[number], index.table("TARG")[target_id]
    form = index.table("FORM")[entry["form"]]
    components, layouts = [0, 0], {}
    frame = index.frame_of(form, target_id)
    if frame is not None:
        components = [int(frame[part]["n_components"]) for part in ("a", "b")]
        for part in ("a", "b"):
            for array in ("mean", "basis"):
                layouts[f"{array} {part.upper()}"] = _describe(index, int(frame[part][array]))
    for array in ("coefficients", "residual"):
        for part in ("a", "b"):
            layouts[f"{array} {part.upper()}"] = _describe(index, int(form[f"{array}_{part}"]))
    errors = index.table("erro")["error"]
    error = float(errors[number]) if number < len(errors) else float("nan")
    return EntryInfo(
        index.task_names[task],
        index.target_names[target_id],
        int(form["rank"]),
        int(target["n_in"]),
        int(target["n_out"]),
        TargetKind(int(target["kind"])).name.lower(),
        float(form["scale"]),
        (components[0], components[1]),
        {what: text for what, text in layouts.items() if text},
        int(entry["length"]),
        None if np.isnan(error) else error,
    )


def _describe(index: Index, layout_id: int) -> str:
    return " ".join(
        f"{count}×{ENCODINGS[code].name if code in ENCODINGS else hex(code)}"
        for code, count in index.layout_runs(layout_id)
    )


def validate_path(
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Report:
    """Validate a file; it is mapped, not read whole.

    Parameters
    ----------
    path
        The file, or a URL, which is downloaded for it.
    progress
        Called with bytes checked and bytes in all.
    storage_options
        Of a URL, as for :func:`rmmformat.open`.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    if isinstance(path, str) and is_url(path):
        from rmmformat.remote.download import downloaded

        with downloaded(path, storage_options) as local:
            return validate_path(local, progress)
    report: Report | None = None

    def attempt() -> Report:
        nonlocal report
        report = _validate_mapped(path, progress)
        if not report.ok:
            raise_violation(report.violations[0])
        return report

    try:
        return while_growing(path, attempt)
    except (FormatError, UnsupportedError):
        assert report is not None  # raised for what it lists  # noqa: S101
        return report


def _validate_mapped(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None
) -> Report:
    with Path(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return validate_bytes(b"")
        # Not closed here: a report may still be under construction over views of it; it goes with
        # the last of them.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return validate_bytes(data, progress, size=lambda: os.fstat(file.fileno()).st_size)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One task of a file against its source.

    Attributes
    ----------
    errors
        Relative error by target, measured now.
    problems
        What is missing or differs beyond what the file says of itself.
    """

    task: str
    errors: dict[str, float]
    problems: tuple[str, ...]

    @property
    def mean_error(self) -> float:
        """Mean of the errors, 0 without targets."""
        return summarize(self.errors.values()).mean if self.errors else 0.0

    @property
    def max_error(self) -> float:
        """Largest of the errors, 0 without targets."""
        return max(self.errors.values(), default=0.0)


def compare_with_sources(
    collection: Collection,
    tasks: Sequence[SourceTask],
    progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Measure each source against what the file gives back.

    A problem is a task, target or private tensor that the file lacks or that differs in shape or
    scale, private bytes that differ, and an error above the recorded one (by more than the
    rounding of the record).
    """
    results = []
    for number, source in enumerate(tasks, 1):
        results.append(with_one_thread(_compare, collection, source))
        if progress is not None:
            progress(number, len(tasks))
    return results


def _compare(collection: Collection, source: SourceTask) -> Comparison:
    if source.name not in collection.tasks:
        return Comparison(source.name, {}, ("the file has no such task",))
    stored = collection.source(source.name)
    recorded = {info.target: info.error for info in entry_infos(collection, _literal(source.name))}
    errors: dict[str, float] = {}
    problems = [f"target {name} is missing" for name in source.targets if name not in recorded]
    problems += [f"target {name} is not in the source" for name in recorded if
                 name not in source.targets]  # fmt: skip
    loaded = collection.load(source.name)
    for name, info in source.targets.items():
        if name not in recorded:
            continue
        if stored.targets[name].shape != info.shape:
            problems.append(f"target {name} has another shape")
            continue
        want, got = source.factors(name), loaded[name]
        errors[name] = relative_error(want.A, want.B, want.scale, got.A, got.B, got.scale)
        if got.scale != want.scale:
            problems.append(f"target {name}: scale is {got.scale}, the source's is {want.scale}")
        limit = recorded[name]
        if limit is not None and errors[name] > limit * (1 + 1e-3) + 1e-6:
            problems.append(f"target {name}: error {errors[name]:.3g}, recorded {limit:.3g}")
    for name in source.privates:
        if name not in stored.privates:
            problems.append(f"private tensor {name} is missing")
        elif stored.private_tensor(name).tobytes() != source.private_tensor(name).tobytes():
            problems.append(f"private tensor {name} differs")
    return Comparison(source.name, errors, tuple(problems))


def _literal(name: str) -> str:
    return glob.escape(name)
