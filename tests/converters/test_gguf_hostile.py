"""Broken and hostile GGUF files: one typed error naming the file, in bounded time and memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmmformat.converters import Options, get_exporter, get_importer
from rmmformat.converters.gguf_scan import scan
from rmmformat.errors import RmmError, SourceError, UnsupportedError

U8, I8, U16, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 2, 6, 7, 8, 9, 10


def read_all(path, base=None):
    for task in get_importer("gguf").open(path, options=Options(base=base)):
        for target in task.targets:
            task.factors(target)


def refused(path, match=None, kinds=(SourceError, UnsupportedError)):
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(kinds, match=match) as caught:
            read_all(path)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.perf_counter() - started < 10
    assert peak < 16 << 20
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1500
    return caught.value


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key, kind, raw):
    return text(key) + struct.pack("<I", kind) + raw


ADAPTER = (
    field("general.architecture", STRING, text("qwen2")),
    field("general.type", STRING, text("adapter")),
    field("adapter.type", STRING, text("lora")),
)


def line(name, sides, kind=0, offset=0):
    return (
        text(name)
        + struct.pack("<I", len(sides))
        + struct.pack(f"<{len(sides)}Q", *sides)
        + struct.pack("<IQ", kind, offset)
    )


def file_of(fields=ADAPTER, lines=(), data=b"", *, n_fields=None, n_lines=None, version=3):
    n_fields = len(fields) if n_fields is None else n_fields
    n_lines = len(lines) if n_lines is None else n_lines
    raw = b"GGUF" + struct.pack("<IQQ", version, n_lines, n_fields) + b"".join((*fields, *lines))
    return raw + b"\0" * (-len(raw) % 32) + data


A, B = "output.weight.lora_a", "output.weight.lora_b"
PAIR = (line(A, (8, 2)), line(B, (2, 4), offset=64))
GOOD = file_of(lines=PAIR, data=b"\0" * 128)
HUGE = 1 << 63


CASES = {
    "empty": b"",
    "three_bytes": b"GGU",
    "magic_alone": b"GGUF",
    "another_magic": b"GGML" + GOOD[4:],
    "version_0": file_of(version=0),
    "version_1": file_of(version=1),
    "version_9": file_of(version=9),
    "big_endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "fields_without_end": file_of(n_fields=HUGE),
    "fields_a_million": file_of(n_fields=1_000_000),
    "tensors_without_end": file_of(n_lines=HUGE),
    "tensors_a_million": file_of(n_lines=1_000_000),
    "key_without_end": file_of((struct.pack("<Q", (1 << 64) - 1),), n_fields=1),
    "key_of_a_megabyte": file_of((text(b"k" * (1 << 20)),), n_fields=1),
    "key_not_utf8": file_of((field(b"\xff\xfe", U8, b"\0"),)),
    "key_twice": file_of((*ADAPTER, ADAPTER[0])),
    "type_unknown": file_of((field("k", 13, b"\0" * 8),)),
    "bool_of_two": file_of((field("k", BOOL, b"\2"),)),
    "string_without_end": file_of((field("k", STRING, struct.pack("<Q", HUGE)),)),
    "string_past_end": file_of((field("k", STRING, struct.pack("<Q", 1000)),)),
    "string_not_utf8": file_of((*ADAPTER, field("k", STRING, text(b"\xff")))),
    "array_without_end": file_of((field("k", ARRAY, struct.pack("<IQ", U8, HUGE)),)),
    "array_wraps": file_of((field("k", ARRAY, struct.pack("<IQ", U64, (1 << 61) + 1)),)),
    "array_of_arrays": file_of((field("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + b"\0" * 99),)),
    "array_of_unknown": file_of((field("k", ARRAY, struct.pack("<IQ", 77, 1) + b"\0" * 99),)),
    "array_of_strings_past_end": file_of(
        (field("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + struct.pack("<Q", HUGE)),)
    ),
    "long_array_of_strings_past_end": file_of(
        (
            field(
                "k",
                ARRAY,
                struct.pack("<IQ", STRING, 5000) + text("a") * 4999 + struct.pack("<Q", HUGE),
            ),
        )
    ),
    "alignment_0": file_of((*ADAPTER, field("general.alignment", 4, struct.pack("<I", 0)))),
    "alignment_3": file_of((*ADAPTER, field("general.alignment", 4, struct.pack("<I", 3)))),
    "alignment_2_31": file_of(
        (*ADAPTER, field("general.alignment", 4, struct.pack("<I", 1 << 31)))
    ),
    "alignment_text": file_of((*ADAPTER, field("general.alignment", STRING, text("32")))),
    "name_too_long": file_of(lines=(line("n" * 64, (1,)),), data=b"\0" * 64),
    "name_not_utf8": file_of(lines=(line(b"\xff", (1,)),), data=b"\0" * 64),
    "name_empty": file_of(lines=(line("", (1,)),), data=b"\0" * 64),
    "name_control": file_of(
        lines=(line("a\x1b[31m.weight.lora_a", (8, 2)), line(B, (2, 4), offset=64)),
        data=b"\0" * 128,
    ),
    "name_twice": file_of(lines=(line(A, (8, 2)), line(A, (8, 2), offset=64)), data=b"\0" * 128),
    "dimensions_none": file_of(lines=(line(A, ()),), data=b"\0" * 64),
    "dimensions_five": file_of(lines=(line(A, (1, 1, 1, 1, 1)),), data=b"\0" * 64),
    "side_0": file_of(lines=(line(A, (0, 2)),), data=b"\0" * 64),
    "sides_wrap_to_zero": file_of(lines=(line(A, (1 << 32, 1 << 32)),), data=b"\0" * 64),
    "sides_wrap_to_little": file_of(lines=(line(A, ((1 << 62) + 4, 4)),), data=b"\0" * 64),
    "side_2_63": file_of(lines=(line(A, (HUGE, 1)),), data=b"\0" * 64),
    "kind_unknown": file_of(lines=(line(A, (8, 2), kind=999),), data=b"\0" * 64),
    "kind_removed": file_of(lines=(line(A, (8, 2), kind=4),), data=b"\0" * 64),
    "rows_of_no_blocks": file_of(lines=(line(A, (8, 2), kind=8),), data=b"\0" * 64),
    "past_end": file_of(lines=PAIR, data=b"\0" * 64),
    "offset_far": file_of(lines=(line(A, (8, 2), offset=HUGE),), data=b"\0" * 64),
    "offset_odd": file_of(lines=(line(A, (8, 2), offset=4),), data=b"\0" * 128),
    # Each line would be read as much data as the whole file has.
    "overlapping": file_of(
        lines=tuple(line(f"blk.{n}.ffn_up.weight.lora_a", (8, 2)) for n in range(100)),
        data=b"\0" * 64,
    ),
    "rank_0_by_one_half": file_of(lines=PAIR[:1], data=b"\0" * 64),
    "architecture_missing": file_of(ADAPTER[1:], PAIR, b"\0" * 128),
    "architecture_number": file_of(
        (field("general.architecture", U8, b"\1"), *ADAPTER[1:]), PAIR, b"\0" * 128
    ),
    "architecture_long": file_of(
        (field("general.architecture", STRING, text("x" * 100_000)), *ADAPTER[1:]),
        PAIR,
        b"\0" * 128,
    ),
    "kind_of_file_number": file_of(
        (ADAPTER[0], field("general.type", U8, b"\1"), ADAPTER[2]), PAIR, b"\0" * 128
    ),
    "alpha_text": file_of(
        (*ADAPTER, field("adapter.lora.alpha", STRING, text("16"))), PAIR, b"\0" * 128
    ),
    "alpha_whole": file_of((*ADAPTER, field("adapter.lora.alpha", U8, b"\1")), PAIR, b"\0" * 128),
    "alpha_bool": file_of((*ADAPTER, field("adapter.lora.alpha", BOOL, b"\1")), PAIR, b"\0" * 128),
    "base_model_control": file_of(
        (*ADAPTER, field("general.base_model.0.name", STRING, text("a\0b"))), PAIR, b"\0" * 128
    ),
    "block_number_huge": file_of(
        lines=(
            line("blk.99999999999999.ffn_up.weight.lora_a", (8, 2)),
            line("blk.99999999999999.ffn_up.weight.lora_b", (2, 4), offset=64),
        ),
        data=b"\0" * 128,
    ),
    "values_nan": file_of(lines=PAIR, data=b"\xff" * 128),
}


def test_the_file_that_the_others_are_made_of_is_read(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD)
    read_all(path)
    assert [t.name for t in gguf.GGUFReader(path).tensors] == [A, B]


@pytest.mark.parametrize("case", CASES)
def test_file_is_refused(tmp_path, case):
    path = tmp_path / "task.gguf"
    path.write_bytes(CASES[case])
    refused(path)


@pytest.fixture
def adapter(kit, tmp_path):
    """An adapter with rows in rotary order, as the exporter writes it."""
    names = [f"model.layers.0.{m}_proj" for m in ("mlp.up", "self_attn.q")]
    pairs = [kit.pair(name, n_in=32, n_out=32) for name in names]
    made = kit.open(kit.adapter({**pairs[0], **pairs[1]}, target_modules=names))
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}'
    )
    path = tmp_path / "whole.gguf"
    get_exporter("gguf").export(made, path, options=Options(base=tmp_path))
    read_all(path)
    return path


def test_every_truncation_is_refused(adapter):
    whole = adapter.read_bytes()
    ends = scan(adapter).tensors.values()
    needed = max(tensor.offset + tensor.n_bytes for tensor in ends)
    for length in range(0, needed, 64):
        adapter.write_bytes(whole[:length])
        with pytest.raises((SourceError, UnsupportedError), match=r"whole\.gguf|no GGUF file"):
            read_all(adapter)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_give_typed_errors_or_a_task(adapter, data):
    kept = adapter.with_name("kept")
    if not kept.exists():
        kept.write_bytes(adapter.read_bytes())
    raw = bytearray(kept.read_bytes())
    start = min(tensor.offset for tensor in scan(kept).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, start + 64))] = data.draw(st.integers(0, 255))
    adapter.write_bytes(raw)
    try:
        read_all(adapter)
    except RmmError as error:
        assert str(adapter) in str(error)  # noqa: PT017


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_base_gives_typed_errors_or_a_task(adapter, data):
    base = adapter.with_name("base.gguf")
    writer = gguf.GGUFWriter(base, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv([4, 2])
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = bytearray(base.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 250))] = data.draw(st.integers(0, 255))
    base.write_bytes(raw)
    try:
        read_all(adapter, base)
    except RmmError as error:
        assert str(adapter.parent) in str(error)  # noqa: PT017


def test_long_vocabulary_is_stepped_over_not_kept(tmp_path):
    path = tmp_path / "base.gguf"
    tokens = struct.pack("<IQ", STRING, 50_000) + text("token") * 50_000
    numbers = struct.pack("<IQ", F32, 50_000) + b"\0" * 200_000
    path.write_bytes(file_of((*ADAPTER, field("t", ARRAY, tokens), field("s", ARRAY, numbers))))
    tracemalloc.start()
    header = scan(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert header.skipped == {"t": 50_000, "s": 50_000}
    assert peak < 1 << 20


def test_header_is_what_the_gguf_package_reads(adapter):
    header, reader = scan(adapter), gguf.GGUFReader(adapter)
    for tensor in reader.tensors:
        mine = header.tensors[tensor.name]
        assert (mine.offset, mine.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.kind == tensor.tensor_type.name
    fields = {key: reader.get_field(key).contents() for key in header.values}
    assert fields == dict(header.values)


def test_places_that_are_no_adapter(tmp_path):
    importer = get_importer("gguf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.gguf").write_bytes(b"x")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("empty", "file.gguf", "loop.gguf", "pipe.gguf", "absent"):
        assert not importer.detect(tmp_path / name)
        with pytest.raises(SourceError, match=name):
            importer.open(tmp_path / name)
    assert not importer.detect(tmp_path)
