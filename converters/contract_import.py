"""Checks that every importer passes (see :mod:`rmmformat.converters.contract`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rmmformat.converters.base import Importer
from rmmformat.converters.contract import (
    UNKNOWN,
    ContractError,
    Flaw,
    Sample,
    bounded,
    closed,
    compare_deltas,
    deltas_of,
    may_read_anything,
    read_all,
    refused,
    require,
    source_files,
)
from rmmformat.converters.names import check_name
from rmmformat.errors import NonFiniteError, NotFoundError, RmmError, SourceError, UnsupportedError
from rmmformat.model import SourceTask

__all__ = ["IMPORT_CHECKS", "ImportCheck"]

ImportCheck = Callable[[Importer, Sample, Path], None]

_FLIPS = 60  # damaged copies of each file
_CUTS = 40
_HEAD = 512  # bytes from the start in which numbers are made huge
_HUGE = (b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\x80\0\0\0\0", b"\0\0\0\0\x01\0\0\0")


def _build(sample: Sample, folder: Path, flaw: Flaw = Flaw.NONE) -> Path:
    folder = folder / flaw.value
    folder.mkdir()
    return sample.build(folder, flaw)


def check_deltas_are_right(importer: Importer, sample: Sample, folder: Path) -> None:
    """``scale * B @ A`` is the value that was reckoned without the importer."""
    task = sample.open(importer, _build(sample, folder))
    compare_deltas(deltas_of(task), sample.deltas, sample.tolerance, sample.name)


def check_task_is_as_described(importer: Importer, sample: Sample, folder: Path) -> None:
    """Factors and private tensors have the shapes and dtypes that were announced, each time."""
    task = sample.open(importer, _build(sample, folder))
    check_name(task.name, "task name", task.path)
    for target, info in task.targets.items():
        check_name(target, "target name", task.path)
        factors = task.factors(target)
        shapes = (factors.A.shape, factors.B.shape)
        require(
            shapes == ((info.rank, info.shape.n_in), (info.shape.n_out, info.rank)),
            f"{target}: factors of shapes {shapes}, announced {info}",
        )
        require(
            (factors.A.dtype, factors.B.dtype) == (info.dtype_a, info.dtype_b),
            f"{target}: factors are {factors.A.dtype} and {factors.B.dtype}, announced {info}",
        )
        require(factors.scale == info.scale, f"{target}: two scales")
        before = factors.B.tobytes()
        if factors.B.flags.writeable:  # whoever reads may scribble on what is his
            factors.B[...] = np.ones_like(factors.B)
        require(task.factors(target).B.tobytes() == before, f"{target}: the second reading differs")
    for name, private in task.privates.items():
        check_name(name, "private tensor name", task.path)
        array = task.private_tensor(name)
        require(
            (array.shape, array.dtype) == (private.shape, private.dtype),
            f"{name}: {array.dtype} {array.shape}, announced {private}",
        )
    for read in (task.factors, task.private_tensor):
        missing = refused(lambda read=read: read("\0no"), NotFoundError)  # type: ignore[misc]
        require(missing, "an unknown name must raise NotFoundError")


def check_name_can_be_chosen(importer: Importer, sample: Sample, folder: Path) -> None:
    """``name`` renames the task, and one that cannot be stored is refused."""
    path = _build(sample, folder)
    if sample.several:
        one = refused(lambda: sample.open(importer, path, name="chosen"), RmmError)
        require(one, "one name is taken for several tasks")
    else:
        chosen = sample.open(importer, path, name="chosen").name
        require(chosen == "chosen", "the name is not taken")
    for bad in ("", "a\nb", "x" * 2000, "\ud800"):
        require(
            refused(lambda bad=bad: sample.open(importer, path, name=bad), RmmError),  # type: ignore[misc]
            f"the task name {bad[:5]!r} must be refused",
        )


def check_files_are_hashed(importer: Importer, sample: Sample, folder: Path) -> None:
    """``files`` has plain names, lengths and SHA-256 of files that are there."""
    path = _build(sample, folder)
    task = sample.open(importer, path)
    require(task.files, "no file is named")
    found = {
        (entry.name, entry.stat().st_size, hashlib.sha256(entry.read_bytes()).hexdigest())
        for entry in (folder / Flaw.NONE.value).rglob("*")
        if entry.is_file()
    }
    for file in task.files:
        require((file.name, file.n_bytes, file.sha256) in found, f"{file} is no file of the source")


def check_ledger_is_complete(importer: Importer, sample: Sample, folder: Path) -> None:
    """Every tensor, field and file has its line, once."""
    path = _build(sample, folder)
    items = [line.item for line in sample.open(importer, path).ledger]
    around = source_files(path / sample.several if sample.several else path)
    files = {f"file {p.name}{'/' if p.is_dir() else ''}" for p in around}
    missing = (sample.items | files) - set(items)
    require(not missing, f"the ledger says nothing of {sorted(missing)}")
    twice = {item for item in items if items.count(item) > 1}
    require(not twice, f"the ledger has two lines for {sorted(twice)}")


def check_extra_tensor_is_seen(importer: Importer, sample: Sample, folder: Path) -> None:
    """A tensor that the importer cannot know is refused by name or named in the ledger."""
    if Flaw.EXTRA not in sample.flaws:
        return
    path = _build(sample, folder, Flaw.EXTRA)
    try:
        ledger = sample.open(importer, path).ledger
    except (SourceError, UnsupportedError) as error:
        require(UNKNOWN in str(error), f"refused without the tensor's name: {error}")
        return
    require(
        any(UNKNOWN in line.item for line in ledger),
        f"tensor {UNKNOWN} is neither refused nor in the ledger",
    )


def check_nan_is_refused(importer: Importer, sample: Sample, folder: Path) -> None:
    """A factor with NaN raises NonFiniteError when it is read, unless that is allowed."""
    if Flaw.NAN not in sample.flaws:
        return
    path = _build(sample, folder, Flaw.NAN)

    def read(allow: bool) -> SourceTask:
        task = sample.open(importer, path, allow_nonfinite=allow)
        deltas_of(task)
        return task

    require(refused(lambda: read(False), NonFiniteError), "NaN is read as if it were a number")
    require(
        any(not np.isfinite(delta).all() for delta in deltas_of(read(True)).values()),
        "with allow_nonfinite the NaN must be handed out",
    )


def check_detection(importer: Importer, sample: Sample, folder: Path) -> None:
    """``detect`` knows the sample, and nothing of what is none; it never raises."""
    path = _build(sample, folder)
    require(
        importer.detect(path) is sample.detected,
        f"detect says {not sample.detected} of {sample.name}",
    )
    for place in _odd_places(folder / "odd"):
        found = importer.detect(place)
        if sample.by_name and place.suffix:
            continue
        require(found is False, f"detect says True of {place.name}")


def check_odd_places(importer: Importer, sample: Sample, folder: Path) -> None:
    """Paths that are no source give one typed error that names them."""
    options = sample.options(_build(sample, folder))
    for place in _odd_places(folder / "odd"):
        with bounded(place.name):
            try:
                importer.open(place, options=options)
            except RmmError as error:
                require(place.name in str(error), f"{place.name} is not named: {error}")
            else:
                raise ContractError(f"{place.name} was opened")


def _noise(seed: int, n_bytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(n_bytes)


def check_no_permission(importer: Importer, sample: Sample, folder: Path) -> None:
    """A source that may not be read is one typed error, and detected as nothing."""
    path = _build(sample, folder)
    options = sample.options(path)
    importer.detect(path)  # whatever it imports is there now
    with closed(folder / Flaw.NONE.value) as possible:
        if possible:
            require(importer.detect(path) is False, "detect says True of what it cannot read")
            try:
                importer.open(path, options=options)
            except RmmError as error:
                require(str(folder) in str(error), f"no path in {error}")
            else:
                raise ContractError("a closed folder was opened")


def _odd_places(folder: Path) -> list[Path]:
    folder.mkdir()
    (folder / "empty-folder").mkdir()
    (folder / "empty-file").touch()
    (folder / "noise").write_bytes(_noise(0, 4096))
    (folder / "noise.safetensors").write_bytes(_noise(1, 64))
    (folder / "noise.gguf").write_bytes(b"GGUF" + _noise(2, 64))
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    if not may_read_anything():
        (folder / "closed").write_bytes(b"x")
        (folder / "closed").chmod(0)
    return [*sorted(folder.iterdir()), folder / "absent", folder / "\0nul"]


# --- damage -----------------------------------------------------------------------------------


def _mutants(raw: bytes, seed: str) -> Iterator[tuple[str, bytes]]:
    """Copies of a file that are cut, flipped, or have huge numbers near the start."""
    chance = np.random.default_rng(list(seed.encode()))

    def draw(low: int, high: int) -> int:
        return int(chance.integers(low, high))

    cuts = {0, 1, 4, 7, 8, 9, len(raw) // 2, len(raw) - 1}
    cuts |= {draw(0, max(len(raw), 1)) for _ in range(_CUTS)}
    for length in sorted(cut for cut in cuts if 0 <= cut < len(raw)):
        yield f"cut to {length} bytes", raw[:length]
    near = min(len(raw), 4096)
    for _ in range(_FLIPS if raw else 0):
        copy = bytearray(raw)
        for _ in range(draw(1, 5)):
            copy[draw(0, near)] ^= 1 << draw(0, 8)
        yield "flipped bits", bytes(copy)
    for number, huge in enumerate(_HUGE):
        for start in range(4 * (number % 2), min(len(raw), _HEAD), 24):
            yield f"huge number at {start}", raw[:start] + huge + raw[start + len(huge) :]
    yield "with a tail", raw + b"PK\x03\x04" + bytes(64)


def check_damaged_files(importer: Importer, sample: Sample, folder: Path) -> None:
    """A damaged file gives a typed error that names the source, or is read within bounds.

    A file that was cut short is refused, or everything in it that counts is still right.
    """
    path = _build(sample, folder)
    options = sample.options(path)
    root = folder / Flaw.NONE.value
    for file in _files_below(root, sample):
        raw = file.read_bytes()
        for how, damaged in _mutants(raw, file.name):
            _put(file, damaged)
            what = f"{file.name} {how}"
            with bounded(what):
                try:
                    tasks = read_all(importer, path, options)
                except RmmError as error:
                    require(str(root) in str(error), f"{what}: no path in {error}")
                    require(len(str(error)) < 4000, f"{what}: an error of {len(str(error))} bytes")
                    continue
            if how.startswith("cut"):
                task = sample.choose(tasks)
                compare_deltas(deltas_of(task), sample.deltas, sample.tolerance, what)
        _put(file, raw)


def _files_below(root: Path, sample: Sample) -> list[Path]:
    """Files to damage: all, or those of the task that is judged."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if sample.several:
        files = [file for file in files if sample.several in file.relative_to(root).parts]
    return files


def _put(file: Path, raw: bytes) -> None:
    # A new file each time: the old one may still be mapped.
    new = file.with_name(file.name + ".new")
    new.write_bytes(raw)
    new.replace(file)


def check_replaced_files(importer: Importer, sample: Sample, folder: Path) -> None:
    """Folders, pipes, loops and closed files in place of files give typed errors, at once."""
    path = _build(sample, folder)
    options = sample.options(path)
    root = folder / Flaw.NONE.value
    for file in _files_below(root, sample):
        aside = file.with_name(file.name + ".aside")
        file.rename(aside)
        for make in _IMPOSTORS:
            if not make(file):
                continue
            with bounded(f"{file.name}: {make.__name__}"):
                try:
                    tasks = read_all(importer, path, options)
                except RmmError as error:
                    require(str(root) in str(error), f"{file.name}: no path in {error}")
                else:
                    what = f"{file.name}: {make.__name__}"
                    if not sample.several:  # others may well do without this one
                        compare_deltas(
                            deltas_of(sample.choose(tasks)), sample.deltas, sample.tolerance, what
                        )
                importer.detect(path)
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            else:
                file.unlink(missing_ok=True)
        aside.rename(file)


def _nothing(file: Path) -> bool:
    return not file.exists()


def _a_folder(file: Path) -> bool:
    file.mkdir()
    return True


def _a_loop(file: Path) -> bool:
    file.symlink_to(file)
    return True


def _a_pipe(file: Path) -> bool:
    if hasattr(os, "mkfifo"):
        os.mkfifo(file)
    return hasattr(os, "mkfifo")


def _closed(file: Path) -> bool:
    if may_read_anything():
        return False
    file.write_bytes(b"x")
    file.chmod(0)
    return True


_IMPOSTORS = (_nothing, _a_folder, _a_loop, _a_pipe, _closed)


def check_exact_file_gives_the_task_back(importer: Importer, sample: Sample, folder: Path) -> None:
    """An exact ``.rmm`` file holds every bit, scale, shape, private tensor and config text."""
    import rmmformat

    task: Any = sample.open(importer, _build(sample, folder))
    rmmformat.convert([task], folder / "exact.rmm", exact=True)
    report = rmmformat.validate(folder / "exact.rmm")
    require(report.ok, f"the file breaks rules: {report.violations}")
    with rmmformat.open(folder / "exact.rmm") as collection:
        again = collection.source(task.name)
        require(again.targets == task.targets, "targets differ")
        require(again.privates == task.privates, "private tensors differ")
        require(again.config_text == task.config_text, "the config text differs")
        require(again.base_model == task.base_model, "the base model differs")
        require(again.files == task.files, "the files differ")
        for target in task.targets:
            ours, theirs = again.factors(target), task.factors(target)
            require(
                ours.A.tobytes() == theirs.A.tobytes() and ours.B.tobytes() == theirs.B.tobytes(),
                f"factors of {target} differ",
            )
        for name in task.privates:
            require(
                again.private_tensor(name).tobytes() == task.private_tensor(name).tobytes(),
                f"private tensor {name} differs",
            )


IMPORT_CHECKS: tuple[ImportCheck, ...] = (
    check_deltas_are_right,
    check_task_is_as_described,
    check_name_can_be_chosen,
    check_files_are_hashed,
    check_ledger_is_complete,
    check_extra_tensor_is_seen,
    check_nan_is_refused,
    check_detection,
    check_odd_places,
    check_no_permission,
    check_damaged_files,
    check_replaced_files,
    check_exact_file_gives_the_task_back,
)
