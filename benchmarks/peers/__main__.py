"""This product beside what others do, in one run.

    python benchmarks/peers [--only load,merge] [--json FILE] [--markdown PAGE] [--plot SVG]

Each part puts everybody through the same input in turn and prints medians.  Packages that are not
there are left out and named.  `--markdown docs/performance.md` puts the tables where the page has
marks for them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

# Only figures are of interest here; libraries read these when they are imported.
os.environ.update(TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
sys.path.insert(1, str(Path(__file__).parents[1]))  # the benchmarks that parts are made of

from measure import machine
from report import Table, write_markdown
from rich.console import Console
from setting import Setting
from summary import summary

#: Modules of this folder, in the order of the page.
PARTS = {
    "open": "opening",
    "load": "load",
    "merge": "merge",
    "extract": "extract",
    "size": "sizes",
    "scaling": "curves",
}


def chosen(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}; parts are {', '.join(PARTS)}")
    return names


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", type=chosen, default=list(PARTS), metavar="PART,...")
    parser.add_argument("--rounds", type=int, default=15, help="turns of what is short")
    parser.add_argument("--quick", action="store_true", help="tiny; shows that it works")
    parser.add_argument("--json", type=Path, help="write all values to this file")
    parser.add_argument("--markdown", type=Path, help="put tables into this page, at its marks")
    parser.add_argument("--plot", type=Path, help="draw the scaling curves into this SVG file")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=None if sys.stdout.isatty() else 120)
    head = machine()
    for line in head:
        console.print(line, highlight=False)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
    found: dict[str, list[Table]] = {}
    with tempfile.TemporaryDirectory("-rmm", "bench", memory) as folder:
        setting = Setting(given.quick, Path(folder), 3 if given.quick else given.rounds)
        for part in given.only:
            start = time.perf_counter()
            tables = importlib.import_module(PARTS[part]).tables(setting)
            found[part] = tables
            for table in tables:
                console.print()
                table.show(console)
            console.print(f"  {part}: {time.perf_counter() - start:.0f} s", style="dim")
    everything = [table for tables in found.values() for table in tables]
    whole = set(found) == set(PARTS)
    if whole:
        everything.insert(0, summary(everything))
        console.print()
        everything[0].show(console)
    if given.json:
        values = {table.name: table.values() for table in everything}
        given.json.write_text(json.dumps({"machine": head, "tables": values}, indent=1) + "\n")
    if given.plot and "scaling" in found:
        importlib.import_module("curves").draw(found["scaling"], given.plot)
    if given.markdown:
        parts = {table.name: table.markdown() for table in everything}
        if whole:  # else other tables of the page come from another run
            parts["machine"] = "\n".join(f"- {line}" for line in head)
        missing = write_markdown(given.markdown, parts)
        for name in missing:
            console.print(f"{given.markdown} has no mark for {name}")


if __name__ == "__main__":
    main()
