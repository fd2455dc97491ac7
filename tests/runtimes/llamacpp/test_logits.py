"""llama.cpp computes with a task of a collection what PEFT computes with the original adapter."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
import threading

import llama_cpp
import numpy as np
import pytest

from rmmformat.converters import Options, get_exporter, get_importer
from rmmformat.errors import NotFoundError, RmmError, UnsupportedError
from rmmformat.runtimes.llamacpp import Adapters, Switch, adapter_file

CLOSE = 1e-5  # absolute, of logits that are of the order of 1


def far(one, two):
    return float(np.abs(one - two).max())


def test_llamacpp_and_transformers_agree_on_the_base(world):
    llama = world.llama()
    assert far(world.logits(llama), world.want[None]) < CLOSE
    assert 0.5 < world.want[None].std() < 5


def test_the_tasks_differ(world):
    """Else the tests below could not fail."""
    tasks = [task for task in world.want if task not in (None, "zero")]
    for n, task in enumerate(tasks):
        assert far(world.want[task], world.want[None]) > 0.5
        for other in tasks[:n]:
            assert far(world.want[task], world.want[other]) > 0.5
    assert far(world.want["zero"], world.want[None]) < CLOSE


def test_every_task_and_ten_switches_back_and_forth(world, collection):
    llama = world.llama()
    order = [*collection.tasks, None]
    order += [None if n == 5 else collection.tasks[-n] for n in (1, 3, 1, 2, 5, 4, 3, 4, 1, 2)]
    with Adapters(collection, world.base) as adapters, Switch(llama, adapters) as switch:
        for task in order:
            switch.to(task)
            assert far(world.logits(llama), world.want[task]) < CLOSE, task
    assert far(world.logits(llama), world.want[None]) < CLOSE  # the switch leaves the base


def test_path_for_the_constructor(world, collection):
    with adapter_file(collection, "rslora", world.base) as path:
        llama = world.llama(lora_path=path)
    assert far(world.logits(llama), world.want["rslora"]) < CLOSE


def test_path_for_the_low_level_functions(world, collection):
    llama = world.llama()
    with Adapters(collection, world.base) as adapters, adapters.file("patterns") as path:
        assert path.startswith("/proc/self/fd/")
        handle = llama_cpp.llama_adapter_lora_init(llama.model, path.encode())
    assert handle
    # The file is gone, and llama.cpp has what it needs.
    handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(handle)
    assert not llama_cpp.llama_set_adapters_lora(llama.ctx, handles, 1, (ctypes.c_float * 1)(1.0))
    assert far(world.logits(llama), world.want["patterns"]) < CLOSE


def test_path_for_another_process(world, collection):
    program = textwrap.dedent("""
        import sys, llama_cpp
        llama = llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False, lora_path=sys.argv[2])
        print("loaded")
    """)
    with adapter_file(collection, "plain", world.base) as path:
        assert path.shared != path
        done = subprocess.run(
            [sys.executable, "-c", program, str(world.base), path.shared],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stdout.split() == ["loaded"], done.stderr


def test_temporary_file_where_there_is_no_memory_file(world, collection, monkeypatch, tmp_path):
    import os
    import tempfile

    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    llama = world.llama()
    with Adapters(collection, world.base) as adapters, Switch(llama, adapters) as switch:
        for task in ("plain", "zero", "plain"):
            switch.to(task)
            assert far(world.logits(llama), world.want[task]) < CLOSE
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_several_threads(world, collection):
    """Each thread has a context of its own, and all of them one set of adapters."""
    wrong, seen = [], []

    def serve(seed, adapters):
        llama = world.llama()
        with Switch(llama, adapters) as switch:
            for task in (collection.tasks * 2)[seed : seed + 6]:
                switch.to(task)
                if far(world.logits(llama), world.want[task]) >= CLOSE:
                    wrong.append(task)
                seen.append(task)

    with Adapters(collection, world.base) as adapters:
        threads = [threading.Thread(target=serve, args=(n, adapters)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(seen) == 18


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(None, CLOSE), ("f32", CLOSE), ("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.25)],
)
def test_exported_files(world, collection, tmp_path, dtype, close):
    for task in collection.tasks:
        out = tmp_path / f"{task}.gguf"
        options = Options(base=world.base, dtype=dtype)
        get_exporter("gguf").export(collection.source(task), out, options=options)
        llama = world.llama(lora_path=str(out))
        assert far(world.logits(llama), world.want[task]) < close, task


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_memory_files_are_the_exported_files(world, collection, tmp_path, dtype):
    """Value by value, whatever the way: types, folds, orders, alphas."""
    import gguf

    for task in collection.tasks:
        out = tmp_path / f"{task}-{dtype}.gguf"
        options = Options(base=world.base, dtype=dtype)
        get_exporter("gguf").export(collection.source(task), out, options=options)
        with adapter_file(collection, task, world.base, dtype=dtype) as path:
            one, two = gguf.GGUFReader(out), gguf.GGUFReader(path)
            assert [t.name for t in one.tensors] == [t.name for t in two.tensors]
            for a, b in zip(one.tensors, two.tensors, strict=True):
                assert a.tensor_type == b.tensor_type
                np.testing.assert_array_equal(a.data, b.data)
            alphas = [r.get_field("adapter.lora.alpha").contents() for r in (one, two)]
            assert alphas[0] == alphas[1]


def test_export_import_export(world, collection, tmp_path):
    """An adapter that went through llama.cpp's format is a source like any other."""
    import rmmformat

    out = tmp_path / "patterns.gguf"
    get_exporter("gguf").export(
        collection.source("patterns"), out, options=Options(base=world.base)
    )
    (task,) = get_importer("gguf").open(out)
    rmmformat.convert([out], tmp_path / "back.rmm", exact=True)
    with rmmformat.open(tmp_path / "back.rmm") as back, Adapters(back) as adapters:
        assert set(back.targets("patterns")) == set(task.targets)
        llama = world.llama()
        with Switch(llama, adapters) as switch:
            switch.to("patterns")
            assert far(world.logits(llama), world.want["patterns"]) < CLOSE


def test_without_the_rotary_order_it_would_be_wrong(world, collection, tmp_path):
    """What the permutation is for: the same file with plain rows computes something else."""
    import gguf

    out = tmp_path / "task.gguf"
    get_exporter("gguf").export(collection.source("plain"), out, options=Options(base=world.base))
    (task,) = get_importer("gguf").open(out)
    raw = bytearray(out.read_bytes())
    for tensor in gguf.GGUFReader(out).tensors:
        if tensor.name == "blk.0.attn_q.weight.lora_b":
            plain = task.factors("model.layers.0.self_attn.q_proj").B.tobytes()
            raw[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = plain
    out.write_bytes(raw)
    llama = world.llama(lora_path=str(out))
    assert far(world.logits(llama), world.want["plain"]) > 0.05


def test_task_that_is_not_there_leaves_the_one_that_is(world, collection):
    llama = world.llama()
    with Adapters(collection, world.base) as adapters, Switch(llama, adapters) as switch:
        switch.to("plain")
        with pytest.raises(NotFoundError, match="plian"):
            switch.to("plian")
        assert switch.task == "plain"
        assert far(world.logits(llama), world.want["plain"]) < CLOSE


def test_adapter_of_another_model_is_refused(world, collection, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    llama = world.llama()
    with (
        Adapters(collection, tmp_path) as adapters,
        Switch(llama, adapters) as switch,
        pytest.raises(RmmError, match="does not take task 'plain'"),
    ):
        switch.to("plain")
    with Adapters(collection) as adapters, pytest.raises(UnsupportedError, match="--base"):
        adapters.plan("plain")
