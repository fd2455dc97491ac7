"""Exports: complete or absent, exact in scale, the same bytes for the same task."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from rmmformat.converters import Options, get_exporter
from rmmformat.converters.files import atomic_file, atomic_folder
from rmmformat.errors import LossyConversionError, OptionError, RmmError, UnsupportedError
from rmmformat.model import (
    Action,
    Factors,
    PrivateInfo,
    Role,
    TargetInfo,
    TargetKind,
    TargetShape,
)

F32 = np.dtype(np.float32)


class Made:
    """A task made of arrays, as a reader of another format would give it."""

    path = "made"
    base_model = "org/base"
    ledger = ()
    files = ()

    def __init__(self, scales, *, rank=2, privates=None, config_text="", name="made", **shape):
        self.name = name
        self.config_text = config_text
        ranks = rank if isinstance(rank, dict) else dict.fromkeys(scales, rank)
        self.targets = {
            target: TargetInfo(
                TargetShape(**{"n_in": 6, "n_out": 4, **shape}), ranks[target], s, F32, F32
            )
            for target, s in scales.items()
        }
        self._privates = privates or {}
        self.privates = {
            n: PrivateInfo(role, array.dtype, array.shape)
            for n, (role, array) in self._privates.items()
        }

    def factors(self, target):
        info = self.targets[target]
        random = np.random.default_rng(len(target))
        a = random.standard_normal((info.rank, info.shape.n_in)).astype(np.float32)
        b = random.standard_normal((info.shape.n_out, info.rank)).astype(np.float32)
        return Factors(a, b, info.scale)

    def private_tensor(self, name):
        return self._privates[name][1]


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# --- scales and patterns ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "scales",
    [
        {"q": 2.0},
        {"q": 1 / 3},
        {"q": 0.0},
        {"q": -0.7},
        {"q": 1e-30, "k": 1e30},
        {"layers.0.q": 0.1, "layers.1.q": 0.2, "layers.10.q": 0.3},
        {"q": 1.0, "a.q": 2.0, "b.a.q": 3.0},
        {"a+b": 1.0, "a.b": 2.0, "axb": 3.0, "c": 4.0},
        {"x(1": 0.5, "y[": 1.5},
    ],
)
def test_every_scale_survives(kit, scales):
    ranks = {target: n % 3 + 1 for n, target in enumerate(scales)}
    get_exporter("peft").export(Made(scales, rank=ranks), kit.root / "out")
    back = kit.open(kit.root / "out")
    assert {n: info.rank for n, info in back.targets.items()} == ranks
    for target, scale in scales.items():
        assert back.targets[target].scale == pytest.approx(scale, rel=1e-15, abs=0)
    assert not [n for n in kit.notices(back) if "PEFT would not load" in n.detail]


def test_config_of_another_scale_is_changed_where_it_must_be(kit):
    task = kit.open(kit.adapter(kit.pair("q"), use_rslora=True, my_note="kept", lora_dropout=0.1))
    made = Made({"q": 0.3, "k": 0.4}, config_text=task.config_text)
    ledger = get_exporter("peft").export(made, kit.root / "out")
    config = config_of(kit.root / "out")
    assert config["my_note"] == "kept"
    assert config["use_rslora"] is False
    changed = {line.item for line in ledger if "changed" in line.detail}
    assert changed == {
        "field use_rslora",
        "field lora_alpha",
        "field rank_pattern",
        "field alpha_pattern",
        "field target_modules",
    }
    back = kit.open(kit.root / "out")
    assert {n: i.scale for n, i in back.targets.items()} == {"q": 0.3, "k": 0.4}


def test_scale_that_went_through_float32_keeps_the_config(kit):
    task = kit.open(kit.adapter(kit.pair("q"), lora_alpha=0.2))
    made = Made({"q": float(np.float32(0.1))}, config_text=task.config_text)
    get_exporter("peft").export(made, kit.root / "out")
    assert (kit.root / "out" / "adapter_config.json").read_text() == task.config_text


def test_scale_that_differs_changes_the_config(kit):
    task = kit.open(kit.adapter(kit.pair("q"), lora_alpha=0.2))
    made = Made({"q": 0.10001}, config_text=task.config_text)
    get_exporter("peft").export(made, kit.root / "out")
    assert kit.open(kit.root / "out").targets["q"].scale == 0.10001


def test_whole_alpha_is_written_as_a_whole_number(kit):
    get_exporter("peft").export(Made({"q": 2.0}), kit.root / "out")
    alpha = config_of(kit.root / "out")["lora_alpha"]
    assert (alpha, type(alpha)) == (4, int)


def test_nested_targets_of_different_scales_are_refused(kit):
    with pytest.raises(UnsupportedError, match=r"'attn\.out_proj' lies inside 'attn'"):
        get_exporter("peft").export(Made({"attn": 1.0, "attn.out_proj": 2.0}), kit.root / "out")


def test_order_of_patterns_outlives_a_change_elsewhere(kit):
    tensors = {**kit.pair("z.q", rank=4), **kit.pair("a.q", rank=2)}
    patterns = {"z.q": 4, ".*q": 2}
    task = kit.open(kit.adapter(tensors, rank_pattern=patterns, alpha_pattern={}, bias=None))
    get_exporter("peft").export(task, kit.root / "out")
    assert list(config_of(kit.root / "out")["rank_pattern"]) == list(patterns)
    assert kit.open(kit.root / "out").targets == task.targets


def test_loose_numbers_and_nulls_become_what_peft_can_compute_with(kit):
    folder = kit.adapter(kit.pair("q"), r=2.0, rank_pattern=None, bias=None, peft_type="lora")
    task = kit.open(folder)
    get_exporter("peft").export(task, kit.root / "out")
    config = config_of(kit.root / "out")
    assert (config["r"], type(config["r"])) == (2, int)
    assert (config["rank_pattern"], config["bias"], config["peft_type"]) == ({}, "none", "LORA")


def test_config_text_that_is_not_pefts_is_replaced(kit):
    for n, text in enumerate(
        ("{", "[]", '{"general.architecture": "llama"}', '{"peft_type": "IA3"}')
    ):
        get_exporter("peft").export(Made({"q": 1.5}, config_text=text), kit.root / str(n))
        assert kit.open(kit.root / str(n)).targets["q"].scale == 1.5


def test_mutating_initialisation_never_leaves_again(kit):
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": "pissa"})
    get_exporter("peft").export(Made({"q": 2.0}, config_text=text), kit.root / "out")
    assert config_of(kit.root / "out")["init_lora_weights"] is True


# --- shapes and private tensors ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "a_shape", "b_shape"),
    [
        ({"kind": TargetKind.CONV, "kernel": (3,)}, (2, 2, 3), (4, 2, 1)),
        ({"kind": TargetKind.CONV, "kernel": (3, 2)}, (2, 1, 3, 2), (4, 2, 1, 1)),
        ({"kind": TargetKind.CONV, "kernel": (1, 1, 1)}, (2, 6, 1, 1, 1), (4, 2, 1, 1, 1)),
        ({"transposed": True}, (2, 6), (4, 2)),
    ],
)
def test_factors_take_the_shape_of_their_layer(kit, shape, a_shape, b_shape):
    task = Made({"q": 1.0}, **shape)
    get_exporter("peft").export(task, kit.root / "out")
    with safe_open(kit.root / "out" / "adapter_model.safetensors", framework="numpy") as file:
        assert file.get_tensor(f"{kit.prefix}q.lora_A.weight").shape == a_shape
        assert file.get_tensor(f"{kit.prefix}q.lora_B.weight").shape == b_shape
    assert kit.open(kit.root / "out").targets["q"].shape == task.targets["q"].shape


def test_rows_without_their_indices_are_refused(kit):
    rows = {"embed.token_adapter.trainable_tokens_delta": (Role.ROWS, np.ones((2, 3), np.float32))}
    with pytest.raises(UnsupportedError, match="does not say which"):
        get_exporter("peft").export(Made({"q": 1.0}, privates=rows), kit.root / "out")
    assert not list(kit.root.iterdir())
    drop = Options(drop_private=True)
    get_exporter("peft").export(Made({"q": 1.0}, privates=rows), kit.root / "out", options=drop)
    assert not kit.open(kit.root / "out").privates


def test_magnitudes_for_some_targets_are_refused(kit):
    some = {"q.lora_magnitude_vector": (Role.MAGNITUDE, np.ones(4, np.float32))}
    with pytest.raises(UnsupportedError, match="1 of 2 targets"):
        get_exporter("peft").export(Made({"q": 1.0, "k": 1.0}, privates=some), kit.root / "out")


def test_module_that_is_adapted_and_saved_in_full_is_refused(kit):
    head = {"head.out.weight": (Role.MODULE, np.ones((2, 2), np.float32))}
    text = json.dumps({"peft_type": "LORA", "target_modules": ["q"], "modules_to_save": ["head"]})
    task = Made({"head.q": 1.0}, privates=head, config_text=text)
    with pytest.raises(UnsupportedError, match="saves a module of that path"):
        get_exporter("peft").export(task, kit.root / "out")


def test_two_tensors_of_one_name_are_refused(kit):
    clash = {"q.lora_A.weight": (Role.BIAS, np.ones((2, 6), np.float32))}
    with pytest.raises(RmmError, match="one name"):
        get_exporter("peft").export(Made({"q": 1.0}, privates=clash), kit.root / "out")
    clash = {"q.lora_A": (Role.OTHER, np.ones((2, 6), np.float32))}
    with pytest.raises(RmmError, match="two tensors"):
        get_exporter("safetensors").export(Made({"q": 1.0}, privates=clash), kit.root / "out.st")


def test_tensor_that_peft_would_not_load_is_refused(kit):
    other = {"bundle_emb.x": (Role.OTHER, np.ones((2, 3), np.float32))}
    with pytest.raises(LossyConversionError, match=r"'bundle_emb\.x'.*--drop-private"):
        get_exporter("peft").export(Made({"q": 1.0}, privates=other), kit.root / "out")


def test_arrays_that_are_not_contiguous_are_written_right(kit):
    class Strided(Made):
        def factors(self, target):
            factors = super().factors(target)
            return Factors(np.asfortranarray(factors.A), factors.B[::-1][::-1], factors.scale)

    get_exporter("peft").export(Strided({"q": 1.0}), kit.root / "out")
    expected = Made({"q": 1.0}).factors("q")
    np.testing.assert_array_equal(kit.open(kit.root / "out").factors("q").A, expected.A)


def test_ledger_has_every_tensor(kit):
    head = {"head.weight": (Role.MODULE, np.ones((2, 2), np.float32))}
    task = Made({"q": 1.0}, privates=head)
    ledger = get_exporter("peft").export(task, kit.root / "out")
    with safe_open(kit.root / "out" / "adapter_model.safetensors", framework="numpy") as file:
        assert {f"tensor {key}" for key in list(file.keys())} <= {line.item for line in ledger}
    drop = Options(drop_private=True)
    for name in ("peft", "safetensors"):
        ledger = get_exporter(name).export(task, kit.root / f"drop-{name}", options=drop)
        (line,) = [line for line in ledger if line.item == "tensor head.weight"]
        assert line.action is Action.IGNORED


# --- plain safetensors ------------------------------------------------------------------------


def test_plain_safetensors_holds_factors_scales_and_privates(kit):
    head = {"head.weight": (Role.MODULE, np.ones((2, 2), np.float16))}
    task = Made({"q": 0.1}, privates=head, transposed=True)
    get_exporter("safetensors").export(task, kit.root / "out.safetensors")
    with safe_open(kit.root / "out.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"q.lora_A", "q.lora_B", "head.weight"}
        about = json.loads(file.metadata()["rmmformat"])
        np.testing.assert_array_equal(file.get_tensor("q.lora_A"), task.factors("q").A)
    assert about["task"] == "made"
    assert about["targets"]["q"] == {
        "scale": 0.1,
        "kind": "linear",
        "transposed": True,
        "kernel": [],
    }
    assert about["privates"] == {"head.weight": "module"}


# --- output -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peft", "safetensors"])
def test_same_task_same_bytes(kit, demo, name):
    task = kit.open(demo / "spam")
    outs = [kit.root / "one", kit.root / "two"]
    for out in outs:
        get_exporter(name).export(task, out)
    for path in sorted(p for p in [outs[0], *outs[0].rglob("*")] if p.is_file()):
        other = outs[1] / path.relative_to(outs[0]) if outs[0].is_dir() else outs[1]
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["peft", "safetensors"])
def test_existing_output_is_replaced_only_by_force(kit, name):
    exporter, out = get_exporter(name), kit.root / "out"
    exporter.export(Made({"q": 1.0}), out)
    with pytest.raises(RmmError, match="exists already"):
        exporter.export(Made({"k": 1.0}), out)
    exporter.export(Made({"k": 1.0}), out, force=True)
    text = b"".join(p.read_bytes() for p in [out, *out.rglob("*")] if p.is_file())
    assert b"k.lora_A" in text
    assert b"q.lora_A" not in text
    assert sorted(p.name for p in kit.root.iterdir()) == ["out"]


def test_force_does_not_replace_a_folder_of_other_things(kit):
    out = kit.root / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(RmmError, match=r"thesis\.tex"):
        get_exporter("peft").export(Made({"q": 1.0}), out, force=True)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_empty_folder_is_filled(kit):
    (kit.root / "out").mkdir()
    get_exporter("peft").export(Made({"q": 1.0}), kit.root / "out")
    assert (kit.root / "out" / "adapter_model.safetensors").exists()


def test_names_of_the_task_choose_no_path(kit):
    task = Made({"../../q": 1.0, "/abs": 1.0}, name="../../evil")
    get_exporter("peft").export(task, kit.root / "a" / "out")
    get_exporter("safetensors").export(task, kit.root / "a" / "out.st")
    found = sorted(str(p.relative_to(kit.root)) for p in kit.root.rglob("*") if p.is_file())
    assert found == ["a/out.st", "a/out/adapter_config.json", "a/out/adapter_model.safetensors"]


def test_output_is_as_readable_as_any_new_file(kit):
    (kit.root / "probe").touch()
    mode = (kit.root / "probe").stat().st_mode & 0o777
    get_exporter("peft").export(Made({"q": 1.0}), kit.root / "out")
    get_exporter("safetensors").export(Made({"q": 1.0}), kit.root / "out.st")
    written = [*(kit.root / "out").iterdir(), kit.root / "out.st"]
    assert {p.stat().st_mode & 0o777 for p in written} == {mode}


def test_rename_that_fails_leaves_the_old_folder(kit, monkeypatch):
    out = kit.root / "out"
    get_exporter("peft").export(Made({"old": 1.0}), out)
    before = (out / "adapter_model.safetensors").read_bytes()
    rename = Path.rename

    def failing(self, target):
        if Path(target) == out and self.suffix == ".tmp":
            raise OSError(5, "I/O error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RmmError, match="I/O error"):
        get_exporter("peft").export(Made({"new": 1.0}), out, force=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in kit.root.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("fmt", ["peft", "safetensors"])
def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path, fmt):
    out = tmp_path / "out"

    def killed():
        os._exit(9)

    child = os.fork()
    if child == 0:
        task = Made({"q": 1.0})
        task.factors = lambda _: killed()
        get_exporter(fmt).export(task, out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    maker = atomic_folder(out, force=True, known=frozenset(["x"]))
    if fmt == "safetensors":
        maker = atomic_file(out, force=True)
    with maker as living:  # is not taken for one that was left
        assert [p.name for p in tmp_path.iterdir()] == [living.name]
        get_exporter(fmt).export(Made({"q": 1.0}), out, force=True)
        assert {p.name for p in tmp_path.iterdir()} == {"out", living.name}
        if fmt == "peft":
            shutil.rmtree(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_destination_of_the_wrong_kind(kit):
    (kit.root / "file").touch()
    (kit.root / "folder").mkdir()
    with pytest.raises(RmmError, match="not a folder"):
        get_exporter("peft").export(Made({"q": 1.0}), kit.root / "file", force=True)
    with pytest.raises(RmmError, match="is a folder"):
        get_exporter("safetensors").export(Made({"q": 1.0}), kit.root / "folder", force=True)
    with pytest.raises(RmmError, match="cannot write"):
        get_exporter("peft").export(Made({"q": 1.0}), kit.root / "file" / "below")


def test_long_names_have_room_for_the_temporary_one(kit):
    name = "n" * os.pathconf(kit.root, "PC_NAME_MAX")
    with atomic_file(kit.root / name, force=False) as temporary:
        temporary.write_bytes(b"x")
    with atomic_folder(kit.root / f"d{name[1:]}", force=False, known=frozenset()) as folder:
        (folder / "x").write_bytes(b"x")
    assert (kit.root / name).read_bytes() == b"x"


@pytest.mark.parametrize("fmt", ["peft", "safetensors"])
def test_dtype_of_factors_can_be_chosen(tmp_path, fmt):
    task = Made({"a.q": 2.0}, privates={"head": (Role.MODULE, np.ones((2, 2), np.float32))})
    out = tmp_path / ("out" if fmt == "peft" else "out.safetensors")
    get_exporter(fmt).export(task, out, options=Options(dtype="f16"))
    with safe_open(out / "adapter_model.safetensors" if fmt == "peft" else out, "numpy") as file:
        dtypes = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert {d for key, d in dtypes.items() if "lora" in key} == {np.dtype(np.float16)}
    assert {d for key, d in dtypes.items() if "lora" not in key} == {F32}


def test_dtype_that_is_none_or_too_small_writes_nothing(tmp_path):
    task = Made({"a.q": 1.0})
    with pytest.raises(OptionError, match="not one of f32, f16, bf16"):
        get_exporter("peft").export(task, tmp_path / "out", options=Options(dtype="q8"))
    large = Made({"a.q": 1.0})
    large.factors = lambda _: Factors(
        np.full((2, 6), 1e6, np.float32), np.ones((4, 2), np.float32), 1.0
    )
    with pytest.raises(LossyConversionError, match=r"factor A of task 'made'.*float16"):
        get_exporter("peft").export(large, tmp_path / "out", options=Options(dtype="f16"))
    assert not list(tmp_path.iterdir())
