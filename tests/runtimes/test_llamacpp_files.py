"""Adapter files in memory, without llama.cpp: they are the exported file, whoever asks and when.

That llama.cpp computes the right thing with them is in ``llamacpp/``.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

import rmmformat
from rmmformat.converters import Options, get_exporter
from rmmformat.errors import (
    LossyConversionError,
    NotFoundError,
    OptionError,
    RmmError,
    SourceError,
    UnsupportedError,
)
from rmmformat.runtimes._memory_file import MemoryFile
from rmmformat.runtimes.llamacpp import Adapters, adapter_file

HEADS, KV_HEADS, WIDTH, VOCABULARY = 4, 2, 32, 64
SIDES = {
    "model.layers.0.self_attn.q_proj": (WIDTH, WIDTH),
    "model.layers.0.self_attn.k_proj": (WIDTH, WIDTH // 2),
    "model.layers.0.mlp.up_proj": (WIDTH, 80),
    "model.embed_tokens": (VOCABULARY, WIDTH),
    "lm_head": (WIDTH, VOCABULARY),
}
TASKS = {  # rank, dtype, config
    "plain": (4, np.float32, {}),
    "other": (4, np.float32, {}),  # of the layout of "plain"
    "half": (4, np.float16, {}),
    "powers": (4, np.float16, {"alpha_pattern": {"q_proj": 16, "embed_tokens": 2}}),
    "folded": (5, np.float16, {"alpha_pattern": {"q_proj": 3, "lm_head": 7}}),
    "zero": (3, np.float32, {"lora_alpha": 0}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for seed, (task, (rank, dtype, config)) in enumerate(TASKS.items()):
        random = np.random.default_rng(seed)
        tensors = {}
        for module, (n_in, n_out) in SIDES.items():
            names = ("lora_A.weight", "lora_B.weight")
            if module == "model.embed_tokens":
                names = ("lora_embedding_A", "lora_embedding_B")
            for name, shape in zip(names, ((rank, n_in), (n_out, rank)), strict=True):
                values = random.standard_normal(shape).astype(dtype)
                tensors[f"base_model.model.{module}.{name}"] = values
        folder = root / "adapters" / task
        folder.mkdir(parents=True)
        modules = sorted({module.rpartition(".")[2] for module in SIDES})
        fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": modules}
        (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
        save_file(tensors, folder / "adapter_model.safetensors")
    rmmformat.convert([root / "adapters"], root / "tasks.rmm", exact=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
    }
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def collection(root):
    with rmmformat.open(root / "tasks.rmm") as opened:
        yield opened


def content(path):
    """Alpha, and every tensor with its type."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, t.data.copy()) for t in reader.tensors}
    return reader.get_field("adapter.lora.alpha").contents(), tensors


def same(one, two):
    return one[0] == two[0] and all(
        one[1][name][0] == two[1][name][0] and np.array_equal(one[1][name][1], two[1][name][1])
        for name in one[1].keys() | two[1].keys()
    )


def exported(collection, task, root, tmp_path, dtype):
    out = tmp_path / f"{task}.gguf"
    options = Options(base=root, dtype=dtype)
    get_exporter("gguf").export(collection.source(task), out, options=options, force=True)
    return content(out)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_memory_files_are_the_exported_files(root, collection, tmp_path, dtype):
    with Adapters(collection, root, dtype=dtype) as adapters:
        # Twice over, so that each file is also filled again after another task.
        for task in (*collection.tasks, *reversed(collection.tasks)):
            with adapters.file(task) as path:
                assert same(content(path), exported(collection, task, root, tmp_path, dtype)), task


def test_type_is_the_tasks_own_unless_a_fold_would_round(root, collection):
    with Adapters(collection, root) as adapters:
        types = {}
        for task in collection.tasks:
            with adapters.file(task) as path:
                (types[task],) = {kind for kind, _ in content(path)[1].values()}
    assert types == {
        **dict.fromkeys(("plain", "other", "zero", "folded"), "F32"),
        **dict.fromkeys(("half", "powers"), "F16"),
    }


def test_header_of_a_layout_is_written_once(root, collection, monkeypatch):
    from rmmformat.runtimes import llamacpp_file

    written = []
    header = llamacpp_file.header
    monkeypatch.setattr(
        llamacpp_file, "header", lambda layout: written.append(layout) or header(layout)
    )
    with Adapters(collection, root, keep=1) as adapters:
        for task in ("plain", "other", "plain", "half", "other"):
            with adapters.file(task) as path:
                assert Path(path).read_bytes()[:4] == b"GGUF"
    assert len(written) == 2


def test_files_that_are_open_at_once_do_not_meet(root, collection, tmp_path):
    want = {task: exported(collection, task, root, tmp_path, None) for task in ("plain", "other")}
    with Adapters(collection, root) as adapters:
        with adapters.file("plain") as one, adapters.file("other") as two:
            assert one != two
            assert same(content(one), want["plain"])
            assert same(content(two), want["other"])
        assert not Path(one).exists() or not same(content(one), want["other"])


class Slow:
    """Stands in for a collection's load_into: a test lets it go on, or makes it fail."""

    def __init__(self, collection, monkeypatch):
        self.tasks, self.threads = [], []
        self.begun, self.go = threading.Event(), threading.Event()
        self.error = None
        self._real = collection.load_into
        monkeypatch.setattr(collection, "load_into", self)

    def __call__(self, task, out, **options):
        self.tasks.append(task)
        self.threads.append(threading.current_thread().name)
        self.begun.set()
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        self._real(task, out, **options)


def test_a_task_is_reconstructed_ahead(root, collection, tmp_path, monkeypatch):
    want = exported(collection, "other", root, tmp_path, None)
    slow = Slow(collection, monkeypatch)
    with Adapters(collection, root) as adapters:
        adapters.prefetch("other")
        adapters.prefetch("other")
        assert slow.begun.wait(30)
        threading.Timer(0.05, slow.go.set).start()
        with adapters.file("other") as path:  # waits for what has begun
            assert same(content(path), want)
        with adapters.file("other") as path:
            assert same(content(path), want)
    assert slow.tasks == ["other"]
    assert slow.threads[0].startswith("rmm-ahead")


def test_what_was_not_begun_ahead_is_not_waited_for(root, collection, monkeypatch):
    slow = Slow(collection, monkeypatch)
    with Adapters(collection, root) as adapters:
        adapters.plan("other")
        adapters.prefetch("plain")
        assert slow.begun.wait(30)
        adapters.prefetch("other")
        slow.go.set()
        with adapters.file("other") as path:
            assert Path(path).read_bytes()[:4] == b"GGUF"
        with adapters.file("plain"):
            pass
    assert sorted(slow.tasks) == ["other", "plain"]


def test_failure_ahead_is_told_when_the_task_is_wanted(root, collection, monkeypatch):
    slow = Slow(collection, monkeypatch)
    slow.go.set()
    slow.error = RmmError("cannot decode")
    with Adapters(collection, root) as adapters:
        adapters.prefetch("plain")
        adapters.prefetch("no such task")
        with pytest.raises(RmmError, match="cannot decode"), adapters.file("plain"):
            pass
        with pytest.raises(NotFoundError, match="no such"), adapters.file("no such task"):
            pass
        slow.error = None
        with adapters.file("plain") as path:
            assert content(path)[0] == 8.0


def test_threads_share_one_set_of_adapters(root, collection, tmp_path):
    want = {task: exported(collection, task, root, tmp_path, "f32") for task in collection.tasks}
    wrong, done = [], []

    def serve(start, adapters):
        for n in range(12):
            task = collection.tasks[(start + n * 5) % len(collection.tasks)]
            with adapters.file(task) as path:
                if not same(content(path), want[task]):
                    wrong.append(task)
            done.append(task)

    with Adapters(collection, root, dtype="f32", keep=1) as adapters:
        threads = [threading.Thread(target=serve, args=(n, adapters)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(done) == 48


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_nothing_is_left_open(root, collection):
    with adapter_file(collection, "plain", root):
        pass
    gc.collect()  # what earlier tests left behind
    before = descriptors()
    for task in collection.tasks:
        with adapter_file(collection, task, root) as path:
            assert path.startswith("/proc/self/fd/")
            assert path.shared == path.replace("self", str(os.getpid()))
    forgotten = Adapters(collection, root)
    with forgotten.file("plain"):
        pass
    del forgotten
    gc.collect()
    assert descriptors() == before


def test_temporary_file_where_there_is_no_memory_file(root, collection, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Adapters(collection, root) as adapters:
        with adapters.file("plain") as path:
            assert Path(path).parent == tmp_path
            assert path.shared == path
            assert content(path)[0] == 8.0
        assert list(tmp_path.iterdir())  # kept for the next task
    assert not list(tmp_path.iterdir())


def test_memory_without_proc_is_not_used(monkeypatch, tmp_path):
    exists = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda self: exists(self) and not str(self).startswith("/proc")
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = MemoryFile(100)
    file.bytes[:] = 7
    assert Path(file.path).read_bytes() == b"\7" * 100
    file.close()
    file.close()
    assert not list(tmp_path.iterdir())
    assert file.bytes[99] == 7


def test_what_is_refused(root, collection, tmp_path):
    with (
        Adapters(collection, root) as adapters,
        pytest.raises(NotFoundError, match="plian"),
        adapters.file("plian"),
    ):
        pass
    with pytest.raises(RmmError, match="closed"), adapters.file("plain"):
        pass
    with pytest.raises(OptionError, match="q8_0"):
        Adapters(collection, root, dtype="q8_0")
    with pytest.raises(SourceError, match="--base"):
        Adapters(collection, root / "nothing")
    with Adapters(collection) as adapters, pytest.raises(UnsupportedError, match="--base"):
        adapters.plan("plain")


def test_private_tensors_are_dropped_only_on_request(demo_adapters, tmp_path):
    rmmformat.convert([demo_adapters / "spam"], tmp_path / "demo.rmm", exact=True)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with rmmformat.open(tmp_path / "demo.rmm") as collection:
        with pytest.raises(LossyConversionError, match="--drop-private"):
            Adapters(collection, tmp_path).plan("spam")
        with adapter_file(collection, "spam", tmp_path, drop_private=True) as path:
            assert len(content(path)[1]) == 2 * len(collection.targets("spam"))


def test_value_too_large_for_the_type(root, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    a, b = np.ones((2, 8), np.float32), np.full((8, 2), 1e6, np.float32)
    module = "base_model.model.model.layers.0.mlp.up_proj"
    save_file(
        {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    rmmformat.convert([folder], tmp_path / "large.rmm", exact=True)
    with rmmformat.open(tmp_path / "large.rmm") as collection:
        with (
            pytest.raises(LossyConversionError, match="too large for f16"),
            adapter_file(collection, "large", root, dtype="f16"),
        ):
            pass
        with adapter_file(collection, "large", root, dtype="bf16") as path:
            assert len(content(path)[1]) == 2
