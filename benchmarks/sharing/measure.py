"""Size at equal error, with and without what tasks share, as a table.

Usage: python benchmarks/sharing/measure.py COLLECTIONS [FOLDER ...]

COLLECTIONS is what ``make_collections.py`` wrote; FOLDERs are further collections, each a folder of
adapters.  Every figure is that of a file: bytes of its factors as its report counts them, errors
measured on decoded values.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

from rmmformat import clusters
from rmmformat.coding import MaxError, Method, Size
from rmmformat.pipeline import ConvertReport, convert

BOUNDS, SIZES = (0.4, 0.2, 0.1, 0.05), (0.03, 0.01)
Row = tuple[str, int | None, Sequence[float]]
ROWS: tuple[Row, ...] = (
    ("continued", None, BOUNDS),
    ("frozen", None, BOUNDS),
    ("gentle", None, BOUNDS),
    ("oneseed", None, BOUNDS),
    ("apart", None, (0.2, 0.05)),
    ("families", None, BOUNDS),
    *(("draws", n, (0.2, 0.05)) for n in (4, 8, 16, 32)),
    *(("many", n, (0.2, 0.05)) for n in (10, 30, 100)),
    ("manyapart", 100, (0.2, 0.05)),
)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The planner as it is, but blind to what tasks share."""
    with mock.patch.object(clusters, "frames", return_value=[]):
        yield


def run(sources: list[Path], method: Method, out: Path) -> ConvertReport:
    return convert([str(path) for path in sources], out, method, overwrite=True)


def line(task: tuple[Path, int | None, str, float]) -> str:
    """One row of the table: coded both ways."""
    folder, n, dial, value = task
    sources = sorted(path for path in folder.iterdir() if path.is_dir())[:n]
    method = MaxError(value) if dial == "error" else Size(value)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "x.rmm"
        shared = run(sources, method, out)
        seconds = time.perf_counter() - start
        with alone():
            single = run(sources, method, out)
    setting = f"--{'max-error' if dial == 'error' else 'size'} {100 * value:g}%"
    if dial == "error":
        gain = f"{single.factor_bytes / shared.factor_bytes:.2f} times smaller"
    else:
        gain = f"error {single.mean_error / shared.mean_error:.2f} times smaller"
    return (
        f"| {folder.name} | {len(sources)} | {setting} "
        f"| {100 * single.fraction:.2f} ({100 * single.mean_error:.1f} / "
        f"{100 * single.max_error:.1f}) | {100 * shared.fraction:.2f} "
        f"({100 * shared.mean_error:.1f} / {100 * shared.max_error:.1f}) | {gain} "
        f"| {seconds:.0f} s |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("collections", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    jobs = [
        (arguments.collections / name, n, "error", bound)
        for name, n, bounds in ROWS
        for bound in bounds
    ]
    jobs += [
        (arguments.collections / name, None, "size", size)
        for name in ("continued", "gentle", "families", "many")
        for size in SIZES
    ]
    for folder in arguments.folders:
        jobs += [(folder, None, "error", bound) for bound in (0.2, 0.05)]
        jobs += [(folder, None, "size", size) for size in (0.03,)]
    print(
        "| collection | n | dial | alone: size (mean / largest error), % | shared | gain | time |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with ProcessPoolExecutor(arguments.workers) as executor:
        for text in executor.map(line, jobs):
            print(text, flush=True)


if __name__ == "__main__":
    main()
