"""Opening a file of 1,000 tasks with 224 targets each, beside what else could hold them.

The values are few (rank 2, sides of 8): what is measured is the price of 448,000 factors that can
be named.  Each opens in a process of its own and lists its tasks; "grown" is that process's own
memory beyond what it had once its library was imported.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from measure import available
from report import Column, Table
from safetensors.numpy import save_file
from setting import Setting

ROOT = Path(__file__).parents[2]

WAYS = {
    "rmm": (
        "import rmmformat as rmm",
        "with rmm.open('{folder}/x.rmm') as collection: found = len(collection.tasks)",
    ),
    "one safetensors file": (
        "from safetensors import safe_open",
        "with safe_open('{folder}/x.safetensors', 'numpy') as file:\n"
        "    found = len({{name.split('/')[0] for name in file.keys()}})",
    ),
    "a safetensors file a task, each opened": (
        "import os; from safetensors import safe_open",
        "found = 0\n"
        "for name in os.listdir('{folder}/tasks'):\n"
        "    with safe_open('{folder}/tasks/' + name, 'numpy') as file:\n"
        "        found += len(file.keys()) > 0",
    ),
}

_CHILD = """
import json, statistics, sys, threading, time
{imports}

def own():
    lines = open("/proc/self/status").read().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(found[key].split()[0]) for key in ("RssAnon", "RssShmem"))

def peak_of(work):
    # Looked at all the time, from another thread; what is kept open until the end shows anyhow.
    top, over = [before], threading.Event()
    def watch():
        while not over.is_set():
            top.append(own())
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    work()
    top.append(own())
    over.set()
    thread.join()
    return max(top)

def work():
{work}
    return found

before = own() if sys.platform == "linux" else 0
peak = peak_of(work) if sys.platform == "linux" else 0
times, cpu = [], []
for _ in range({rounds}):
    start, cpu_start = time.perf_counter(), time.process_time()
    found = work()
    cpu.append(time.process_time() - cpu_start)
    times.append(time.perf_counter() - start)
figures = [statistics.median(times), statistics.median(cpu), peak - before]
print(json.dumps([found, *figures]))
"""


def builder() -> ModuleType:
    """The tests' builder of large files, which writes them from the specification alone."""
    path = ROOT / "tests" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def tables(setting: Setting) -> list[Table]:
    n_tasks, n_targets = (20, 7) if setting.quick else (1000, 224)
    folder = setting.folder("open")
    table = Table(
        "open",
        f"Open {n_tasks:,} tasks of {n_targets} targets and list them",
        "kept as",
        (
            Column("ms", "ms"),
            Column("cpu", "CPU, ms"),
            Column("ratio", "times ours", ",.0f"),
            Column("grown", "memory, MiB", ".1f"),
            Column("bytes", "MB on disk", ".1f"),
        ),
    )
    if not available("google_crc32c"):
        table.notes.append("Left out: google_crc32c is not installed.")
        return [table]
    (folder / "x.rmm").write_bytes(builder().large(n_tasks, n_targets))
    small = {
        f"layer.{i:04d}.proj.lora_{factor}.weight": np.ones(shape, np.float16)
        for i in range(n_targets)
        for factor, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    names = [f"task-{number:05d}" for number in range(n_tasks)]
    (folder / "tasks").mkdir()
    for name in names:
        save_file(small, folder / "tasks" / f"{name}.safetensors")
    whole = {f"{name}/{key}": value for name in names for key, value in small.items()}
    save_file(whole, folder / "x.safetensors")
    del whole
    sizes = {
        "rmm": [folder / "x.rmm"],
        "one safetensors file": [folder / "x.safetensors"],
        "a safetensors file a task, each opened": sorted((folder / "tasks").iterdir()),
    }
    for name, (imports, work) in WAYS.items():
        body = "\n".join(f"    {line}" for line in work.format(folder=folder).splitlines())
        rounds = 3 if setting.quick else 21 if name == "rmm" else 3
        program = _CHILD.format(imports=imports, work=body, rounds=rounds)
        done = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        )
        n_found, seconds, cpu, grown = json.loads(done.stdout)
        assert n_found == n_tasks
        table.put(
            name,
            ms=1e3 * seconds,
            cpu=1e3 * cpu,
            grown=grown / 2**20,
            bytes=sum(path.stat().st_size for path in sizes[name]) / 1e6,
        )
    table.compare("rmm", "cpu")
    return [table]
