"""Size against error on a folder of adapters, measured on real files.

Usage: python benchmarks/curve.py ADAPTERS [--leave-out NAME ...] [--json FILE]

Sizes are over the originals' factor bytes as stored.  "file" is the whole file without its private
tensors (heads); "overhead" is header, index, metadata and padding, over that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import rmmformat as rmm
from rmmformat.inspect import file_info

SIZES = (0.266, 0.141, 0.109, 0.078, 0.031, 0.016, 0.010)
ERRORS = (0.20, 0.10, 0.05, 0.02, 0.01)
PUBLISHED = (1, 3, 5)


def measure(sources: list[str], options: dict[str, Any], path: Path) -> dict[str, Any]:
    """Convert once and give the figures of the file."""
    start = time.perf_counter()
    rmm.convert(sources, path, overwrite=True, **options)
    seconds = time.perf_counter() - start
    assert rmm.validate(path).ok
    with rmm.open(path) as collection:
        info = file_info(collection)
        errors = collection.index.table("erro")["error"].astype(np.float64)
    file_bytes = info.file_bytes - info.private_bytes
    assert info.original_bytes
    return {
        "options": options,
        "factors": info.factor_bytes / info.original_bytes,
        "file": file_bytes / info.original_bytes,
        "overhead": 1 - info.factor_bytes / file_bytes,
        "mean": errors.mean(),
        "median": float(np.median(errors)),
        "max": errors.max(),
        "seconds": seconds,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--leave-out", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folders = sorted(path for path in arguments.adapters.iterdir() if path.is_dir())
    sources = [str(path) for path in folders if path.name not in arguments.leave_out]
    settings: list[dict[str, Any]] = [{"size": size} for size in SIZES]
    settings += [{"max_error": error} for error in ERRORS]
    settings += [{"encoding": name} for name in ("q8", "q4", "q3", "q2")]
    settings += [{"components": p, "encoding": "f32"} for p in PUBLISHED]
    settings += [{"components": 3, "encoding": "f32", "align": "svd"}]
    rows = []
    print("| option | factors | file | overhead | mean | median | max | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for options in settings:
            row = measure(sources, options, Path(folder) / "x.rmm")
            rows.append(row)
            words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
            figures = " | ".join(
                f"{100 * row[key]:.2f} %"
                for key in ("factors", "file", "overhead", "mean", "median", "max")
            )
            print(f"| `{words}` | {figures} | {row['seconds']:.1f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
