"""Damage by machine: the reference reader finds every flipped bit and every cut."""

from __future__ import annotations

import random

import google_crc32c
import pytest
import reference
from vectors import BY_ID

SMALL = BY_ID["v-tiny"].data


def test_crc32c_is_that_of_another_library() -> None:
    source = random.Random(1)  # noqa: S311
    for n in [*range(70), 511, 8191, 8192, 8193, 70001]:
        data = source.randbytes(n)
        assert reference.crc32c(data) == google_crc32c.value(data), n


def test_every_flipped_bit_is_found() -> None:
    missed = []
    for position in range(len(SMALL)):
        for bit in range(8):
            damaged = bytearray(SMALL)
            damaged[position] ^= 1 << bit
            if not reference.validate(bytes(damaged)):
                missed.append((position, bit))
    assert missed == []


def test_every_cut_is_refused() -> None:
    for length in range(len(SMALL)):
        with pytest.raises(reference.Refused) as caught:
            reference.open_file(SMALL[:length])
        assert caught.value.rule == ("RMM-001" if length < 8 else "RMM-013")


@pytest.mark.parametrize("name", ["v-small", "v-minor-1", "v-deflated"])
@pytest.mark.parametrize("value", [0x00, 0x7F, 0xFF])
def test_overwritten_bytes_give_one_clear_answer(name: str, value: int) -> None:
    data = BY_ID[name].data
    for position in range(0, len(data), 1 if position_matters(name) else 3):
        damaged = bytearray(data)
        damaged[position] = value
        try:
            collection = reference.open_file(bytes(damaged))
            for task in collection.tasks:
                collection.load(task)
        except reference.Refused:
            pass


def position_matters(name: str) -> bool:
    """Every byte of the first, every third of the others: seconds, not minutes."""
    return name == "v-small"


def test_right_checksums_do_not_help_a_hostile_index() -> None:
    """Overwrite each byte of the index and make all checksums right again."""
    import struct

    data = BY_ID["v-small"].data
    start, length, n_sections = struct.unpack_from("<QQQ", data, 64 + 24)
    for position in range(start, start + length):
        damaged = bytearray(data)
        damaged[position] = (damaged[position] + 0x7F) & 0xFF
        for i in range(n_sections):
            at = start + 40 * i
            offset, size = struct.unpack_from("<QQ", damaged, at + 8)
            if offset + size <= len(damaged) and not at + 36 <= position < at + 40:
                crc = reference.crc32c(bytes(damaged[offset : offset + size]))
                struct.pack_into("<I", damaged, at + 36, crc)
        crc = reference.crc32c(bytes(damaged[start : start + 40 * n_sections]))
        struct.pack_into("<I", damaged, 64 + 52, crc)
        struct.pack_into("<I", damaged, 64 + 124, reference.crc32c(bytes(damaged[64:188])))
        found = {rule for rule, _, _ in reference.validate(bytes(damaged))}
        assert not found & {"RMM-001", "RMM-010", "RMM-020"}
        try:
            collection = reference.open_file(bytes(damaged))
            for task in collection.tasks:
                collection.load(task)
                collection.privates(task)
        except reference.Refused:
            pass


@pytest.mark.parametrize("name", ["v-encoding-trellis", "v-trellis-mode-1"])
def test_damaged_payload_loads_or_is_refused(name: str) -> None:
    """Loading does not look at checksums, so that every byte of the payload is hostile here."""
    data = BY_ID[name].data
    entry = reference.open_file(data).table["TASK"][0]
    for position in range(entry.offset, entry.offset + entry.length):
        for value in (0x00, 0xFF, data[position] ^ 1):
            damaged = bytearray(data)
            damaged[position] = value
            collection = reference.open_file(bytes(damaged))
            try:
                collection.load("task")
            except reference.Refused as refused:
                assert refused.rule in ("RMM-087", "RMM-061")  # noqa: PT017
