"""Every flipped bit and every cut of a whole file is found; all of them in ``make trust``."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

import rmmformat as rmm
from rmmformat import _native
from rmmformat.errors import FormatError, UnsupportedError
from rmmformat.format.validate import validate_bytes

from ..growth.conftest import add, first_file, remove

LONG = "RMM_TRUST" in os.environ
TINY = Path(__file__).parents[2] / "spec" / "vectors" / "valid" / "v-tiny.rmm"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny file; one of shared frames, private tensors and what growth left; one of trellis."""
    folder = tmp_path_factory.mktemp("damage")
    grown, planned = folder / "grown.rmm", folder / "planned.rmm"
    first_file(grown)
    add(grown)
    remove(grown)
    adapters = Path(__file__).parents[1] / "data" / "demo-adapters"
    rmm.convert([adapters / "bbc", adapters / "imdb"], planned, max_error="50%")
    return {"tiny": TINY.read_bytes(), "grown": grown.read_bytes(), "planned": planned.read_bytes()}


@pytest.mark.parametrize("name", ["tiny", "grown", "planned"])
def test_every_flipped_bit_is_found(files: dict[str, bytes], name: str) -> None:
    """In the tiny file all, in the others one in so many unless there is time."""
    data = bytearray(files[name])
    step = 1 if LONG or name == "tiny" else 211
    missed, n = [], 0
    for bit in range(0, 8 * len(data), step):
        data[bit // 8] ^= 1 << bit % 8
        if not _native.validate_bytes(data):
            missed.append(bit)
        data[bit // 8] ^= 1 << bit % 8
        n += 1
    assert missed == []
    assert _native.validate_bytes(data) == []
    sys.stdout.write(f"{name}: {n} flipped bits of {len(data)} bytes, all found (native)\n")


@pytest.mark.parametrize("name", ["tiny", "grown", "planned"])
def test_flipped_bits_are_found_in_python_too(files: dict[str, bytes], name: str) -> None:
    """One bit of each byte, or of one byte in so many."""
    data, choose = bytearray(files[name]), random.Random(name)  # noqa: S311
    step = 1 if LONG else 7 if name == "tiny" else 1009
    missed, n = [], 0
    for at in range(0, len(data), step):
        bit = 1 << choose.randrange(8)
        data[at] ^= bit
        if validate_bytes(bytes(data)).ok:
            missed.append(at)
        data[at] ^= bit
        n += 1
    assert missed == []
    sys.stdout.write(f"{name}: {n} flipped bits of {len(data)} bytes, all found (Python)\n")


@pytest.mark.parametrize("name", ["tiny", "grown", "planned"])
def test_every_cut_is_refused(files: dict[str, bytes], name: str) -> None:
    data = files[name]
    step = 1 if LONG or name == "tiny" else 97
    n = 0
    for length in range(0, len(data), step):
        short = data[:length]
        assert _native.validate_bytes(short), length
        assert not validate_bytes(short).ok, length
        with pytest.raises(FormatError) as caught:
            rmm.open(short)
        assert caught.value.rule == ("RMM-001" if length < 8 else "RMM-013")
        n += 1
    sys.stdout.write(f"{name}: {n} cuts of {len(data)} bytes, all refused\n")


@pytest.mark.parametrize("name", ["grown", "planned"])
def test_bursts_of_noise_load_or_are_refused(files: dict[str, bytes], name: str) -> None:
    """Loading looks at no payload checksum: it gives values or one clear error."""
    choose = random.Random(name)  # noqa: S311
    n_loaded = n_refused = 0
    rules = set()
    for _ in range(20_000 if LONG else 200):
        data = bytearray(files[name])
        at, size = choose.randrange(len(data)), choose.choice((1, 8, 64, 512))
        data[at : at + size] = choose.randbytes(len(data[at : at + size]))
        try:
            with rmm.open(bytes(data)) as collection:
                for task in collection.tasks:
                    collection.load(task)
                    collection.privates(task)
            n_loaded += 1
        except (FormatError, UnsupportedError) as error:
            rules.add(error.rule)
            n_refused += 1
    assert None not in rules
    assert n_loaded
    assert n_refused
    sys.stdout.write(f"{name}: {n_loaded} damaged files loaded, {n_refused} refused\n")
