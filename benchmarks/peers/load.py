"""A task into memory, and another task into a runtime.

Loading ends with all factors of one task as arrays.  safetensors maps its file and reads nothing
until somebody looks, so the second pair of columns also adds up all values: what any use of them
costs beyond having them.  Switching is benchmarks/switch.py, with vlora's own model beside.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import switch
import switch_models as models
import vlora_ways
from measure import available, take_turns
from report import Column, Table
from setting import Setting

import rmmformat as rmm

COMPONENTS = 3


def tables(setting: Setting) -> list[Table]:
    found = []
    with ExitStack() as stack:
        root = setting.folder("load")
        # The quick run has the encoder's adapters; as a folder of the other name, they are alike.
        sources = (
            models.copy_demo_adapters(root) if setting.quick else models.write_adapters(root, 8)
        )
        collections = switch.collections_of(sources, root, stack)
        what = "a demo adapter" if setting.quick else "an adapter of BERT-base size, 4.7 MB"
        found.append(loading(sources, root, collections, what, setting.rounds))
        found += [attempt(make) for make in groups(setting, root, collections, stack)]
    return found


def loading(
    sources: list[Path],
    root: Path,
    collections: dict[str, rmm.Collection],
    what: str,
    rounds: int,
) -> Table:
    from safetensors.numpy import load_file

    state = {"n": 0}

    def task() -> Path:
        state["n"] += 1
        return sources[state["n"] % len(sources)]

    def open_and_load(path: str) -> Any:
        with rmm.open(path) as collection:
            loaded = collection.load(task().name)
        return [array for name in loaded for array in (loaded[name].A, loaded[name].B)]

    def load(collection: rmm.Collection) -> Any:
        loaded = collection.load(task().name)
        return [array for name in loaded for array in (loaded[name].A, loaded[name].B)]

    ways: dict[str, Callable[[], Any]] = {}
    for kind, collection in collections.items():
        path = collection.path
        ways[f"rmm {kind}: open, load"] = lambda path=path: open_and_load(path)
        ways[f"rmm {kind}: load"] = lambda collection=collection: load(collection)
    name = "adapter_model.safetensors"
    ways["safetensors.numpy.load_file"] = lambda: list(load_file(task() / name).values())
    if available("torch"):
        from safetensors.torch import load_file as load_tensors

        ways["safetensors.torch.load_file"] = lambda: list(load_tensors(task() / name).values())
    if available("vlora"):
        from vlora import SharedSubspace

        folder = root / "subspace"
        kept = vlora_ways.WAYS["vlora compress, k = 3"](sources, folder)

        def parts(subspace: Any) -> Any:
            weights = subspace.reconstruct(task().name)
            return [*weights.lora_a.values(), *weights.lora_b.values()]

        ways["vlora k = 3: load, reconstruct"] = lambda: parts(SharedSubspace.load(folder))
        ways["vlora k = 3: reconstruct"] = lambda: parts(kept)

    def used(way: Callable[[], Any]) -> float:
        return sum(float(array.sum()) for array in way())

    both = {
        **{("had", name): way for name, way in ways.items()},
        **{("used", name): (lambda way=way: used(way)) for name, way in ways.items()},
    }
    timings = take_turns(both, rounds, warm=2)  # type: ignore[arg-type, type-var]
    table = Table(
        "load",
        f"Load one task: {what}, milliseconds",
        "way",
        (
            Column("had", "in hand"),
            Column("had_cpu", "CPU"),
            Column("used", "and read once"),
            Column("used_cpu", "CPU"),
        ),
    )
    for (what_for, name), timing in timings.items():  # type: ignore[misc]
        table.put(name, **{what_for: 1e3 * timing.clock, f"{what_for}_cpu": 1e3 * timing.cpu})
    if not available("torch"):
        table.notes.append("torch is not installed.")
    if not available("vlora"):
        table.notes.append("vlora is not installed.")
    return table


def groups(
    setting: Setting, root: Path, collections: dict[str, rmm.Collection], stack: ExitStack
) -> Iterator[Callable[[], Table]]:
    """The runtimes, one at a time, so that memory of one is free for the next."""

    def peft() -> Table:
        group = switch.torch_group(root, collections, 1)
        add_vlora(group, root, collections)
        return switching("switch-peft", group, collections, setting.rounds)

    def onnx() -> Table:
        group = switch.onnx_group(root, collections, 1)
        return switching("switch-onnx", group, collections, setting.rounds)

    def llamacpp() -> Table:
        group = switch.llama_group(root, collections, 1)
        return switching("switch-llamacpp", group, collections, setting.rounds)

    def encoder() -> Table:
        folder = setting.folder("encoder")
        sources = models.copy_demo_adapters(folder)
        demo = switch.collections_of(sources, folder, stack)
        group = switch.torch_group(folder, demo, 1, models.encoder)
        group.title = "PEFT, the demo adapters on their encoder"
        return switching("switch-encoder", group, demo, setting.rounds)

    yield from (encoder,) if setting.quick else (peft, encoder, onnx, llamacpp)


def add_vlora(group: Any, root: Path, collections: dict[str, rmm.Collection]) -> None:
    """Its model, which keeps the products of one task at a time."""
    if not available("vlora"):
        return
    from vlora import SharedSubspace, VLoRAModel

    model = VLoRAModel(models.torch_model(), SharedSubspace.load(root / "subspace"), scaling=2.0)
    assert set(model.available_tasks) == set(next(iter(collections.values())).tasks)
    group.contenders["vlora VLoRAModel.set_task, k = 3"] = model.set_task


def switching(name: str, group: Any, collections: dict[str, rmm.Collection], rounds: int) -> Table:
    tasks = next(iter(collections.values())).tasks
    group.measure(tasks, rounds)
    table = Table(
        name,
        f"Switch: {group.title}, milliseconds, one thread",
        "way",
        (Column("clock", "clock"), Column("cpu", "CPU"), Column("ratio", "CPU, times ours")),
    )
    for way, times in group.times.items():
        table.put(
            way,
            clock=1e3 * statistics.median(times),
            cpu=1e3 * statistics.median(group.cpu_times[way]),
        )
    table.compare("rmm exact, from file", "cpu")
    return table


def attempt(make: Callable[[], Table]) -> Table:
    """A table, or one that says which package is not there."""
    try:
        return make()
    except ImportError as error:
        table = Table(f"switch-{make.__name__}", f"Switch: {make.__name__}", "way", ())
        table.notes.append(f"Left out: {error}.")
        return table
