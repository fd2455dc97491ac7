"""The resolver for vLLM against vLLM's documented interface, which a module here stands in for.

vLLM itself needs a GPU build of torch, which is gigabytes; its interface is small: LoRARequest with
a name, a positive number and a path; LoRAResolver, abstract; a registry of resolvers by name.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import rmmformat as rmm
from rmmformat.errors import NotFoundError, OptionError
from rmmformat.runtimes import vllm as plugin
from rmmformat.runtimes.vllm_folders import Scratch

BASE = "sentence-transformers/all-MiniLM-L6-v2"


@dataclasses.dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError("id must be > 0")
        assert self.lora_path


class LoRAResolver(abc.ABC):
    @abc.abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def get_supported_resolvers(self) -> set[str]:
        return set(self.resolvers)

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        assert isinstance(resolver, LoRAResolver)
        assert resolver_name not in self.resolvers
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A stand-in for vLLM in sys.modules."""
    for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    registry = Registry()
    monkeypatch.setattr(sys.modules["vllm.lora.request"], "LoRARequest", LoRARequest, raising=False)
    resolver = sys.modules["vllm.lora.resolver"]
    monkeypatch.setattr(resolver, "LoRAResolver", LoRAResolver, raising=False)
    monkeypatch.setattr(resolver, "LoRAResolverRegistry", registry, raising=False)
    for name in ("COLLECTION", "CACHE", "DTYPE", "ANY_BASE"):
        monkeypatch.delenv(f"RMM_VLLM_{name}", raising=False)
    return registry


@pytest.fixture
def skills(tmp_path: Path, demo_adapters: Path) -> Path:
    path = tmp_path / "skills.rmm"
    sources = {name: demo_adapters / name for name in ("imdb", "spam")}
    sources["../../etc/passwd"] = demo_adapters / "yelp"
    rmm.convert(sources, path, encoding="f16")
    return path


def joined(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, path: Path, **settings: str
) -> LoRAResolver:
    monkeypatch.setenv("RMM_VLLM_COLLECTION", str(path))
    for name, value in settings.items():
        monkeypatch.setenv(f"RMM_VLLM_{name}", value)
    plugin.register()
    return next(iter(registry.resolvers.values()))


def ask(resolver: LoRAResolver, name: str, base: str = BASE) -> LoRARequest | None:
    return asyncio.run(resolver.resolve_lora(base, name))


def test_a_task_becomes_a_folder_that_vllm_can_load(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, skills: Path
) -> None:
    resolver = joined(registry, monkeypatch, skills)
    request = ask(resolver, "imdb")
    assert request is not None
    assert request.lora_name == "imdb"
    folder = Path(request.lora_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == BASE
    assert not config.get("modules_to_save")
    tensors = load_file(folder / "adapter_model.safetensors")
    with rmm.open(skills) as collection:
        task = collection.load("imdb", dtype="f16")
        assert len(tensors) == 2 * len(task)
        for target, factors in task.items():
            prefix = f"base_model.model.{target}."
            np.testing.assert_array_equal(tensors[prefix + "lora_A.weight"], factors.A)
            np.testing.assert_array_equal(tensors[prefix + "lora_B.weight"], factors.B)
    assert ask(resolver, "imdb") == request
    other = ask(resolver, "spam")
    assert other is not None
    assert other.lora_int_id != request.lora_int_id
    resolver.close()  # type: ignore[attr-defined]
    assert not folder.exists()


def test_names_stay_within_the_file(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, skills: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    resolver = joined(registry, monkeypatch, skills, CACHE=str(tmp_path / "cache"))
    for name in ("none", "", ".", "..", "../imdb", "/etc", "imdb/", "IMDB", "imdb\0", "\u202e"):
        assert ask(resolver, name) is None
    before = {p for p in tmp_path.rglob("*") if tmp_path / "cache" not in p.parents}
    request = ask(resolver, "../../etc/passwd")  # a name that the file does have
    assert request is not None
    folder = Path(request.lora_path)
    assert folder.is_relative_to(tmp_path / "cache")
    assert ".." not in folder.parts
    assert {p for p in tmp_path.rglob("*") if tmp_path / "cache" not in p.parents} == before
    assert folder.parent.stat().st_mode & 0o077 == 0
    resolver.close()  # type: ignore[attr-defined]
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_base_model_is_not_served(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, skills: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    resolver = joined(registry, monkeypatch, skills)
    with caplog.at_level(logging.WARNING):
        assert ask(resolver, "imdb", "some/other") is None
        assert ask(resolver, "spam", "some/other") is None
    assert caplog.text.count("RMM_VLLM_ANY_BASE=1") == 1
    registry.resolvers.clear()
    generous = joined(registry, monkeypatch, skills, ANY_BASE="1")
    assert ask(generous, "imdb", "some/other") is not None
    generous.close()  # type: ignore[attr-defined]


def test_what_is_left_out_is_said(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, skills: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    resolver = joined(registry, monkeypatch, skills)
    with caplog.at_level(logging.WARNING, "vllm.rmmformat"):
        ask(resolver, "imdb")
    assert "classifier" in caplog.text
    resolver.close()  # type: ignore[attr-defined]


def test_the_file_may_grow_and_break(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, skills: Path, demo_adapters: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    resolver = joined(registry, monkeypatch, skills)
    old = ask(resolver, "imdb")
    assert old is not None
    assert ask(resolver, "bbc") is None
    rmm.add(skills, demo_adapters / "bbc")
    assert ask(resolver, "bbc") is not None
    assert Path(old.lora_path).is_dir()  # vLLM may load it again
    new = ask(resolver, "imdb")
    assert new is not None
    assert new.lora_int_id != old.lora_int_id
    raw = bytearray(skills.read_bytes())
    raw[0] ^= 1
    skills.unlink()
    skills.write_bytes(raw)
    with caplog.at_level(logging.ERROR, "vllm.rmmformat"):
        assert ask(resolver, "imdb") is None
        skills.unlink()
        assert ask(resolver, "imdb") is None
    assert "RMM-001" in caplog.text
    resolver.close()  # type: ignore[attr-defined]


def test_dtype(registry: Registry, monkeypatch: pytest.MonkeyPatch, skills: Path) -> None:
    resolver = joined(registry, monkeypatch, skills, DTYPE="f32")
    request = ask(resolver, "imdb")
    assert request is not None
    tensors = load_file(Path(request.lora_path) / "adapter_model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    resolver.close()  # type: ignore[attr-defined]


def test_joining(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, skills: Path, tmp_path: Path
) -> None:
    plugin.register()
    assert registry.resolvers == {}
    joined(registry, monkeypatch, skills)
    plugin.register()
    assert len(registry.resolvers) == 1
    for name, value, error in (
        ("COLLECTION", str(tmp_path / "none.rmm"), NotFoundError),
        ("CACHE", str(tmp_path / "none"), NotFoundError),
        ("DTYPE", "int3", OptionError),
        ("ANY_BASE", "yes", OptionError),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"RMM_VLLM_{name}", value)
            with pytest.raises(error):
                plugin.register()


def test_the_entry_point_is_named_in_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"rmm_resolver": "rmmformat.runtimes.vllm:register"}


def test_it_imports_without_vllm() -> None:
    code = "import sys; import rmmformat.runtimes.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


HOLD = """
import sys, time
from pathlib import Path
from rmmformat.runtimes.vllm_folders import Scratch
scratch = Scratch(Path(sys.argv[1]))
scratch.new_path().mkdir()
print(scratch.path, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_folders_of_killed_processes_go_and_of_living_ones_stay(tmp_path: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE,
                         text=True)
        for _ in range(2)
    ]  # fmt: skip
    try:
        paths = []
        for holder in holders:
            assert holder.stdout is not None
            paths.append(Path(holder.stdout.readline().strip()))
        (tmp_path / "rmm-vllm-mine").mkdir()  # without a lock: someone is about to make it
        holders[0].kill()
        holders[0].wait()
        scratch = Scratch(tmp_path)
        assert not paths[0].exists()
        assert paths[1].exists()
        assert (tmp_path / "rmm-vllm-mine").exists()
        scratch.close()
        scratch.close()
        assert not scratch.path.exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_leaves_the_folder(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from rmmformat.runtimes.vllm_folders import Scratch\n"
        "scratch = Scratch(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0: scratch.close(); sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "assert scratch.path.is_dir()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
