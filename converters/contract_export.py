"""Checks that every exporter passes (see :mod:`rmmformat.converters.contract`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from rmmformat.converters.base import Exporter, Importer, Options
from rmmformat.converters.contract import (
    ContractError,
    Output,
    Wrapped,
    compare_deltas,
    deltas_of,
    digest_tree,
    refused,
    require,
)
from rmmformat.errors import LossyConversionError, RmmError, UnsupportedError
from rmmformat.model import SourceTask

__all__ = ["EXPORT_CHECKS", "ExportCheck", "check_join", "check_round", "try_export"]

ExportCheck = Callable[[Exporter, Output, SourceTask, Path], None]


def try_export(
    exporter: Exporter, output: Output, task: SourceTask, out: Path, *, must: bool
) -> Options | None:
    """Export, leaving private tensors behind if the format cannot hold them.

    Parameters
    ----------
    must
        The format is said to take this task; otherwise it may refuse it.

    Returns
    -------
    Options or None
        What it took; None if the task was refused, and then nothing was written.
    """
    folder = out.with_name(out.name + ".needs")
    folder.mkdir(parents=True, exist_ok=True)
    before = digest_tree(out.parent)
    options = output.options(task, folder)
    before.update(digest_tree(out.parent))
    tries = [options]
    if task.privates:
        tries.append(dataclasses.replace(options, drop_private=True))
    for attempt in tries:
        try:
            exporter.export(task, out, options=attempt)
            return attempt
        except LossyConversionError as error:
            last: RmmError = error
            require(
                any(name in str(error) for name in (*task.privates, *task.targets)),
                f"refused without the name of what would be lost: {error}",
            )
        except UnsupportedError as error:
            last = error
        require(digest_tree(out.parent) == before, "refused, and something was written")
    require(not must, f"refused: {last}")
    return None


def check_join(
    exporter: Exporter, output: Output, task: SourceTask, folder: Path, *, must: bool = False
) -> None:
    """What was written reads back, by the foreign library, as the same deltas; or is refused."""
    out = folder / output.filename
    options = try_export(exporter, output, task, out, must=must)
    if options is not None:
        compare_deltas(
            output.read(out, task), deltas_of(task), output.tolerance, f"{task.name}: written"
        )


def check_round(
    exporter: Exporter,
    importer: Importer,
    output: Output,
    task: SourceTask,
    folder: Path,
    *,
    must: bool = False,
) -> None:
    """What was written is detected and imported again as the same deltas."""
    out = folder / output.filename
    options = try_export(exporter, output, task, out, must=must)
    if options is None:
        return
    require(importer.detect(out) is True, "its own output is not detected")
    (again,) = importer.open(out, options=options)
    expected = {output.back(target): delta for target, delta in deltas_of(task).items()}
    compare_deltas(deltas_of(again), expected, output.tolerance, f"{task.name}: read again")
    if not options.drop_private:
        kept = {name: task.private_tensor(name).tobytes() for name in task.privates}
        found = {name: again.private_tensor(name).tobytes() for name in again.privates}
        require(kept == found, f"private tensors: wrote {sorted(kept)}, read {sorted(found)}")


def check_ledger_names_everything(
    exporter: Exporter, output: Output, task: SourceTask, folder: Path
) -> None:
    """Every target and private tensor has a line of the ledger."""
    out = folder / output.filename
    options = try_export(exporter, output, task, out, must=True)
    ledger = exporter.export(task, out, force=True, options=options or Options())
    text = "\n".join(f"{line.item} {line.detail}" for line in ledger)
    for name in (*task.targets, *task.privates):
        require(name in text, f"the ledger says nothing of {name}")


def check_same_bytes(exporter: Exporter, output: Output, task: SourceTask, folder: Path) -> None:
    """The same task gives the same bytes, wherever it is written."""
    trees = []
    for number in range(3):
        place = folder / str(number)
        place.mkdir()
        options = try_export(exporter, output, task, place / output.filename, must=True)
        if output.options(task, place / f"{output.filename}.needs") != options:
            options = None  # only private tensors were left behind
        tree = digest_tree(place)
        trees.append({k: v for k, v in tree.items() if ".needs" not in k})
    require(trees[0] == trees[1] == trees[2], "two exports of one task differ")
    names = {name.partition("/")[0] for name in trees[0]}
    require(names == {output.filename}, f"wrote {sorted(names)} beside {output.filename}")


def check_force(exporter: Exporter, output: Output, task: SourceTask, folder: Path) -> None:
    """Existing output is replaced by ``force`` and by nothing else."""
    out = folder / output.filename
    options = try_export(exporter, output, task, out, must=True) or Options()
    before = digest_tree(folder)
    again = refused(lambda: exporter.export(task, out, options=options), RmmError)
    require(again, "existing output was replaced without force")
    require(digest_tree(folder) == before, "existing output was changed without force")
    exporter.export(task, out, force=True, options=options)
    require(digest_tree(folder) == before, "force leaves other bytes than the first export")
    _check_wrong_kind(exporter, task, out, folder, options)


def _check_wrong_kind(
    exporter: Exporter, task: SourceTask, out: Path, folder: Path, options: Options
) -> None:
    """A folder in the place of a file, or a file in that of a folder, is never replaced."""
    wrong = folder / "wrong" / out.name
    wrong.parent.mkdir()
    if out.is_dir():
        wrong.write_bytes(b"years of work")
    else:
        wrong.mkdir()
        (wrong / "thesis").write_bytes(b"years of work")
    before = digest_tree(wrong.parent)
    for force in (False, True):

        def write(force: bool = force) -> None:
            exporter.export(task, wrong, force=force, options=options)

        kept = refused(write, RmmError)
        require(kept, f"something of another kind was replaced (force={force})")
        require(digest_tree(wrong.parent) == before, "something of another kind was changed")


def check_nothing_half_written(
    exporter: Exporter, output: Output, task: SourceTask, folder: Path
) -> None:
    """After an error at any reading, an interrupt, or a full disk, all is as it was."""
    place = folder / "place"
    place.mkdir()
    out = place / output.filename
    options = try_export(exporter, output, task, folder / output.filename, must=True) or Options()
    counted = Wrapped(task)
    exporter.export(counted, out, options=options)
    require(counted.n_reads > 0, "nothing was read")
    first = digest_tree(place)
    for existing in (True, False):
        if not existing:
            _remove(place)
        before = first if existing else {}
        for error in (KeyboardInterrupt(), OSError(5, "Input/output error"), MemoryError()):
            for call in range(counted.n_reads):
                failing = Wrapped(task, fails_at=call, error=error)
                with contextlib.suppress(KeyboardInterrupt, RmmError, OSError, MemoryError):
                    exporter.export(failing, out, force=True, options=options)
                    raise ContractError(f"{error!r} at reading {call} was swallowed")
                require(digest_tree(place) == before, f"{error!r} at reading {call} left traces")
        size = max((len(raw or b"") for raw in first.values()), default=0)
        for limit in (0, 16, size // 2, size - 1):
            with _files_of_at_most(limit) as limited:
                full = not limited or refused(
                    lambda: exporter.export(task, out, force=True, options=options), RmmError
                )
            if limited:
                require(full, f"a disk that takes {limit} bytes gave no error")
                require(digest_tree(place) == before, f"a full disk ({limit} bytes) left traces")


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _files_of_at_most(n_bytes: int) -> Iterator[bool]:
    """Let no file of this process grow past a length, as on a full disk."""
    try:
        import resource
    except ImportError:  # Windows
        yield False
        return
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield True
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def check_no_path_from_names(
    exporter: Exporter, output: Output, task: SourceTask, folder: Path
) -> None:
    """Names of tasks and targets choose no path: nothing appears but the output."""
    deep = folder / "a" / "b"
    deep.mkdir(parents=True)
    hostile: list[tuple[str, Callable[[str], str]]] = [
        ("../../evil", lambda target: f"../../{target}"),
        (f"{folder}/evil", lambda target: f"{folder}/{target}"),
        ("CON", lambda target: f"{target}/.."),
        ("x" * 300, lambda target: target + "x" * 300),
        ("\u202egnp.exe", lambda target: target),
    ]
    for number, (name, rename) in enumerate(hostile):
        evil = Wrapped(task, name=name, rename=rename)
        out = deep / f"{number}{output.filename}"
        before = digest_tree(folder)
        with contextlib.suppress(RmmError):
            try_export(exporter, output, evil, out, must=False)
        new = {path for path in digest_tree(folder).keys() - before.keys() if ".needs" not in path}
        own = f"a/b/{out.name}"
        stray = [path for path in new if path != own and not path.startswith(own + "/")]
        require(not stray, f"task {name[:20]!r} chose {stray}")
        with contextlib.suppress(OSError):
            require(not any("evil" in path.name for path in folder.parent.iterdir()), "escaped")


EXPORT_CHECKS: tuple[ExportCheck, ...] = (
    check_ledger_names_everything,
    check_same_bytes,
    check_force,
    check_nothing_half_written,
    check_no_path_from_names,
)
