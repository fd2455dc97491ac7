"""How long a runtime takes to change its task: from an .rmm file, and in its own ways.

    python benchmarks/switch.py [--rounds 40] [--tasks 8] [--threads 1] [--json FILE]

Eight adapters of BERT-base size (48 projections of 768 to 768, rank 16, float32: 96 tensors,
4.7 MB) stand in a memory file system, so that every file is in memory, once as each runtime's own
files and once as .rmm: exact, as published (RMM, three components, f32 and f16), and planned (5 %
error).  Every round lets each contender switch once, so that all meet the same noise.  The table
has medians, of the time on the clock and of the processor's time, which other programs do not
lengthen: ratios and goals are of the latter.

"from file": the task is reconstructed from the open file.  "kept": it is in a TaskCache (llama.cpp:
it is loaded there).  "foreseen": it was prefetched while another one was evaluated, for which the
benchmark waits before the clock starts.  The last table is of the five demo adapters with two
labels (rank 16, query and value of six layers, float16, with heads) on the encoder that they were
trained on.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import switch_models as models

import rmmformat as rmm

KINDS: dict[str, dict[str, Any]] = {
    "exact": {"exact": True},
    "p = 3, f32": {"components": 3, "encoding": "f32"},
    "p = 3, f16": {"components": 3, "encoding": "f16"},
    "planned, 5 %": {"max_error": 0.05},
}
Switch = Callable[[str], object]


class Group:
    """Contenders for one runtime, and which of them is its own way from a file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.contenders: dict[str, Switch] = {}
        self.before: dict[str, Switch] = {}  # what a contender may do before it is timed
        self.rivals: dict[str, float] = {}  # name, how many times faster ours has to be
        self.times: dict[str, list[float]] = {}
        self.cpu_times: dict[str, list[float]] = {}

    def measure(self, tasks: tuple[str, ...], rounds: int) -> None:
        """Let everybody switch in turn, each round to another task."""
        warm = 2 * len(tasks)
        for n in range(-warm, rounds):
            for name, switch in self.contenders.items():
                task = tasks[n % len(tasks)]
                self.before.get(name, str)(task)
                start, cpu_start = time.perf_counter(), time.process_time()
                switch(task)
                cpu, seconds = time.process_time() - cpu_start, time.perf_counter() - start
                if n >= 0:
                    self.times.setdefault(name, []).append(seconds)
                    self.cpu_times.setdefault(name, []).append(cpu)

    def report(self) -> dict[str, Any]:
        """Print the table; give it as values, too."""
        clock = {name: 1e3 * statistics.median(times) for name, times in self.times.items()}
        medians = {name: 1e3 * statistics.median(times) for name, times in self.cpu_times.items()}
        print(f"\n{self.title}")
        print(f"  {'':40}{'clock ms':>10}{'fastest':>9}{'CPU ms':>9}", end="")
        for rival in self.rivals:
            print(f"  {rival} takes", end="")
        print()
        for name, median in medians.items():
            print(f"  {name:40}{clock[name]:10.2f}{1e3 * min(self.times[name]):9.2f}", end="")
            print(f"{median:9.2f}", end="")
            for rival in self.rivals:
                print(f"{medians[rival] / median:{len(rival) + 7}.1f}x", end="")
            print()
        reached = {}
        for rival, goal in self.rivals.items():
            for ours in ("rmm exact, from file", "rmm, kept"):
                ratio = medians[rival] / medians[ours]
                reached[f"{ours} / {rival}"] = ratio
                print(
                    f"  goal: {ours}, at least {goal:g} times as fast as {rival}: "
                    f"{ratio:.1f}, {'reached' if ratio >= goal else 'missed'}"
                )
        return {"title": self.title, "clock_ms": clock, "cpu_ms": medians, "reached": reached}


def torch_group(
    root: Path,
    collections: dict[str, rmm.Collection],
    threads: int,
    make: Callable[[], Any] = models.torch_model,
) -> Group:
    """PEFT, and copying by hand."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    group = Group("PEFT (torch)")
    tasks = next(iter(collections.values())).tasks
    ours = make()
    for kind, collection in collections.items():
        name = f"k{len(group.contenders)}"
        rmm.runtimes.peft.load(ours, collection, tasks[0], adapter_name=name)

        def switch(task: str, collection: Any = collection, name: str = name) -> None:
            rmm.runtimes.peft.switch(ours, collection, task, adapter_name=name)

        group.contenders[f"rmm {kind}, from file"] = switch
    cache = rmm.TaskCache(collections["exact"])
    group.contenders["rmm, kept"] = lambda task: rmm.runtimes.peft.switch(
        ours, cache, task, adapter_name="k0"
    )

    theirs = PeftModel.from_pretrained(make(), str(root / tasks[0])).eval()
    state = {"name": "default", "n": 0}

    def load_adapter(task: str) -> None:
        state["n"] += 1
        name = f"a{state['n']}"
        theirs.load_adapter(str(root / task), adapter_name=name)
        theirs.set_adapter(name)
        theirs.delete_adapter(state["name"])
        state["name"] = name

    group.contenders["PEFT load_adapter + delete"] = load_adapter
    many = PeftModel.from_pretrained(make(), str(root / tasks[0]), tasks[0]).eval()
    for task in tasks[1:]:
        many.load_adapter(str(root / task), adapter_name=task)
    group.contenders["PEFT set_adapter (all in memory)"] = many.set_adapter

    by_hand = PeftModel.from_pretrained(make(), str(root / tasks[0])).eval()
    live = {
        key.replace(".modules_to_save.default.", ".").replace(".default.", "."): value
        for key, value in by_hand.named_parameters()
        if ".default." in key
    }

    def copy(task: str) -> None:
        with torch.no_grad():
            for key, value in load_file(root / task / "adapter_model.safetensors").items():
                live[key].copy_(value)

    group.contenders["safetensors load + copy_"] = copy
    group.rivals = {"PEFT load_adapter + delete": 10, "safetensors load + copy_": 1}
    return group


def onnx_group(root: Path, collections: dict[str, rmm.Collection], threads: int) -> Group:
    """ONNX Runtime: a switch and one run of one row, for either side alike."""
    import numpy as np
    import onnxruntime as ort

    onnx = rmm.runtimes.onnx
    group = Group("ONNX Runtime (each with one run of one row, which switches on first use)")
    base = models.write_onnx(root / "base.onnx")
    onnx.prepare(base, root / "prepared.onnx", collection=collections["exact"])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    feeds = {"x": np.ones((1, models.WIDTH), np.float32)}
    for kind, collection in collections.items():
        session = onnx.Session(
            root / "prepared.onnx", collection, session_options=options, budget_bytes=0
        )
        group.contenders[f"rmm {kind}, from file"] = lambda task, s=session: s.run(task, feeds)
    # Room for two: no task is still there when its turn comes again.
    foreseen = onnx.Session(
        root / "prepared.onnx", collections["exact"], session_options=options, budget_bytes=10 << 20
    )
    group.before["rmm exact, foreseen"] = lambda task: evaluate(foreseen.prefetch(task))
    group.contenders["rmm exact, foreseen"] = lambda task: foreseen.run(task, feeds)
    kept = onnx.Session(root / "prepared.onnx", collections["exact"], session_options=options)
    group.contenders["rmm, kept"] = lambda task: kept.run(task, feeds)
    group.contenders["no switch: the base model"] = lambda _: kept.run(None, feeds)

    paths = {}
    for task in collections["exact"].tasks:
        with onnx.adapter_file(collections["exact"], task, root / "prepared.onnx") as path:
            paths[task] = shutil.copy(path, root / f"{task}.onnx_adapter")
    session = ort.InferenceSession(
        str(root / "prepared.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def load(task: str) -> None:
        adapter = ort.LoraAdapter()
        adapter.Load(str(paths[task]))
        run_options = ort.RunOptions()
        run_options.add_active_adapter(adapter)
        session.run(None, feeds, run_options)

    group.contenders["LoraAdapter.Load (mapped file)"] = load
    group.rivals = {"LoraAdapter.Load (mapped file)": 1}
    return group


def evaluate(_: object) -> None:
    """Stand in for the evaluation of another task."""
    time.sleep(0.02)


def llama_group(root: Path, collections: dict[str, rmm.Collection], threads: int) -> Group:
    """llama.cpp, without evaluating anything."""
    import ctypes

    import llama_cpp

    runtime = rmm.runtimes.llamacpp
    group = Group("llama.cpp")
    base = models.write_gguf(root / "base.gguf")

    def llama() -> Any:
        return llama_cpp.Llama(str(base), n_ctx=64, n_threads=threads, verbose=False)

    for kind, collection in collections.items():
        adapters = runtime.Adapters(collection, base)
        switch = runtime.Switch(llama(), adapters)
        group.contenders[f"rmm {kind}, from file"] = lambda task, s=switch: s.to(task)
        if kind == "exact":
            for task in collection.tasks:
                with adapters.file(task) as path:
                    shutil.copy(path, root / f"{task}.gguf")
    adapters = runtime.Adapters(collections["exact"], base)
    group.before["rmm exact, foreseen"] = lambda task: evaluate(adapters.prefetch(task))
    group.contenders["rmm exact, foreseen"] = runtime.Switch(llama(), adapters).to
    keeping = runtime.Adapters(collections["exact"], base)
    group.contenders["rmm, kept"] = runtime.Switch(llama(), keeping, budget_bytes=1 << 30).to
    theirs = llama()
    state: dict[str, Any] = {"handle": None}

    def load(task: str) -> None:
        handle = llama_cpp.llama_adapter_lora_init(
            theirs.model, str(root / f"{task}.gguf").encode()
        )
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(handle)
        assert (
            llama_cpp.llama_set_adapters_lora(theirs.ctx, handles, 1, (ctypes.c_float * 1)(1)) == 0
        )
        if state["handle"] is not None:
            llama_cpp.llama_adapter_lora_free(state["handle"])
        state["handle"] = handle
        theirs.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(theirs.ctx), True)

    group.contenders["llama_adapter_lora_init (GGUF file)"] = load
    paths = {task: str(root / f"{task}.gguf").encode() for task in collections["exact"].tasks}
    many = llama()
    loaded = {
        task: llama_cpp.llama_adapter_lora_init(many.model, path) for task, path in paths.items()
    }

    def select(task: str) -> None:
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded[task])
        assert llama_cpp.llama_set_adapters_lora(many.ctx, handles, 1, (ctypes.c_float * 1)(1)) == 0
        many.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(many.ctx), True)

    group.contenders["llama_set_adapters_lora, all in memory"] = select
    group.rivals = {"llama_adapter_lora_init (GGUF file)": 1}
    return group


def collections_of(sources: list[Path], root: Path, stack: ExitStack) -> dict[str, rmm.Collection]:
    """The adapters in every kind of .rmm file."""
    found = {}
    for kind, how in KINDS.items():
        path = root / f"{len(found)}.rmm"
        rmm.convert(sources, path, **how)
        found[kind] = stack.enter_context(rmm.open(path))
        print(f"  {kind}: {path.stat().st_size / 1e6:.2f} MB")
    return found


def machine() -> Iterator[str]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    yield f"{name}, {os.cpu_count()} processors, {platform.system()} {platform.release()}"
    if hasattr(os, "getloadavg"):
        yield f"load average {os.getloadavg()[0]:.1f} before the run"
    wanted = ("numpy", "torch", "peft", "safetensors", "onnxruntime", "llama_cpp_python")
    found = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = [f"{package} {found.get(package, 'not installed')}" for package in wanted]
    yield f"Python {platform.python_version()}, {', '.join(versions)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of the runtimes, not of ours")
    parser.add_argument("--only", choices=("peft", "onnx", "llamacpp", "encoder"), action="append")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for line in machine():
        print(line)
    print(f"python {' '.join(sys.argv)}")
    makers = {"peft": torch_group, "onnx": onnx_group, "llamacpp": llama_group}
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    results = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory("-rmm", "switch", memory)))
        collections: dict[str, rmm.Collection] = {}
        for name in arguments.only or [*makers, "encoder"]:
            try:
                if name == "encoder":
                    sources = models.copy_demo_adapters(root / "demo")
                    print(f"\n{len(sources)} demo adapters")
                    demo = collections_of(sources, root / "demo", stack)
                    group = torch_group(root / "demo", demo, arguments.threads, models.encoder)
                    group.title = "PEFT (torch), the real encoder with the demo adapters"
                else:
                    if not collections:
                        sources = models.write_adapters(root, arguments.tasks)
                        print(f"\n{len(sources)} adapters of BERT-base size")
                        collections = collections_of(sources, root, stack)
                    group = makers[name](root, collections, arguments.threads)
            except ImportError as error:
                print(f"\n{name}: not there ({error})")
                continue
            gc.collect()
            gc.freeze()
            tasks = tuple(source.name for source in sources)
            group.measure(tasks, arguments.rounds)
            results.append(group.report())
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
