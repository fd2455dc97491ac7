"""Broken and hostile adapters: one typed error that names the file, in bounded time and memory."""

from __future__ import annotations

import json
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmmformat.converters import detect, get_importer
from rmmformat.converters.peft_match import compile_pattern
from rmmformat.errors import RmmError, SourceError, UnsupportedError

GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


def refused(kit, folder, match=None, **options):
    """Open, expect a typed error that names a file of the folder, and bound what it took."""
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises((SourceError, UnsupportedError), match=match) as caught:
            kit.open(folder, **options)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.perf_counter() - started < 10
    assert peak < 64 << 20
    assert str(folder) in str(caught.value)
    return caught.value


# --- configs ----------------------------------------------------------------------------------

RAW_CONFIGS = {
    "empty": b"",
    "not_json": b"PK\x03\x04",
    "truncated": b'{"r": 2, "lora_alpha"',
    "not_an_object": b"[1, 2]",
    "null": b"null",
    "not_utf8": b'{"peft_type": "LORA\xff"}',
    "byte_order_mark": b"\xef\xbb\xbf{}",
    "key_twice": b'{"r": 2, "r": 16, "lora_alpha": 4}',
    "key_twice_inside": b'{"alpha_pattern": {"q": 1, "q": 2}}',
    "nan": b'{"r": 2, "lora_alpha": NaN}',
    "infinity": b'{"r": 2, "lora_alpha": -Infinity}',
    "overflowing_float": b'{"r": 2, "lora_alpha": 1e999}',
    "nested_lists": b"[" * 100_000 + b"]" * 100_000,
    "nested_objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested_field": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits_without_end": b'{"r": ' + b"9" * 100_000 + b"}",
    "lone_surrogate": b'{"base_model_name_or_path": "\\ud800"}',
    "control_character": b'{"base_model_name_or_path": "a\\u0000b"}',
    "trailing": b'{"r": 2} {"r": 16}',
}


@pytest.mark.parametrize("case", RAW_CONFIGS)
def test_config_that_is_not_strict_json(kit, case):
    folder = kit.adapter(kit.pair("q"))
    (folder / "adapter_config.json").write_bytes(RAW_CONFIGS[case])
    assert "adapter_config.json" in str(refused(kit, folder))


def test_config_of_100_megabytes_is_not_read(kit):
    folder = kit.adapter(kit.pair("q"))
    with (folder / "adapter_config.json").open("wb") as stream:
        stream.truncate(100 << 20)
    refused(kit, folder, "bytes of JSON")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", 7),
        ("peft_type", None),
        ("r", "2"),
        ("r", 2.5),
        ("r", 0),
        ("r", -2),
        ("r", True),
        ("r", [2]),
        ("r", 10**30),
        ("r", 1 << 21),
        ("lora_alpha", "4"),
        ("lora_alpha", True),
        ("lora_alpha", {}),
        ("lora_alpha", 10**400),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("fan_in_fan_out", "true"),
        ("use_dora", 1),
        ("bias", "some"),
        ("bias", 0),
        ("rank_pattern", ["q"]),
        ("rank_pattern", {"q": "2"}),
        ("rank_pattern", {"q": 0}),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", 3),
        ("alpha_pattern", {"q": None}),
        ("target_modules", 3),
        ("target_modules", [1]),
        ("target_modules", "("),
        ("modules_to_save", "classifier"),
        ("modules_to_save", ["x"] * 2000),
        ("layers_to_transform", "0"),
        ("base_model_name_or_path", 1),
        ("base_model_name_or_path", "x" * 2000),
    ],
)
def test_config_field_of_the_wrong_type_is_named(kit, field, value):
    folder = kit.adapter(kit.pair("q"), GOOD, **{field: value})
    error = refused(kit, folder)
    assert field in str(error) or (
        field == "base_model_name_or_path" and "base model" in str(error)
    )
    assert len(str(error)) < 600


def test_whole_number_written_as_a_float_is_a_rank(kit):
    assert kit.open(kit.adapter(kit.pair("q"), r=2.0)).targets["q"].rank == 2


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a|a)(a|a)" * 20, "a?" * 60 + "a" * 60, ".*a.*a.*a.*a.*a.*b"]
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_that_would_match_for_years_is_refused(kit, pattern, field):
    module = "a" * 120
    folder = kit.adapter(kit.pair(module), **{field: {pattern: 2}})
    refused(kit, folder, "too long to match")


@pytest.mark.parametrize(("n_keys", "n_modules"), [(30_000, 1), (2_000, 3_000)])
def test_patterns_without_number_are_refused(kit, n_keys, n_modules):
    tensors = {k: v for n in range(n_modules) for k, v in kit.pair(f"q.{n}").items()}
    folder = kit.adapter(tensors, rank_pattern={f"k{n}": 2 for n in range(n_keys)})
    refused(kit, folder, "too many")


def test_targets_that_would_match_for_years_are_not_matched(kit):
    task = kit.open(kit.adapter(kit.pair("a" * 60), target_modules="(a+)+b"))
    assert task.targets["a" * 60].rank == 2


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "^model.decoder.layers.0.encoder_attn.k_proj",
        r"model\.layers\.(1[0-9]|2[0-3])\..*(q|k|v|o)_proj",
        ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"(?:.*\.)?layers\.\d+\.mlp",
    ],
)
def test_patterns_that_people_write_are_matched(pattern):
    assert compile_pattern(rf"(.*\.)?({pattern})$", 100, "f", "")


# --- safetensors ------------------------------------------------------------------------------


def _raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor(**changes):
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}


RAW_WEIGHTS = {
    "empty": b"",
    "seven_bytes": b"\x01" * 7,
    "header_length_0": struct.pack("<Q", 0),
    "header_length_2_31": struct.pack("<Q", 1 << 31) + b"{}",
    "header_length_2_63": struct.pack("<Q", 1 << 63) + b"{}",
    "header_length_max": b"\xff" * 8 + b"{}",
    "header_past_end": struct.pack("<Q", 100) + b"{}",
    "header_not_utf8": _raw(b"{\xff}"),
    "header_not_json": _raw(b"hello"),
    "header_a_list": _raw(b"[]"),
    "header_nested": _raw(b"[" * 100_000),
    "pickle": pickle.dumps({"a": 1}),
    "zip": b"PK\x03\x04" + b"\0" * 40,
    "offsets_past_end": _raw(_tensor(data_offsets=[0, 8], shape=[2]), b"1234"),
    "offsets_reversed": _raw(_tensor(data_offsets=[4, 0]), b"1234"),
    "offsets_negative": _raw(_tensor(data_offsets=[-4, 0]), b"1234"),
    "shape_disagrees": _raw(_tensor(shape=[2]), b"1234"),
    "shape_overflows": _raw(_tensor(shape=[1 << 33, 1 << 33]), b"1234"),
    "shape_wraps_to_zero": _raw(_tensor(shape=[1 << 32, 1 << 32], data_offsets=[0, 0])),
    "shape_negative": _raw(_tensor(shape=[-1]), b"1234"),
    "dtype_unknown": _raw(_tensor(dtype="X9"), b"1234"),
    "dtype_four_bits": _raw(_tensor(dtype="F4", shape=[8]), b"1234"),
    "tail": _raw(_tensor(), b"1234PK\x03\x04"),
    "hole": _raw(
        {**_tensor(), "b": {"dtype": "U8", "shape": [1], "data_offsets": [5, 6]}}, b"123456"
    ),
    "overlap": _raw(
        {**_tensor(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"
    ),
    "surrogate_name": _raw(
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"
    ),
    "empty_name": _raw({"": _tensor()["a"]}, b"1234"),
    "long_name": _raw({"a" * 5000: _tensor()["a"]}, b"1234"),
    "control_name": _raw({"a\x1b[31m": _tensor()["a"]}, b"1234"),
}


@pytest.mark.parametrize("case", RAW_WEIGHTS)
def test_weights_that_are_not_a_safetensors_file(kit, case):
    folder = kit.adapter(kit.pair("q"))
    (folder / "adapter_model.safetensors").write_bytes(RAW_WEIGHTS[case])
    assert "adapter_model.safetensors" in str(refused(kit, folder))


def test_every_truncation_of_a_good_file_is_refused(kit):
    folder = kit.adapter(kit.pair("q"))
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"adapter_model\.safetensors"):
            kit.open(folder)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_give_typed_errors_or_the_same_kind_of_task(kit, data):
    folder = kit.root / "fuzz"
    if not folder.exists():
        tensors = {**kit.pair("q"), f"{kit.prefix}score.weight": np.ones((2, 2), np.float32)}
        kit.adapter(tensors, name="fuzz", modules_to_save=["score"])
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (kit.root / name).write_bytes((folder / name).read_bytes())
    name = data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    raw = bytearray((kit.root / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, min(len(raw), 500) - 1))] = data.draw(st.integers(0, 255))
    for other in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / other).write_bytes(raw if other == name else (kit.root / other).read_bytes())
    said = str(folder)
    try:
        task = kit.open(folder)
        for target in task.targets:
            task.factors(target)
        for private in task.privates:
            task.private_tensor(private)
    except RmmError as error:
        said = str(error)
    assert str(folder) in said


# --- pickles ----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_pickle_that_runs_code_is_refused(kit):
    torch = pytest.importorskip("torch")
    folder = kit.adapter(kit.pair("q"))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    refused(kit, folder, "more than tensors", allow_pickle=True)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    refused(kit, folder, r"adapter_model\.bin", allow_pickle=True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("list", "got list"),
        ("nested", "got dict under 'state_dict'"),
        ("number", "got Tensor under 3"),
        ("garbage", r"adapter_model\.bin"),
        ("empty", r"adapter_model\.bin"),
        ("compressed", "is compressed"),
        ("wide", "larger than its file"),
        ("sparse", "not a plain dense tensor"),
    ],
)
def test_pickle_that_is_no_dictionary_of_dense_tensors(kit, case, message):
    torch = pytest.importorskip("torch")
    folder = kit.adapter(kit.pair("q"))
    (folder / "adapter_model.safetensors").unlink()
    path = folder / "adapter_model.bin"
    tensor = torch.ones(2, 3)
    values = {
        "list": [tensor],
        "nested": {"state_dict": {"a": tensor}},
        "number": {3: tensor},
        # A view of one value that would fill the memory.
        "wide": {"a": torch.ones(1).expand(1 << 20, 1 << 20)},
        "sparse": {"a": tensor.to_sparse()},
    }
    if case == "compressed":  # a small file that could stand for one of any size
        torch.save({"a": torch.zeros(1 << 20)}, kit.root / "plain")
        with (
            zipfile.ZipFile(kit.root / "plain") as plain,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for entry in plain.infolist():
                archive.writestr(entry.filename, plain.read(entry))
    elif case in values:
        torch.save(values[case], path)
    else:
        path.write_bytes(b"\x80\x04garbage" if case == "garbage" else b"")
    refused(kit, folder, message, allow_pickle=True)


def test_pickles_are_read_only_when_asked_for(kit):
    torch = pytest.importorskip("torch")
    folder = kit.adapter(kit.pair("q"))
    (folder / "adapter_model.safetensors").unlink()
    tensors = {name: torch.from_numpy(array) for name, array in kit.pair("q").items()}
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=r"pickles are not allowed.*--allow-pickle"):
        kit.open(folder)
    assert kit.open(folder, allow_pickle=True).targets["q"].scale == 2.0


@pytest.mark.parametrize(
    ("version", "safe"), [("2.5.1", False), ("1.13.0", False), ("2.10.0", True)]
)
def test_torch_with_an_unsound_unpickler_is_refused(monkeypatch, version, safe):
    from rmmformat.converters.torch_pickle import require_safe_torch

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "__version__", version)
    if safe:
        assert require_safe_torch() is torch
    else:
        with pytest.raises(UnsupportedError, match="CVE-2025-32434") as caught:
            require_safe_torch()
        assert "pip install" in str(caught.value.hint)


def test_missing_torch_is_said_with_the_remedy(monkeypatch):
    import sys

    from rmmformat.converters.torch_pickle import require_safe_torch

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UnsupportedError, match="needs torch") as caught:
        require_safe_torch()
    assert "pip install" in str(caught.value.hint)


# --- places -----------------------------------------------------------------------------------


def test_places_that_are_no_adapter(kit):
    (kit.root / "empty").mkdir()
    (kit.root / "file").write_bytes(b"x")
    (kit.root / "loop").symlink_to(kit.root / "loop")
    for name in ("empty", "file", "loop", "absent"):
        assert not get_importer("peft").detect(kit.root / name)
        with pytest.raises(SourceError, match=name):
            detect(kit.root / name)
        with pytest.raises(SourceError, match=name):
            get_importer("peft").open(kit.root / name)


def test_weights_that_are_a_folder_or_a_pipe(kit):
    import os

    folder = kit.adapter(kit.pair("q"))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    refused(kit, folder, "holds no adapter weights")
    (folder / "adapter_model.safetensors").rmdir()
    os.mkfifo(folder / "adapter_model.safetensors")
    refused(kit, folder, "holds no adapter weights")
