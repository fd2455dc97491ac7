"""Names are data: whatever tasks and tensors are called, exports stay where they were asked for."""

from __future__ import annotations

import json
import os
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import rmmformat as rmm
from rmmformat.converters.base import Options
from rmmformat.converters.registry import formats, get_exporter, get_importer
from rmmformat.errors import LossyConversionError, RmmError
from rmmformat.model import Factors

from ..product.conftest import MemoryTask

NAMES = [
    "../outside", "../../outside", "/var/rmm-outside", "a/../../b", "..", ".", "~/x", "C:\\x",
    "..\\outside", "\\\\server\\share", "CON", "nul.txt", "COM1", "x" * 300, "-rf", "$(touch x)",
    "a\u202etxt.exe", "x.", " x", "x:stream", "%2e%2e%2fx", "caf\u00e9",
    unicodedata.normalize("NFD", "caf\u00e9"), "SKILL", "skill", "\uff33kill",
]  # fmt: skip

DEMO = Path(__file__).parents[1] / "data" / "demo-adapters"


def task_called(name: str, value: float = 1.0) -> MemoryTask:
    """A task whose targets and private tensors have such names, too."""
    A, B = np.full((1, 8), value, np.float32), np.full((4, 1), value, np.float32)
    inner = "model.layers.0.self_attn.v_proj"
    return MemoryTask(
        name, {inner: Factors(A, B, 1.0)}, privates={f"{name}.weight": np.ones(3, np.float32)}
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


EXPORTERS = [row.name for row in formats() if row.exporter is not None and row.available]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_exports_stay_in_their_folder(exporter: str, tmp_path: Path) -> None:
    work = tmp_path / "deep" / "in" / "here"
    work.mkdir(parents=True)
    base = tmp_path / "base"
    base.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    (base / "config.json").write_text(json.dumps(config))
    outside = tree(tmp_path)
    collection = tmp_path / "x.rmm"
    rmm.convert([task_called(name) for name in NAMES[:1]], collection, exact=True)
    for name in NAMES[1:]:
        rmm.add(collection, [task_called(name)], exact=True)
    outside |= {"x.rmm": collection.read_bytes()}
    previous = Path.cwd()
    os.chdir(work)
    n_written = 0
    try:
        with rmm.open(collection) as opened:
            assert set(opened.tasks) == set(NAMES)
            for number, name in enumerate(NAMES):
                out = work / f"out{number}"
                before = tree(work)
                options = Options(base=base, drop_private=number % 2 == 1)
                try:
                    get_exporter(exporter).export(opened.source(name), out, options=options)
                    n_written += 1
                except RmmError:
                    assert tree(work) == before
                new = tree(work).keys() - before.keys()
                assert all(path == out.name or path.startswith(f"{out.name}/") for path in new)
                assert not any(path.is_symlink() for path in work.rglob("*"))
    finally:
        os.chdir(previous)
    rest = {k: v for k, v in tree(tmp_path).items() if not k.startswith("deep/in/here/")}
    assert rest == outside
    if exporter in ("peft", "safetensors"):
        assert n_written > len(NAMES) // 2


def test_names_that_look_alike_do_not_take_each_others_place(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    alike = [name for name in NAMES if unicodedata.normalize("NFKC", name).casefold() == "skill"]
    assert len(alike) == 3
    sources = [DEMO / "bbc", DEMO / "spam"]
    with pytest.raises(RmmError, match="differ only in"):
        rmm.convert(dict(zip(alike, sources, strict=False)), path, exact=True)
    assert not path.exists()
    # One at a time they join, and each keeps its own values.
    rmm.convert([task_called(alike[0], 1.0)], path, exact=True)
    for value, name in enumerate(alike[1:], 2):
        rmm.add(path, [task_called(name, value)], exact=True)
    with rmm.open(path) as opened:
        for value, name in enumerate(alike, 1):
            factors = opened.load(name)["model.layers.0.self_attn.v_proj"]
            assert (value == factors.A).all()


POSIX = pytest.mark.skipif(os.name == "nt", reason="pipes, devices and links of POSIX")


@POSIX
@pytest.mark.parametrize("force", [False, True])
def test_nothing_takes_the_place_of_a_device_or_a_pipe(force: bool, tmp_path: Path) -> None:
    pipe, unix = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(unix))
    places = [pipe, unix]
    if os.geteuid() == 0:
        try:
            os.mknod(tmp_path / "device", 0o600 | 0o020000, os.makedev(1, 3))
            places.append(tmp_path / "device")
        except PermissionError:  # in a container
            pass
    kinds = {place: place.lstat().st_mode for place in places}
    source = tmp_path / "x.rmm"
    rmm.convert([task_called("task")], source, exact=True)
    with rmm.open(source) as opened:
        for place in places:
            for exporter in ("safetensors", "peft"):
                with pytest.raises(RmmError):
                    get_exporter(exporter).export(opened.source("task"), place, force=force)
            with pytest.raises((RmmError, LossyConversionError)):
                rmm.convert([task_called("task")], place, exact=True, overwrite=force)
    assert {place: place.lstat().st_mode for place in places} == kinds
    listener.close()


@POSIX
def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    source, victim = tmp_path / "x.rmm", tmp_path / "victim"
    rmm.convert([task_called("task")], source, exact=True)
    victim.write_text("precious")
    home = tmp_path / "home"
    home.mkdir()
    (home / "adapter_config.json").write_text("{}")
    with rmm.open(source) as opened:
        task = opened.source("task")
        link = tmp_path / "link.safetensors"
        link.symlink_to(victim)
        with pytest.raises(RmmError, match="exists already"):
            get_exporter("safetensors").export(task, link)
        get_exporter("safetensors").export(task, link, force=True)
        assert not link.is_symlink()
        # Links within a folder that is replaced lead nowhere.
        out = tmp_path / "out"
        out.mkdir()
        (out / "adapter_config.json").symlink_to(victim)
        (out / "adapter_model.safetensors").symlink_to(home / "none")
        get_exporter("peft").export(task, out, force=True)
        assert not any(path.is_symlink() for path in out.iterdir())
        assert get_importer("peft").open(out)[0].targets.keys() == task.targets.keys()
    link = tmp_path / "link.rmm"
    link.symlink_to(victim)
    rmm.convert([task_called("task")], link, exact=True, overwrite=True)
    assert not link.is_symlink()
    assert victim.read_text() == "precious"
    assert list(home.iterdir()) == [home / "adapter_config.json"]
    assert not (home / "none").exists()
