"""Reconstructed values, bit for bit against the formula written in numpy."""

from __future__ import annotations

import ml_dtypes
import native_build as build
import numpy as np
import pytest

from rmmformat import _native, errors

DTYPES = {1: np.dtype(np.float32), 2: np.dtype(np.float16), 3: np.dtype(ml_dtypes.bfloat16)}


def load(file: _native.File, task: int, dtype: int, threads: int = 1) -> list[list[np.ndarray]]:
    """A and B of every entry, both as (rank, L)."""
    entries, size = file.entries(task, dtype)
    arena = np.full(size, 0xCC, np.uint8)
    file.load_task(task, dtype, arena, threads)
    found = []
    for entry in entries:
        assert entry.offset_a % 64 == entry.offset_b % 64 == 0
        pair = []
        for offset, n in ((entry.offset_a, entry.n_in), (entry.offset_b, entry.n_out)):
            n_bytes = entry.rank * n * DTYPES[dtype].itemsize
            assert offset + n_bytes <= size
            pair.append(arena[offset : offset + n_bytes].view(DTYPES[dtype]))
        found.append(
            [pair[0].reshape(entry.rank, entry.n_in), pair[1].reshape(entry.n_out, entry.rank).T]
        )
    return found


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, but for those of NaNs."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    nan = np.isnan(want)
    assert (np.isnan(got) == nan).all()
    unsigned = f"u{got.dtype.itemsize}"
    got, want = np.ascontiguousarray(got).view(unsigned), np.ascontiguousarray(want).view(unsigned)
    assert (got[~nan] == want[~nan]).all()


def compare(collection: build.Collection, dtypes: tuple[int, ...] = (1, 2, 3)) -> None:
    data = collection.build()
    assert _native.validate_bytes(data) == []
    file = _native.File.from_buffer(data)
    for task in range(file.n_tasks):
        for dtype in dtypes:
            found = load(file, task, dtype)
            for j, pair in enumerate(found):
                for letter, got in zip("ab", pair, strict=True):
                    with np.errstate(all="ignore"):
                        same_bits(got, collection.evaluate(task, j, letter).astype(DTYPES[dtype]))


@pytest.mark.parametrize("seed", range(3))
def test_every_term_and_encoding(seed: int) -> None:
    compare(build.rich(seed))


@pytest.mark.parametrize("encoding", build.ALL_ENCODINGS, ids=hex)
def test_one_encoding(encoding: int) -> None:
    compare(build.rich(10, (encoding,)))


@pytest.mark.parametrize(
    "options",
    [{"deflate": True}, {"minor": 1}, {"scratch": b"left over"}, {"sequence": 2}],
    ids=str,
)
def test_forms_of_a_file(options: dict) -> None:
    compare(build.rich(4, **options), (1,))


def trellis(rng: np.random.Generator, n_rows: int, n: int) -> list[build.Row]:
    """A run of rows of many sizes, some of them zero."""
    values = rng.standard_normal((n_rows, n)).astype(np.float32)
    tables = np.array([0 if k % 3 == 2 else 20 + k for k in range(n_rows)], np.uint8)
    run, decoded = _native.trellis_encode(values, tables, 0x3E00, np.zeros(n_rows, np.float32))
    again, n_bytes = _native.trellis_decode(run, n_rows, n)
    assert n_bytes == len(run)
    assert again.tobytes() == decoded.tobytes()
    return build.trellis_run(decoded, run)


@pytest.mark.parametrize("n", [5, 700, 9000])
def test_trellis_runs_among_others(n: int) -> None:
    """In every array, before and behind runs of other encodings."""
    rng = np.random.default_rng(n)

    def mixed(n_rows: int, length: int) -> list[build.Row]:
        first = build.rows(rng, 2, length, (build.F16, build.ZERO))
        return [*first, *trellis(rng, n_rows - 3, length), *build.rows(rng, 1, length, (0x15,))]

    part = build.Part(1, 7, 1, mixed(7, n), mixed(7, n))
    other = build.Part(3, 6, 5, None, mixed(30, n))
    width = -(-n // 3)
    entries = [
        build.Entry(0, 5, build.Factor(trellis(rng, 1, n), mixed(5, n)), build.Factor(), cluster=1),
        build.Entry(
            1, 6, build.Factor(mixed(5, width)), build.Factor(None, mixed(6, 4)), cluster=1
        ),
    ]
    collection = build.Collection(
        [build.Target("t", n, 9), build.Target("u", n, 4)],
        [build.Frame(0, part, None), build.Frame(1, other, None)],
        [build.Task("x", entries)],
    )
    compare(collection)
    data = collection.build()
    file = _native.File.from_buffer(data)
    one = load(file, 0, 1, 1)
    assert [p.tobytes() for pair in load(file, 0, 1, 4) for p in pair] == [
        p.tobytes() for pair in one for p in pair
    ]


def test_a_damaged_trellis_run_is_named() -> None:
    rng = np.random.default_rng(0)
    own = build.Factor(None, trellis(rng, 4, 300))
    data = build.Collection(
        [build.Target("t", 300, 1)], [], [build.Task("x", [build.Entry(0, 4, own, build.Factor())])]
    ).build()
    run = own.residual[0].data
    start = data.index(run)
    n_named = 0
    for at in range(start, start + len(run)):
        broken = bytearray(data)
        broken[at] ^= 0x10
        rules = {violation.rule for violation in _native.validate_bytes(broken)}
        assert 80 in rules
        file = _native.File.from_buffer(broken)
        try:
            file.load_task(0, 1, bytearray(file.entries(0, 1)[1]))
        except errors.LayoutError as error:
            named = error
        else:
            continue
        assert named.rule in ("RMM-087", "RMM-061")
        assert int(named.rule[4:]) in rules
        assert named.offset == start or named.rule == "RMM-061"
        assert "task x, target t, factor A" in str(named)
        n_named += 1
    assert n_named > 0.9 * len(run)


def test_values_that_are_not_numbers() -> None:
    """Negative zeros, infinities, NaNs and subnormals, alone and in sums."""
    odd = np.array(
        [
            -0.0,
            0.0,
            np.inf,
            -np.inf,
            np.nan,
            1e-45,
            -1e-40,
            3.4e38,
            65519.0,
            65520.0,
            2.0**-25,
            1.0,
        ],
        "f4",
    )
    n = len(odd)
    rng = np.random.default_rng(0)
    part = build.Part(
        1,
        2,
        2,
        [build.exact_row(odd), build.exact_row(-odd)],
        [build.exact_row(rng.permutation(odd)) for _ in range(4)],
    )
    lone = build.Part(n, 2, 1, None, [build.exact_row(odd), build.exact_row(odd[::-1])])
    own = build.Factor(
        [build.exact_row(rng.permutation(odd)) for _ in range(2)], [build.exact_row(odd)] * 2
    )
    first = build.Factor([build.exact_row(np.array([-1.0]))])
    collection = build.Collection(
        [build.Target("t", n, n), build.Target("u", n, n)],
        [build.Frame(0, part, part), build.Frame(1, lone, lone)],
        [
            build.Task(
                "x",
                [
                    build.Entry(0, 2, own, own, cluster=1),
                    build.Entry(1, 2, first, first, cluster=1),
                ],
            )
        ],
    )
    compare(collection)


@pytest.mark.parametrize("dtype", [1, 2, 3])
def test_a_lone_residual_keeps_its_bits(dtype: int) -> None:
    """Rows of the output's own dtype are copied, NaN payloads and all; f32 rows into f32 too."""
    rng = np.random.default_rng(dtype)
    n, width = 4133, DTYPES[dtype].itemsize
    a = [rng.integers(0, 256, n * width, np.uint8).tobytes() for _ in range(3)]
    rows = [build.Row({1: 1, 2: 2, 3: 3}[dtype], data, np.zeros(n, "f4")) for data in a]
    collection = build.Collection(
        [build.Target("t", n, n)],
        [],
        [build.Task("x", [build.Entry(0, 3, build.Factor(None, rows), build.Factor(None, rows))])],
    )
    file = _native.File.from_buffer(collection.build())
    found = load(file, 0, dtype)[0]
    assert np.ascontiguousarray(found[0]).tobytes() == b"".join(a)
    assert np.ascontiguousarray(found[1]).tobytes() == b"".join(a)


def floats_as_residual(values: np.ndarray, encoding: int) -> _native.File:
    row = (
        build.exact_row(values, encoding)
        if values.dtype != np.uint16
        else build.Row(encoding, values.tobytes(), None)
    )
    collection = build.Collection(
        [build.Target("t", values.size, 1)],
        [],
        [build.Task("x", [build.Entry(0, 1, build.Factor(None, [row]), build.Factor())])],
    )
    return _native.File.from_buffer(collection.build())


@pytest.mark.parametrize("encoding", [2, 3])
def test_all_halves_widened(encoding: int) -> None:
    halves = np.arange(65536, dtype=np.uint16)
    got = load(floats_as_residual(halves, encoding), 0, 1)[0][0][0]
    same_bits(got, halves.view(DTYPES[encoding]).astype(np.float32))
    # Nothing is lost of a NaN either: it comes back through the same number of bits.
    back = load(floats_as_residual(halves, encoding), 0, encoding)[0][0][0]
    assert back.tobytes() == halves.tobytes()


@pytest.mark.parametrize("dtype", [2, 3])
def test_rounding_to_halves(dtype: int) -> None:
    """Every half, its neighbours, the points between halves, and random bits."""
    halves = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    ordered = np.unique(halves)
    with np.errstate(all="ignore"):
        between = (ordered[:-1].astype(np.float64) + ordered[1:]).astype(np.float32) / 2
    bits = (
        np.random.default_rng(7)
        .integers(0, 2**32, 500_000, np.uint64)
        .astype(np.uint32)
        .view(np.float32)
    )
    edge = np.concatenate([halves, between])
    values = np.concatenate(
        [
            edge,
            np.nextafter(edge, np.float32(np.inf)),
            np.nextafter(edge, np.float32(-np.inf)),
            bits,
        ]
    )
    got = load(floats_as_residual(values, 1), 0, dtype)[0][0][0]
    with np.errstate(all="ignore"):
        same_bits(got, values.astype(DTYPES[dtype]))


def test_threads_and_single_factors_agree() -> None:
    rng = np.random.default_rng(1)
    n = 9001
    part = build.make_part(rng, n, 1, 16, 2, (1, 2, 0x18))
    entries = [
        build.Entry(
            i,
            16,
            build.make_factor(rng, part, n, 16, (1,), residual=True),
            build.Factor(None, build.rows(rng, 16, 513, (0x14, 2))),
            cluster=1,
        )
        for i in range(4)
    ]
    collection = build.Collection(
        [build.Target(f"t{i}", n, 513) for i in range(4)],
        [build.Frame(i, part, None) for i in range(4)],
        [build.Task("x", entries)],
    )
    file = _native.File.from_buffer(collection.build())
    for dtype in (1, 2, 3):
        one = load(file, 0, dtype, 1)
        for threads in (0, 2, 5, 1000):
            for got, want in zip(load(file, 0, dtype, threads), one, strict=True):
                assert got[0].tobytes() == want[0].tobytes()
                assert got[1].tobytes() == want[1].tobytes()
        for j, pair in enumerate(one):
            for factor in (0, 1):
                want = np.ascontiguousarray(pair[0] if factor == 0 else pair[1].T)
                out = bytearray(want.nbytes)
                file.load_factor(0, j, factor, dtype, out)
                assert bytes(out) == want.tobytes()


def test_memory_at_any_alignment() -> None:
    collection = build.rich(2)
    file = _native.File.from_buffer(collection.build())
    entries, size = file.entries(0, 1)
    plain, odd = bytearray(size), bytearray(size + 1)
    file.load_task(0, 1, plain)
    file.load_task(0, 1, memoryview(odd)[1:])
    for entry in entries:
        n = 4 * entry.rank * entry.n_in
        assert plain[entry.offset_a : entry.offset_a + n] == odd[1 + entry.offset_a :][:n]


def test_the_caller_s_rounding_mode_does_not_matter() -> None:
    """Subnormals are kept though the program flushes them (8.1)."""
    torch = pytest.importorskip("torch")
    values = np.float32(1e-40) * np.arange(1, 65, dtype=np.float32)
    part = build.Part(64, 1, 1, [build.exact_row(values)], [build.exact_row(values)])
    own = build.Factor([build.exact_row(np.array([1.0]))])
    collection = build.Collection(
        [build.Target("t", 64, 1)],
        [build.Frame(0, part, None)],
        [build.Task("x", [build.Entry(0, 1, own, build.Factor(), cluster=1)])],
    )
    file = _native.File.from_buffer(collection.build())
    want = collection.evaluate(0, 0, "a")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        got = load(file, 0, 1)[0][0]
    finally:
        torch.set_flush_denormal(False)
    same_bits(got, want)
    assert (got > 0).all()
