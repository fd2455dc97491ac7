"""Run one console script in this process, and write down what it took.

    python child.py TOLD MODULE:FUNCTION WORDS...

A process cannot tell its own peak from its parent's by `wait4`: what the parent had before the
child's program began is counted.  The kernel's mark of this address space begins anew.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path


def peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        return 1024 * next(int(words[1]) for words in lines if words[0] == "VmHWM:")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main() -> None:
    told, where, *words = sys.argv[1:]
    module, _, function = where.partition(":")
    start = time.perf_counter()
    script = getattr(importlib.import_module(module), function)
    importing = time.perf_counter() - start
    cpu_start = time.process_time()
    sys.argv = [module, *words]
    sys.path.pop(0)  # this script's folder
    try:
        script()
    except SystemExit as end:
        if end.code not in (0, None):
            raise
    told_of = {"importing": importing, "peak": peak(), "cpu": time.process_time() - cpu_start}
    Path(told).write_text(json.dumps(told_of))


if __name__ == "__main__":
    main()
