"""Files in memory that still hold a task are lent again as they are."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rmmformat
from rmmformat.errors import OptionError, RmmError
from rmmformat.runtimes.llamacpp import Adapters, Switch


@pytest.fixture
def alike(world, tmp_path):
    """Three tasks of one layout, with different values."""
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for n, folder in enumerate(folders):
        shutil.copytree(world.root / "adapters" / "plain", folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        changed = {key: value + np.float32(0.25 * n) for key, value in tensors.items()}
        save_file(changed, folder / "adapter_model.safetensors")
    rmmformat.convert(folders, tmp_path / "alike.rmm", exact=True)
    with rmmformat.open(tmp_path / "alike.rmm") as collection:
        yield collection


@pytest.fixture
def loads(alike, monkeypatch):
    """Tasks that were reconstructed, in order."""
    done = []
    load = alike.load_into

    def counting(task, out, **options):
        done.append(task)
        load(task, out, **options)

    monkeypatch.setattr(alike, "load_into", counting)
    return done


def content(adapters, task):
    with adapters.file(task) as path:
        return Path(path).read_bytes()


@pytest.fixture
def want(world, alike):
    found = {}
    for task in alike.tasks:
        with Adapters(alike, world.base, keep=0) as adapters:
            found[task] = content(adapters, task)
    assert len(set(found.values())) == 3
    return found


def test_a_task_is_reconstructed_once_while_its_file_is_there(world, alike, want, loads):
    with Adapters(alike, world.base, keep=2) as adapters:
        assert adapters.plan("one").layout is adapters.plan("two").layout
        for task in ("one", "two", "one", "two", "two", "one"):
            assert content(adapters, task) == want[task]
        assert loads == ["one", "two"]
        assert (
            content(adapters, "three") == want["three"]
        )  # in the file of "two", used before "one"
        assert content(adapters, "one") == want["one"]
        assert loads == ["one", "two", "three"]
        assert content(adapters, "two") == want["two"]
        assert loads == ["one", "two", "three", "two"]


def test_files_that_are_lent_at_once_are_different_ones(world, alike, want, loads):
    with (
        Adapters(alike, world.base) as adapters,
        adapters.file("one") as first,
        adapters.file("one") as second,
    ):
        assert first != second
        assert Path(first).read_bytes() == Path(second).read_bytes() == want["one"]
    assert loads == ["one", "one"]


def test_a_file_that_could_not_be_filled_holds_no_task(world, alike, want, monkeypatch):
    with Adapters(alike, world.base, keep=1) as adapters:
        assert content(adapters, "one") == want["one"]
        load = alike.load_into

        def broken(task, out, **options):
            load(task, out, **options)
            out[:] = 0xFF
            raise RmmError("cannot decode")

        monkeypatch.setattr(alike, "load_into", broken)
        with pytest.raises(RmmError, match="decode"):
            content(adapters, "two")
        monkeypatch.setattr(alike, "load_into", load)
        assert content(adapters, "one") == want["one"]
        assert content(adapters, "two") == want["two"]


@pytest.fixture
def reads(monkeypatch):
    """How many adapters llama.cpp has read, by the way that it was given them."""
    import llama_cpp

    counts = {"llama_adapter_lora_init": 0, "llama_adapter_lora_init_from_file_ptr": 0}

    def counting(name, real):
        def init(model, source):
            counts[name] += 1
            return real(model, source)

        return init

    for name in counts:
        monkeypatch.setattr(llama_cpp, name, counting(name, getattr(llama_cpp, name)))
    return counts


def until(condition):
    """Wait until something holds, but not for ever; say whether it does."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def logits_by_task(world, switch, llama, tasks):
    found = []
    for task in tasks:
        switch.to(task)
        found.append(world.logits(llama))
    return found


def test_tasks_stay_in_llamacpp_under_a_budget(world, alike, loads, reads):
    llama = world.llama()
    with Adapters(alike, world.base, keep=0) as adapters:
        with Switch(llama, adapters) as switch:
            found = logits_by_task(world, switch, llama, alike.tasks)
        want = dict(zip(alike.tasks, found, strict=True))
        size = len(content(adapters, "one"))
        loads.clear()
        order = ("one", "two", "one", "two", "three", "two", "one")
        # Room for one beside that which is on.
        with Switch(llama, adapters, budget_bytes=size) as switch:
            found = logits_by_task(world, switch, llama, order)
            assert loads == ["one", "two", "three", "one"]
            switch.to(None)
            assert len(switch._loaded) == 1
        assert not switch._loaded
    assert reads == {"llama_adapter_lora_init": 0, "llama_adapter_lora_init_from_file_ptr": 7}
    for task, logits in zip(order, found, strict=True):
        assert np.array_equal(logits, want[task])
    assert not np.array_equal(want["one"], want["three"])
    with pytest.raises(OptionError, match="budget"):
        Switch(llama, adapters, budget_bytes=-1)


def test_path_where_llamacpp_takes_no_stream(world, alike, monkeypatch):
    import llama_cpp

    llama = world.llama()
    with Adapters(alike, world.base) as adapters, Switch(llama, adapters) as switch:
        want = logits_by_task(world, switch, llama, ["one", "two"])
        monkeypatch.delattr(llama_cpp, "llama_adapter_lora_init_from_file_ptr")
        found = logits_by_task(world, switch, llama, ["one", "two"])
    for logits, expected in zip(found, want, strict=True):
        assert np.array_equal(logits, expected)


def test_the_next_task_is_reconstructed_meanwhile(world, alike, loads):
    llama = world.llama()
    with Adapters(alike, world.base) as adapters, Switch(llama, adapters) as switch:
        (want,) = logits_by_task(world, switch, llama, ["three"])
        switch.to("one", next="two")
        assert until(lambda: loads == ["three", "one", "two"])
        switch.to("two", next="three")
        assert until(lambda: len(loads) == 4)  # its file has been used again for "two"
        switch.to("three")
        assert np.array_equal(world.logits(llama), want)
    assert loads == ["three", "one", "two", "three"]
