"""The README's table of sizes and errors: converts the demo adapters at each setting.

Usage: python benchmarks/readme_table.py [--check | --write]
Without an option the table is printed; --check compares README.md with it, --write puts it there.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

import rmmformat as rmm
from rmmformat.inspect import file_info

ROOT = Path(__file__).parent.parent
ADAPTERS = ROOT / "tests" / "data" / "demo-adapters"
START, END = "<!-- table: python benchmarks/readme_table.py -->\n", "<!-- end -->"

SETTINGS: list[tuple[str, dict[str, object]]] = [
    ("--exact", {"exact": True}),
    ("--encoding q8", {"encoding": "q8"}),
    ("--max-error 1%", {"max_error": 0.01}),
    ("--max-error 5% (default)", {"max_error": 0.05}),
    ("--max-error 20%", {"max_error": 0.20}),
    ("--size 3%", {"size": 0.03}),
    ("--components 3", {"components": 3}),
    ("--components 3 --align svd", {"components": 3, "align": "svd"}),
]


def table() -> str:
    """Convert at every setting and give the table as markdown."""
    lines = [
        "| `rmm convert adapters/ ...` | factors | file | mean error | largest error |",
        "| --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.rmm"
        for words, options in SETTINGS:
            rmm.convert(ADAPTERS, path, overwrite=True, **options)  # type: ignore[arg-type]
            with rmm.open(path) as collection:
                info = file_info(collection)
                errors = collection.index.table("erro")["error"].astype(np.float64)
            assert info.fraction is not None
            lines.append(
                f"| `{words}` | {100 * info.fraction:.1f} % | {info.file_bytes / 1e3:.0f} kB | "
                f"{100 * errors.mean():.2f} % | {100 * errors.max():.1f} % |"
            )
    return "\n".join(lines) + "\n"


def same(old: str, new: str) -> bool:
    """Compare two tables: words alike, numbers to 2 % (libraries of linear algebra differ)."""
    number = re.compile(r"\d+(?:\.\d+)?")
    if number.sub("#", old) != number.sub("#", new):
        return False
    pairs = zip(number.findall(old), number.findall(new), strict=True)
    return all(abs(float(a) - float(b)) <= 0.02 * float(b) + 0.02 for a, b in pairs)


def main() -> int:
    """Print, check or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    fresh = table()
    if not (arguments.check or arguments.write):
        print(fresh, end="")
        return 0
    readme = ROOT / "README.md"
    text = readme.read_text()
    start, end = text.index(START) + len(START), text.index(END)
    if arguments.write:
        readme.write_text(text[:start] + fresh + text[end:])
        return 0
    if not same(text[start:end], fresh):
        print(f"README.md is stale; the table is now\n{fresh}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
