"""The trellis encoding (8.3): readers agree on every run, damaged or not."""

from __future__ import annotations

from random import Random
from typing import Any

import drafts
import numpy as np
import numpy.typing as npt
import pytest
import reference
from readers import ADAPTERS, Refusal
from reference_trellis import trellis_run
from vectors import BY_ID

native = pytest.importorskip("rmmformat._native")
encodings = pytest.importorskip("rmmformat.format.encodings")
errors = pytest.importorskip("rmmformat.errors")

NUMBERS = [*range(1, 113), *range(129, 241)]


def drawn(random: Random, n_rows: int, n: int) -> drafts.Trellis:
    """A run as the format's own packer makes it, with indices from anywhere in the tables."""
    rows: list[tuple[int, list[int]] | None] = []
    for _ in range(n_rows):
        number = random.choice([0, *random.sample(NUMBERS, 3)])
        rows.append((number, drafts.draw(random, number, n)) if number else None)
    if not any(rows):
        rows[0] = (12, drafts.draw(random, 12, n))
    base = random.randrange(30 << 7, 230 << 7) | random.getrandbits(1) << 15
    return drafts.Trellis(rows, n, base)


def by_reference(data: bytes, k: int, n: int) -> tuple[int, npt.NDArray[np.float32]] | None:
    """Bytes and rows, None if the run is refused."""
    try:
        n_bytes, coded = trellis_run(data, k, n)
    except ValueError:
        return None
    rows = np.zeros((k, n), np.float32)
    for number, row in coded.items():
        rows[number] = row
    return n_bytes, rows


def by_native(data: bytes, k: int, n: int) -> tuple[int, npt.NDArray[np.float32]] | None:
    """The same by the compiled core, which has three ways to look at a run."""
    try:
        rows, n_bytes = native.trellis_decode(data, k, n)
    except errors.FormatError:
        with pytest.raises(errors.FormatError):
            native.trellis_check(data, k, n)
        return None
    native.trellis_check(data, k, n)
    assert native.trellis_run_bytes(data) == n_bytes
    return n_bytes, rows


def by_python(data: bytes, k: int, n: int) -> tuple[int, npt.NDArray[np.float32]] | None:
    encoding = encodings.by_name("trellis")
    try:
        n_bytes = encoding.run_bytes(data, k, n)
        whole = data[:n_bytes]
        if encoding.check(whole, k, n) is not None:
            with pytest.raises(errors.FormatError):
                encodings.decode_run(encoding.code, whole, k, n)
            return None
        return n_bytes, encodings.decode_run(encoding.code, whole, k, n)
    except errors.FormatError:
        return None


def agree(data: bytes, k: int, n: int) -> bool:
    """All three give one answer; whether it is rows."""
    expected = by_reference(data, k, n)
    for reader in (by_native, by_python):
        answer = reader(data, k, n)
        assert (answer is None) == (expected is None), reader.__name__
        if answer is not None and expected is not None:
            assert answer[0] == expected[0]
            assert answer[1].dtype == np.float32
            assert (answer[1].view(np.uint32) == expected[1].view(np.uint32)).all()
    return expected is not None


def damaged(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    if random.random() < 0.2:
        del changed[random.randrange(len(changed)) :]
    if random.random() < 0.1:
        changed += random.randbytes(random.randrange(1, 5))
    for _ in range(random.randrange(3)):
        if changed:
            # The head is a small part of a run and holds most of what can be checked.
            end = min(len(changed), 20) if random.random() < 0.5 else len(changed)
            position = random.randrange(end)
            changed[position] = random.choice(
                [changed[position] ^ 1 << random.randrange(8), 0, 0xFF, random.randrange(256)]
            )
    return bytes(changed)


def test_runs_decode_to_what_was_packed() -> None:
    random = Random(5)  # noqa: S311
    for n in (1, 2, 3, 7, 31, 33, 100, 384):
        for n_rows in (1, 2, 5, 16):
            run = drawn(random, n_rows, n)
            answer = by_native(run.raw() + b"\0\1\2", n_rows, n)
            assert answer is not None
            assert answer[0] == len(run.raw())
            wanted = np.array(run.values(), np.float32)
            assert (answer[1].view(np.uint32) == wanted.view(np.uint32)).all()
            assert agree(run.raw(), n_rows, n)


def test_damaged_runs_get_one_answer() -> None:
    random = Random(6)  # noqa: S311
    shapes = [(random.randrange(1, 7), random.choice([1, 5, 12, 40])) for _ in range(60)]
    runs = [(drawn(random, *shape).raw(), *shape) for shape in shapes]
    accepted = 0
    for _ in range(3000):
        data, k, n = random.choice(runs)
        accepted += agree(damaged(random, data), k, n)
    assert 300 < accepted < 2700  # both answers occur


@pytest.mark.parametrize(("n_rows", "n"), [(2, 8200), (3, 21900)])
def test_damaged_runs_of_many_lanes_get_one_answer(n_rows: int, n: int) -> None:
    random = Random(7)  # noqa: S311
    rows = [(number, drafts.draw(random, number, n)) for number in (4, 40, 133)[:n_rows]]
    data = drafts.Trellis(rows, n).raw()
    assert agree(data, n_rows, n)
    for _ in range(8):
        changed = bytearray(data)
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        agree(bytes(changed), n_rows, n)


def test_every_cut_of_a_run_is_refused() -> None:
    run = drafts.Trellis([(12, drafts.draw(Random(8), 12, 90)), None], 90).raw()  # noqa: S311
    for length in range(len(run)):
        assert not agree(run[:length], 2, 90)


@pytest.mark.parametrize("n", [10**6, 1 << 40, 1 << 59])
def test_a_short_run_does_not_ask_for_much_memory(n: int) -> None:
    run = drafts.Trellis([(1, [0] * 40), None], 40)
    # With the states of 16 lanes the run has all that its head needs.
    body = bytes([0x80, 0x3F, 1, 0]) + b"\0\0\1\0" * 16 + b"\0\0" * 4
    for data in (run.raw(), bytes([len(body)]) + body):
        with pytest.raises(errors.FormatError) as caught:
            native.trellis_decode(data, 2, n)
        assert caught.value.rule == "RMM-087"
        with pytest.raises(errors.FormatError):
            native.trellis_check(data, 2, n)


def loaded(adapter: Any, data: bytes) -> list[bytes] | str:
    """Factors of the first task as bytes, or that they are refused."""
    opened = adapter.open(data)
    try:
        values = adapter.load(opened, adapter.tasks(opened)[0])
    except Refusal as refusal:
        # A shorter run breaks two rules, and a reader may name either.
        return "refused" if refusal.rule in ("RMM-087", "RMM-061") else str(refusal)
    return [np.ascontiguousarray(x).tobytes() for e in values.entries for x in (e.A, e.B)]


@pytest.mark.parametrize(
    ("name", "rounds"), [("v-encoding-trellis", 300), ("v-trellis-mode-1", 200)]
)
def test_damaged_files_get_one_answer(name: str, rounds: int) -> None:
    """Loading looks at no checksum: payload is as hostile as it can be."""
    adapters = [adapter() for adapter in ADAPTERS]
    data = BY_ID[name].data
    entry = reference.open_file(data).table["TASK"][0]
    random, seen = Random(name), set()  # noqa: S311
    for _ in range(rounds):
        changed = bytearray(data)
        for _ in range(random.randrange(1, 3)):
            position = entry.offset + random.randrange(entry.length)
            changed[position] ^= 1 << random.randrange(8)
        answers = [loaded(adapter, bytes(changed)) for adapter in adapters]
        assert all(answer == answers[0] for answer in answers)
        seen.add("refused" if answers[0] == "refused" else "loaded")
    assert seen == {"refused", "loaded"}
