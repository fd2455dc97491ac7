"""Files in memory that still hold a task are lent again as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rmmformat
from rmmformat.errors import RmmError
from rmmformat.runtimes.llamacpp import Adapters


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
    load = alike.load

    def counting(task, **options):
        done.append(task)
        return load(task, **options)

    monkeypatch.setattr(alike, "load", counting)
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
        load = alike.load

        def broken(task, *, out, **options):
            load(task, out=out, **options)
            out[:] = 0xFF
            raise RmmError("cannot decode")

        monkeypatch.setattr(alike, "load", broken)
        with pytest.raises(RmmError, match="decode"):
            content(adapters, "two")
        monkeypatch.setattr(alike, "load", load)
        assert content(adapters, "one") == want["one"]
        assert content(adapters, "two") == want["two"]
