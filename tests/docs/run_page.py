"""Runs the blocks of a page one after another, as a person would paste them.

Usage: python run_page.py BLOCKS.json, in the folder to run in.  BLOCKS is a list of
[language, text, where]; blocks of Python share their names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main() -> int:
    scope: dict[str, object] = {"__name__": "__main__"}
    for language, text, where in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(f"--- {where}", flush=True)  # noqa: T201
        if language == "shell":
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=False)
            if done.returncode:
                print(f"{where}: exit code {done.returncode}", flush=True)  # noqa: T201
                return 1
        else:
            exec(compile(text, where, "exec"), scope)  # noqa: S102  # our own documents
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
