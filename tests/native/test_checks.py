"""Broken files: the rule is named, everything is found, nothing crashes."""

from __future__ import annotations

import struct
import zlib

import native_build as build
import numpy as np
import pytest

from rmmformat import _native, errors

DATA = build.tiny().build()
SLOT = 64
INDEX = struct.unpack_from("<Q", DATA, SLOT + 24)[0]
AT = {name: (record, offset) for name, (record, offset, _) in build.sections_of(DATA).items()}


def rules(data: bytes) -> set[int]:
    return {violation.rule for violation in _native.validate_bytes(data)}


def read(data: bytes, limit: int = 1 << 24) -> None:
    """Open, and load every task whose arena is not too large."""
    file = _native.File.from_buffer(data)
    for task in range(file.n_tasks):
        _, size = file.entries(task, 1)
        if size < limit:
            file.load_task(task, 1, bytearray(size))


def refusal(data: bytes) -> errors.RmmError:
    with pytest.raises(errors.RmmError) as caught:
        read(data)
    return caught.value


def table(name: str, record: int, field: int, size: int) -> int:
    return AT[name][1] + record * size + field


# (rule, offset of the field, struct code, value): one broken field each, all checksums right.
BROKEN = [
    (1, 1, "B", 0x53),
    (2, 8, "H", 2),
    (3, 12, "I", 8),
    (5, 20, "B", 1),
    (5, 300, "B", 1),
    (13, SLOT + 8, "Q", len(DATA) + 1),
    (14, SLOT + 16, "Q", len(DATA) - 1),
    (16, SLOT + 24, "Q", INDEX + 4),
    (16, SLOT + 24, "Q", 2**64 - 8),
    (16, SLOT + 32, "Q", 2**64 - 1),
    (16, SLOT + 40, "Q", 2**60),
    (16, SLOT + 40, "Q", 2**64 // 40 + 1),
    (17, SLOT + 48, "I", 48),
    (21, AT["TARG"][0] + 8, "Q", AT["TARG"][1] + 8),
    (21, AT["meta"][0] + 16, "Q", 2**63),
    (22, AT["RUNS"][0], "4s", b"R NS"),
    (22, AT["RUNS"][0], "4s", b"TARG"),
    (23, AT["RUNS"][0], "4s", b"RUNZ"),
    (24, AT["TARG"][0] + 24, "Q", 2**59 + 2),
    (24, AT["TARG"][0] + 32, "I", 0),
    (26, AT["meta"][0] + 4, "I", 2),
    (26, AT["TARG"][0] + 4, "I", 1),
    (30, AT["STRS"][1], "B", 0xFF),
    (30, AT["STRS"][1], "B", 0x1F),
    (31, AT["STRS"][1], "B", 0x7A),
    (35, table("TARG", 0, 24, 32), "I", 99),
    (36, table("TARG", 0, 0, 32), "Q", 0),
    (36, table("TARG", 0, 8, 32), "Q", 2**40 + 1),
    (36, table("TARG", 0, 16, 32), "H", 1),
    (36, table("TARG", 0, 22, 32), "B", 9),
    (36, table("TARG", 0, 23, 32), "B", 2),
    (37, table("TARG", 0, 28, 32), "I", 1),
    (37, table("RUNS", 0, 5, 8), "B", 1),
    (40, table("RUNS", 0, 0, 8), "I", 0),
    (41, table("LAYO", 0, 8, 16), "I", 0),
    (41, table("LAYO", 0, 0, 16), "Q", 2**64 - 1),
    (41, table("LAYO", 0, 12, 16), "I", 77),
    (42, table("FORM", 0, 0, 40), "d", float("inf")),
    (42, table("FORM", 0, 8, 40), "I", 0),
    (42, table("FORM", 0, 8, 40), "I", 2**20 + 1),
    (42, table("FORM", 0, 16, 40), "I", 1000),
    (42, table("FORM", 0, 32, 40), "B", 4),
    (43, table("FORM", 1, 20, 40), "I", 0),
    (50, table("FRAM", 0, 16, 88), "I", 7),
    (51, table("FRAM", 0, 24, 88), "Q", 0),
    (51, table("FRAM", 0, 24, 88), "Q", 6),
    (51, table("FRAM", 0, 36, 88), "I", 2**32 - 1),
    (51, table("FRAM", 0, 48, 88), "I", 1),
    (52, table("FRAM", 0, 8, 88), "Q", 2**64 - 1),
    (55, table("TASK", 0, 56, 64), "I", 500),
    (56, table("TASK", 0, 16, 64), "Q", 1),
    (56, table("TASK", 0, 24, 64), "Q", 2**64 - 1),
    (56, table("TASK", 0, 48, 64), "Q", 2),
    (57, table("TLST", 0, 0, 4), "I", 2),
    (57, table("TASK", 0, 32, 64), "Q", 2**64 - 1),
    (58, table("TASK", 0, 8, 64), "Q", 8),
    (60, table("ENTR", 0, 8, 16), "I", 40),
    (60, table("ENTR", 1, 8, 16), "I", 0),
    (65, table("PRIV", 0, 4, 24), "I", 3),
    (65, table("PRIV", 0, 8, 24), "B", 0),
    (65, table("PRIV", 0, 9, 24), "B", 9),
    (65, table("PRIV", 0, 16, 24), "Q", 2**64 - 1),
    (66, table("DIMS", 0, 0, 8), "Q", 2**63),
    (66, table("DIMS", 0, 0, 8), "Q", 3),
    (71, table("BLOB", 0, 0, 24), "Q", 632),
    (71, table("free", 0, 8, 24), "Q", 0),
]


@pytest.mark.parametrize(("rule", "offset", "code", "value"), BROKEN)
def test_a_reader_names_the_rule(rule: int, offset: int, code: str, value: object) -> None:
    data = build.patched(DATA, offset, code, value) if rule not in (1, 13, 14, 16, 17) else None
    if (
        data is None
    ):  # what seal() would follow is broken: only the slot and the preamble are sealed
        out = bytearray(DATA)
        struct.pack_into("<" + code, out, offset, value)
        struct.pack_into("<I", out, SLOT + 124, build.crc32c(out[SLOT : SLOT + 124]))
        data = bytes(out)
    assert rule in rules(data)
    error = refusal(data)
    assert error.rule == f"RMM-{rule:03d}"
    assert error.offset is not None
    assert error.offset <= len(data)
    unsupported = rule in (2, 3, 23) or (rule == 36 and value == 9)
    assert isinstance(error, errors.UnsupportedError if unsupported else errors.FormatError)
    if rule == 13:
        assert isinstance(error, errors.TruncatedError)


def test_every_flipped_bit_is_found() -> None:
    assert _native.validate_bytes(DATA) == []
    for at in range(len(DATA)):
        for bit in range(8):
            data = bytearray(DATA)
            data[at] ^= 1 << bit
            assert _native.validate_bytes(data), (at, bit)


def test_every_truncation_is_found() -> None:
    for n in range(len(DATA)):
        found = rules(DATA[:n])
        assert found == {1 if n < 8 else 13}, n
        with pytest.raises(errors.FormatError):
            _native.File.from_buffer(DATA[:n])
    # With growth_limit below the file's size nothing can hide behind the end either.
    assert rules(DATA + b"x") == {14}


@pytest.mark.parametrize("value", [0, 0x7F, 0x80, 0xFF])
def test_hostile_bytes_with_right_checksums(value: int) -> None:
    """Every byte of header and index overwritten, checksums put right: no crash, and one answer."""
    for at in [*range(64, 188), *range(INDEX, len(DATA))]:
        out = bytearray(DATA)
        out[at] = value
        try:
            data = build.seal(out)
        except (struct.error, ValueError, OverflowError):
            continue
        except MemoryError:
            continue
        found = rules(data)
        if found == {26}:
            continue  # a reader checks the limit, a validator the stream too
        if found <= {12, 15, 80, 81, 82, 83, 85, 86, 90, 92}:
            read(data)  # what only validators check does not stop a reader
        else:
            assert int(refusal(data).rule[4:]) in found


def test_payload_rules() -> None:
    frame = struct.unpack_from("<Q", DATA, AT["FRAM"][1])[0]
    run = struct.unpack_from("<Q", DATA, AT["TASK"][1])[0]
    blob = struct.unpack_from("<Q", DATA, AT["BLOB"][1])[0]
    free = struct.unpack_from("<Q", DATA, AT["free"][1])[0]
    for rule, at in ((81, frame), (80, run), (82, blob), (83, free)):
        data = bytearray(DATA)
        data[at] ^= 64
        violations = _native.validate_bytes(data)
        assert {v.rule for v in violations} == {rule}
        assert violations[0].offset == at
        file = _native.File.from_buffer(data)
        if rule == 83:
            file.check_task(0)
            continue
        with pytest.raises(errors.ChecksumError) as caught:
            file.check_task(0)
        assert caught.value.rule == f"RMM-{rule:03d}"


@pytest.mark.parametrize("bits", range(1, 9))
def test_blocks_of_codes(bits: int) -> None:
    n = 40
    good = build.random_row(np.random.default_rng(bits), build.QUANTISED[bits], n).data

    def broken(data: bytes) -> set[int]:
        row = build.Row(build.QUANTISED[bits], data, None)
        entry = build.Entry(0, 1, build.Factor(None, [row]), build.Factor())
        return rules(
            build.Collection([build.Target("t", n, 1)], [], [build.Task("x", [entry])]).build()
        )

    assert broken(good) == set()
    size = 2 + 4 * bits
    for block in (0, 1):
        for scale in (b"\x00\x7c", b"\x01\xfc"):
            assert broken(good[: block * size] + scale + good[block * size + 2 :]) == {86}
    for i in range(8, 32):
        for bit in range(bits):
            at = (i % 16) * 8 + (i // 16) * 4 + bit if bits == 4 else i * bits + bit
            data = bytearray(good)
            data[size + 2 + at // 8] |= 1 << (at % 8)
            assert broken(bytes(data)) == {86}


def test_two_slots() -> None:
    newer = build.tiny(sequence=2).build()
    both = bytearray(newer)
    both[64:192] = DATA[64:192]  # an older slot, whatever it says
    assert _native.validate_bytes(both) == []
    file = _native.File.from_buffer(both)
    assert not file.damaged_slot
    torn = bytearray(both)
    torn[70:120] = bytes(50)
    file = _native.File.from_buffer(torn)
    assert file.damaged_slot
    assert file.task_names() == ["one", "two"]
    assert rules(torn) == {12}
    torn[520:600] = b"\x55" * 80
    error = refusal(bytes(torn))
    assert error.rule == "RMM-010"
    wrong = bytearray(DATA)
    struct.pack_into("<Q", wrong, 64, 2)
    struct.pack_into("<I", wrong, 188, build.crc32c(wrong[64:188]))
    assert refusal(bytes(wrong)).rule == "RMM-011"
    unused = build.patched(DATA, 64 + 60, "I", 5)
    assert rules(unused) == {15}
    _native.File.from_buffer(unused)


def test_scratch_is_ignored() -> None:
    data = build.tiny(scratch=b"half-written").build()
    assert _native.validate_bytes(data) == []
    assert _native.validate_bytes(data[:-3]) == []


def unknown_encoding() -> bytes:
    data = build.tiny().build()
    at = build.sections_of(data)["RUNS"][1]
    last = build.sections_of(data)["RUNS"][2] // 8 - 1
    return build.patched(data, at + 8 * last + 4, "B", 0x7E)


def test_an_unknown_encoding_refuses_what_uses_it_alone() -> None:
    data = unknown_encoding()
    file = _native.File.from_buffer(data)
    with pytest.raises(errors.UnsupportedError) as caught:
        file.load_task(0, 1, bytearray(file.entries(0, 1)[1]))
    assert caught.value.rule == "RMM-088"
    assert "0x7e" in str(caught.value)
    assert "target u" in str(caught.value)
    file.load_task(1, 1, bytearray(file.entries(1, 1)[1]))
    assert rules(data) == {88}


def test_an_unknown_optional_section_is_skipped() -> None:
    data = build.tiny(extra_sections=[(b"xTra", b"anything")]).build()
    assert _native.validate_bytes(data) == []
    _native.File.from_buffer(data)


def test_a_later_minor_version_is_read() -> None:
    data = build.tiny(minor=3).build()
    assert _native.validate_bytes(data) == []
    assert _native.File.from_buffer(data).task_names() == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (b"{}", True),
        (b' {"a" : [1, -0.5e-3, true, false, null, "\\u00e9\\ud83d\\ude00\\n"]} ', True),
        (b'{"a":{"a":1},"b":{"a":1}}', True),
        (b'{"a":1e308,"b":1.7976931348623157e308,"c":1e-999}', True),
        (b"[" + b"]", False),
        (b'{"a":1,"a":2}', False),
        (b'{"a":1,"\\u0061":2}', False),
        (b"\xef\xbb\xbf{}", False),
        (b'{"a":NaN}', False),
        (b'{"a":Infinity}', False),
        (b'{"a":1e999}', False),
        (b'{"a":1.8e308}', False),
        (b'{"a":"\\ud800"}', False),
        (b'{"a":"\xff"}', False),
        (b'{"a":"\xc0\x80"}', False),
        (b"{} {}", False),
        (b'{"a":01}', False),
        (b'{"a":1,}', False),
        (b'{"a"}', False),
        (b"{a:1}", False),
        (b'{"a":"\t"}', False),
        (b'{"a":"x', False),
        (b"{", False),
        (b'{"a":', False),
        (b'{"a":+1}', False),
        (b'{"a":.5}', False),
        (b'{"a":' + b"[" * 15 + b"]" * 15 + b"}", True),
        (b'{"a":' + b"[" * 16 + b"]" * 16 + b"}", False),
        (b'{"a":' * 100_000, False),
        (b"nonsense", False),
        (b'{"a":tru}', False),
    ],
)
def test_metadata(text: bytes, good: bool) -> None:
    for deflate in (False, True):
        if deflate and len(text) > 256 * len(zlib.compress(text, 9)) + 65536:
            continue  # RMM-026 comes first
        found = rules(build.tiny(meta=text, deflate=deflate).build())
        assert found == (set() if good else {90}), text[:40]


def test_deflated_sections() -> None:
    """Streams are decoded by the validator alone, and must be whole."""
    rng = np.random.default_rng(0)
    texts = [
        b'{"a":"' + rng.choice(list(b"abc "), n).astype(np.uint8).tobytes() + b'"}'
        for n in (0, 10, 3000, 70_000)
    ]
    for text in texts:
        for level in (0, 1, 6, 9):
            stored = zlib.compress(text, level)
            data = with_stream(stored, len(text))
            assert rules(data) == set(), (len(text), level)
            assert rules(with_stream(stored, len(text) + 1)) == {26}
            assert rules(with_stream(stored, len(text) - 1)) == {26}
            assert rules(with_stream(stored + b"\0", len(text))) == {26}
            assert rules(with_stream(stored[:-1], len(text))) == {26}
            for _ in range(100):
                at = int(rng.integers(len(stored)))
                broken = bytearray(stored)
                broken[at] ^= 1 << int(rng.integers(8))
                assert rules(with_stream(bytes(broken), len(text))) == oracle(
                    bytes(broken), len(text)
                )
    fixed = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_FIXED)
    stream = fixed.compress(texts[2]) + fixed.flush()
    assert rules(with_stream(stream, len(texts[2]))) == set()
    bomb = zlib.compress(b'{"a":"' + b"a" * 3_000_000 + b'"}', 9)
    assert refusal(with_stream(bomb, 3_000_008)).rule == "RMM-026"


def oracle(stream: bytes, count: int) -> set[int]:
    """What Python's zlib says; bits of padding may flip unseen."""
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(stream)
    except zlib.error:
        return {26}
    return set() if decoder.eof and not decoder.unused_data and len(text) == count else {26}


def with_stream(stream: bytes, count: int) -> bytes:
    """A file whose section meta is a zlib stream that claims `count` bytes."""
    data = build.tiny(meta=stream).build()
    at = build.sections_of(data)["meta"][0]
    return build.patched(build.patched(data, at + 4, "I", 1), at + 24, "Q", count)


def test_errors_of_entries() -> None:
    assert rules(build.tiny(errors=[0.5, float("nan"), float("inf")]).build()) == set()
    assert rules(build.tiny(errors=[0.5, -0.25, 0.0]).build()) == {92}
    assert rules(build.tiny(errors=[0.5]).build()) == {92}


def test_a_small_file_cannot_ask_for_much() -> None:
    target = build.Target("t", 2**40, 2**40)
    entry = build.Entry(0, 1, build.Factor(), build.Factor())
    data = build.Collection([target], [], [build.Task("x", [entry])]).build()
    assert refusal(data).rule == "RMM-062"
    n = 4096
    zeros = [build.Row(0, b"", np.zeros(n, "f4"))]
    part = build.Part(n, 1, 2000, None, zeros * 2000)
    own = build.Factor([build.Row(0, b"", np.zeros(1, "f4"))] * 2000)
    target = build.Target("t", n, 1)
    data = build.Collection(
        [target],
        [build.Frame(0, part, None)] * 1,
        [build.Task("x", [build.Entry(0, 1, own, build.Factor(), cluster=1)])],
    ).build()
    assert rules(data) == set()  # 8 M products of a file of 1.2 kB
    part = build.Part(n, 1, 20_000, None, zeros * 20_000)
    own = build.Factor([build.Row(0, b"", np.zeros(1, "f4"))] * 20_000)
    data = build.Collection(
        [target],
        [build.Frame(0, part, None)],
        [build.Task("x", [build.Entry(0, 1, own, build.Factor(), cluster=1)])],
    ).build()
    assert rules(data) == {63}
    shared = [build.Private(f"p{i:03d}", 6, (60_000,), b"\1" * 60_000) for i in range(1200)]
    data = build.Collection([], [], [build.Task("x", [], shared)]).build()
    assert rules(data) == {64} if 1024 * len(data) < 1200 * 60_000 else rules(data) == set()


def test_violations_without_end_are_cut() -> None:
    targets = [build.Target(f"t{i:05d}", 4, 4) for i in range(3000)]
    data = bytearray(build.Collection(targets, [], []).build())
    _, offset, length = build.sections_of(data)["TARG"]
    for at in range(offset, offset + length, 32):
        data[at + 28] = 1
    assert len(_native.validate_bytes(build.seal(data))) == 1000
