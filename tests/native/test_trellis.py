"""The encoder of trellis runs: rate, determinism, choice of tables, refusals."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rmmformat import _native
from rmmformat.errors import LayoutError, OptionError, ShapeError
from rmmformat.format.encodings import by_name, decode_run, encode_run
from rmmformat.format.trellis import encode_rows, gaussian_table, run_overhead, table_bits

GOLDEN = "9574033025c50a411fca41dae6f6b9bbee09d7f2a92aeb160e936bd10c1624b9"


def gaussian(k: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


def integers(k: int, n: int) -> np.ndarray:
    """Bell-shaped numbers that no library can round in its own way."""
    state, out = np.uint64(1), np.empty(k * n, np.float32)
    with np.errstate(over="ignore"):
        for i in range(k * n):
            total = 0
            for _ in range(4):
                state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                total += int(state >> np.uint64(54))
            out[i] = (total - 2046) / 256
    return out.reshape(k, n)


def read_back(run: bytes, decoded: np.ndarray) -> None:
    rows, n_bytes = _native.trellis_decode(run, *decoded.shape)
    assert n_bytes == len(run)
    assert (rows.view(np.uint32) == decoded.view(np.uint32)).all()


def gap(run: bytes, rows: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
    """Bits a value, and how many of them the bound of a Gaussian source does without."""
    bits = 8 * len(run) / rows.size
    wide = rows.astype(np.float64)
    error = np.square(wide - decoded).mean() / np.square(wide).mean()
    return bits, bits + 0.5 * np.log2(error)


@pytest.mark.parametrize(("bits", "step"), [(1, 0.45), (2, 0.258), (4, 0.0645)])
@pytest.mark.parametrize("tied", [False, True])
def test_rate_is_near_the_bound(bits: float, step: float, tied: bool) -> None:
    rows = gaussian(8, 8192)
    run, decoded = encode_rows(rows, np.full(8, step), tied=tied)
    read_back(run, decoded)
    actual, lost = gap(run, rows, decoded)
    assert abs(actual - bits) < 0.1
    assert 0 < lost < 0.06


def test_rows_of_many_spreads_share_a_step() -> None:
    rows = gaussian(12, 600) * (2.0 ** np.arange(-2, 10))[:, None].astype(np.float32)
    run, decoded = encode_rows(rows, np.full(12, 0.2), tied=False)
    read_back(run, decoded)
    errors = np.sqrt(np.square(rows.astype(np.float64) - decoded).mean(axis=1))
    assert (np.abs(errors[2:] / 0.2 - 1) < 0.15).all()


def test_steps_are_tied_to_tables() -> None:
    rows = gaussian(9, 700)
    steps = 0.3 * 2.0 ** (-np.arange(9) / 4)
    run, decoded = encode_rows(rows, steps, tied=True)
    read_back(run, decoded)
    errors = np.sqrt(np.square(rows.astype(np.float64) - decoded).mean(axis=1))
    assert (np.abs(errors / steps - 1) < 0.15).all()


@pytest.mark.parametrize("tied", [False, True])
def test_heavy_tails_take_the_exponential_tables(tied: bool) -> None:
    rows = np.random.default_rng(3).laplace(size=(4, 3000)).astype(np.float32)
    run, decoded = encode_rows(rows, np.full(4, 0.4), tied=tied)
    read_back(run, decoded)
    assert run[0] >= 128 > run[1]  # the length takes two bytes, the base two more
    assert all(number > 128 for number in run[4:8])


def test_zero_rows_cost_a_byte() -> None:
    rows = gaussian(3, 500)
    with_zeros = np.insert(rows, [0, 2, 2], 0, axis=0)
    run, decoded = encode_rows(with_zeros, np.full(6, 0.2), tied=False)
    plain, _ = encode_rows(rows, np.full(3, 0.2), tied=False)
    read_back(run, decoded)
    assert len(run) == len(plain) + 3
    assert (decoded[[0, 3, 4]].view(np.uint32) == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e28])
@pytest.mark.parametrize("tied", [False, True])
def test_scale_does_not_matter(scale: float, tied: bool) -> None:
    rows = gaussian(4, 900) * np.float32(scale)
    run, decoded = encode_rows(rows, np.full(4, 0.2 * scale), tied=tied)
    read_back(run, decoded)
    assert gap(run, rows, decoded)[1] < 0.12


def test_outliers_are_reached() -> None:
    rows = gaussian(2, 400)
    rows[0, 7], rows[1, 9] = 3e5, -1e6
    run, decoded = encode_rows(rows, np.full(2, 0.25), tied=False)
    read_back(run, decoded)
    assert np.abs(decoded - rows).max() < 2


def told(length: int) -> bytes:
    """A length as runs begin with it."""
    out = bytearray()
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes([*out, length])


@pytest.mark.parametrize("step", [3.0, 0.9, 0.3, 0.1, 0.02, 0.004, 0.0007])
@pytest.mark.parametrize("n", [4096, 4099, 5000, 12_345])
def test_kernels_give_the_same_bits(step: float, n: int) -> None:
    rows = gaussian(17, n, seed=n) * np.exp(gaussian(17, 1, seed=1))
    rows[2], rows[5, ::501] = 0, 700 * step  # a row of zeros, and escapes
    rows[9] = np.random.default_rng(2).laplace(size=n)
    run, decoded = encode_rows(rows, np.full(17, step), tied=False)
    names = _native.trellis_kernels()
    assert names[0] == "portable"
    for name in names:
        found, n_bytes = _native.trellis_decode(run, *rows.shape, kernels=name)
        assert n_bytes == len(run)
        assert (found.view(np.uint32) == decoded.view(np.uint32)).all(), name
    # What lacks words or has too many is malformed for all of them, and none reads behind it.
    head = next(i for i, byte in enumerate(run) if byte < 128) + 1
    for body in (run[head:-2], run[head : head + len(run) // 4 * 2], run[head:] + b"\0\0"):
        for name in names:
            with pytest.raises(LayoutError, match="trellis run"):
                _native.trellis_decode(told(len(body)) + body, *rows.shape, kernels=name)


def test_there_are_no_kernels_of_other_names() -> None:
    with pytest.raises(ValueError, match="no such kernels"):
        _native.trellis_decode(b"\0" * 100, 1, 1, kernels="abacus")


def test_the_same_bytes_everywhere() -> None:
    """Native coding is defined down to the rounding; a change of these bytes is a new encoder."""
    rows = integers(6, 3000)
    tables = np.array([18, 0, 20, 26, 150, 40], np.uint8)
    rows[1] = 0
    run, decoded = _native.trellis_encode(rows, tables, 0x3E80, np.full(6, 1.6, np.float32), 3)
    read_back(run, decoded)
    assert hashlib.sha256(run).hexdigest() == GOLDEN


def test_threads_do_not_matter() -> None:
    jobs = [(gaussian(3, 800, seed), 0.1 * (1 + seed)) for seed in range(12)]

    def code(job: tuple[np.ndarray, float]) -> bytes:
        run, decoded = encode_rows(job[0], np.full(3, job[1]), tied=False)
        read_back(run, decoded)
        return run

    alone = [code(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(code, jobs)) == alone


def test_tables() -> None:
    for number in (1, 10, 33, 112, 129, 240):
        bits, raw_bits = table_bits(number)
        raw, frequencies, native_bits = _native.trellis_table(number)
        assert frequencies.sum() == 4096
        assert (raw, len(bits)) == (raw_bits, len(frequencies))
        assert (bits == native_bits).all()
        wanted = 12 - np.log2(frequencies) + raw_bits
        wanted[-1] += 16
        assert np.abs(bits - wanted).max() < 1e-4
    assert gaussian_table(1e-6, 1.0) == 1
    assert gaussian_table(1e9, 1.0) == 112
    for number in (0, 113, 128, 241, 256):
        with pytest.raises(ValueError, match="table numbers"):
            table_bits(number)


def test_overhead_is_what_values_do_not_take() -> None:
    rows = gaussian(40, 2000)
    number = gaussian_table(1.0, 0.25)
    bits, raw_bits = table_bits(number)
    run, decoded = _native.trellis_encode(
        rows, np.full(40, number, np.uint8), 0x3E80, np.full(40, 1.6, np.float32)
    )
    symbols = (np.abs(decoded) / 0.25).astype(np.int64) // 2 >> raw_bits
    entropy = bits[np.minimum(symbols, len(bits) - 1)].astype(np.float64).sum() / 8
    assert abs(len(run) - entropy - run_overhead(40, rows.size)) < 24


def test_refusals() -> None:
    rows = gaussian(2, 50)
    steps = np.full(2, 0.2)
    for bad in (np.zeros((2, 50), np.float32), rows * np.float32("inf"), rows * np.float32("nan")):
        with pytest.raises(OptionError):
            encode_rows(bad, steps, tied=False)
    for bad_steps in ([0.2, 0.3], [0.0, 0.0], [-1.0, -1.0], [np.nan] * 2, [1e-9] * 2, [1e-60] * 2):
        with pytest.raises(OptionError):
            encode_rows(rows, bad_steps, tied=False)
    with pytest.raises(OptionError):
        encode_rows(rows, [1e-60] * 2, tied=True)
    for shape in (rows[0], rows.astype(np.float64), rows[:1]):
        with pytest.raises(ShapeError):
            encode_rows(shape, steps, tied=False)


def test_native_arguments() -> None:
    rows, tables = gaussian(2, 50), np.full(2, 20, np.uint8)
    lambdas = np.full(2, 1.6, np.float32)
    for arguments in (
        (rows[0], tables, 0x3E80, lambdas),
        (rows, tables[:1], 0x3E80, lambdas),
        (rows, tables, 0x3E80, lambdas[:1]),
        (rows, tables, 1 << 16, lambdas),
        (rows, tables, 0, lambdas),
        (rows, tables, 231 << 7, lambdas),
        (rows, tables * 0, 0x3E80, lambdas),
        (rows, tables + 93, 0x3E80, lambdas),
        (rows, tables, 0x3E80, -lambdas),
        (rows, tables, 0x3E80, lambdas * np.float32("nan")),
        (rows, tables, 0x3E80, lambdas, 4),
        (rows[:, :0], tables, 0x3E80, lambdas),
        (rows[:0], tables[:0], 0x3E80, lambdas[:0]),
        (rows * np.float32(1e9), tables, 0x3E80, lambdas),
    ):
        with pytest.raises(ValueError):
            _native.trellis_encode(*arguments)
    run, _ = _native.trellis_encode(rows, tables, 0x3E80, lambdas)
    for k, n in ((0, 50), (2, 0)):
        with pytest.raises(ValueError):
            _native.trellis_decode(run, k, n)
    for data in (bytearray(run), memoryview(run), np.frombuffer(run, np.uint8)):
        assert _native.trellis_decode(data, 2, 50)[1] == len(run)


def test_the_registry_codes_rows_without_a_plan() -> None:
    rows = gaussian(5, 300) * np.array([1, 1, 1, 0.01, 0], np.float32)[:, None]
    code = by_name("trellis").code
    run = encode_run(code, rows)
    decoded = decode_run(code, run, 5, 300)
    assert np.square(decoded - rows).mean() < 0.1 * np.square(rows).mean()
    assert (decoded[3:] == 0).all()
    with pytest.raises(OptionError):
        encode_run(code, rows * 0)
