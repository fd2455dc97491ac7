"""Kill real ``rmm add`` processes at random instants, and count what they leave.

Run as a program: ``python kill.py FOLDER KILLS``.  The children are forked from a process that has
imported everything, so that a kill hits the work and not the start of an interpreter.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

DEMO = Path(__file__).parents[1] / "data" / "demo-adapters"


def run(arguments: list[str]) -> int:
    """Start ``rmm`` with these arguments in a child; gives its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        from rmmformat.cli.main import main

        main(arguments, standalone_mode=False)
        code = 0
    finally:
        os._exit(code)


def contents(path: Path) -> dict[str, bytes]:
    import rmmformat as rmm
    from rmmformat import _native

    assert _native.validate_bytes(path.read_bytes()) == [], path
    with rmm.open(path) as collection:
        return {name: collection.load(name).arena.tobytes() for name in collection.tasks}


def kills(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    import rmmformat as rmm

    folder.mkdir(exist_ok=True)
    start, path = folder / "start.rmm", folder / "x.rmm"
    rmm.convert([DEMO / "bbc", DEMO / "spam"], start, exact=True)
    rmm.add(start, DEMO / "yelp")
    rmm.remove(start, "yelp")
    changes = [
        ["add", str(path), str(DEMO / "yelp")],
        ["add", str(path), f"spam={DEMO / 'imdb'}", "--replace", "--max-error", "30%"],
        ["remove", str(path), "spam"],
        ["compact", str(path)],
    ]
    results, times = [], []
    for change in changes:
        shutil.copyfile(start, path)
        began = time.monotonic()
        assert os.waitpid(run(change), 0)[1] == 0, change
        times.append(time.monotonic() - began)
        results.append(contents(path))
    old = contents(start)
    rng = random.Random(seed)  # noqa: S311
    found = {"old": 0, "new": 0, "killed": 0, "scratch": 0, "recovered": 0}
    tried = 0
    while found["killed"] < count:
        number = 0 if rng.random() < 0.5 else rng.randrange(len(changes))
        shutil.copyfile(start, path)
        child = run(changes[number])
        # Half of them while it runs at all, half near its end, where it writes.
        share = rng.random() if tried % 2 else 0.5 + 0.5 * rng.random()
        time.sleep(share * times[number])
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        tried += 1
        assert tried < 20 * count, "children end before they can be killed"
        found["killed"] += os.WIFSIGNALED(status)
        got = contents(path)
        assert got in (old, results[number]), changes[number]
        found["new" if got == results[number] and got != old else "old"] += 1
        with rmm.open(path) as collection:
            found["scratch"] += len(collection.buffer) > collection.index.file_length
        if rng.random() < 0.2:  # and the file can be changed at once: no lock is left
            rmm.remove(path, "bbc", wait=0)
            assert contents(path).keys() == got.keys() - {"bbc"}
            found["recovered"] += 1
    return {**found, "tried": tried}


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from rmmformat.cli import add, compact, remove  # noqa: F401

    sys.stdout.write(f"{kills(Path(sys.argv[1]), int(sys.argv[2]))}\n")
