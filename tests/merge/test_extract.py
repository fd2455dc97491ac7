"""Low-rank factors of a delta, against LAPACK's whole decomposition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmmformat.errors import ShapeError
from rmmformat.merge import extract as module
from rmmformat.merge.extract import DEFAULT_RANK, Criterion, extract


def draw(rows: int, columns: int, spectrum: np.ndarray, seed: int = 0) -> np.ndarray:
    """A matrix with these singular values, float32."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(spectrum))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(spectrum))))[0]
    return ((left * spectrum) @ right.T).astype(np.float32)


N = 560
SPECTRA = {
    "flat": np.ones(N),
    "power": np.arange(1.0, N + 1) ** -0.7,
    "geometric": 0.97 ** np.arange(N),
    "step": np.r_[np.ones(40), np.full(N - 40, 0.01)],
    "tiny": 1e-12 * 0.9 ** np.arange(N),
    "large": 1e12 * 0.9 ** np.arange(N),
}


def all_best(delta: np.ndarray) -> np.ndarray:
    """Relative error of the best delta of each rank from 0, by numpy's own decomposition."""
    squares = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
    left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return np.sqrt(left / squares.sum())


def best(delta: np.ndarray, rank: int) -> float:
    return float(all_best(delta)[rank])


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("shape", [(N, 700), (700, N)])
def test_random_is_as_good_as_the_whole_decomposition(spectrum, rank, shape):
    delta = draw(*shape, SPECTRA[spectrum])
    found = extract(delta, Criterion(rank=rank), "random")
    assert found.rank == rank
    assert found.error == pytest.approx(best(delta, rank), rel=1e-4)


@pytest.mark.parametrize("svd", ["exact", "random"])
def test_error_is_that_of_the_factors(svd):
    delta = draw(90, 70, 0.8 ** np.arange(70))
    found = extract(delta, Criterion(rank=5), svd)
    wide = delta.astype(np.float64)
    left = wide - found.B.astype(np.float64) @ found.A.astype(np.float64)
    assert found.norm == pytest.approx(np.linalg.norm(wide), rel=1e-7)
    assert found.residual == pytest.approx(np.linalg.norm(left), rel=1e-5)
    assert found.error == pytest.approx(best(delta, 5), rel=1e-5)


@pytest.mark.parametrize("svd", ["exact", "random"])
def test_tiny_errors_are_measured_and_not_lost_to_cancellation(svd):
    delta = draw(200, 300, np.r_[np.ones(4), np.full(4, 1e-5)])
    found = extract(delta, Criterion(rank=4), svd)
    # The squares differ in the tenth digit, which no difference of two float32 sums would show.
    assert found.error == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize("svd", ["exact", "random"])
def test_factors_are_balanced_sorted_and_signed(svd):
    delta = draw(80, 120, 0.7 ** np.arange(60))
    found = extract(delta, Criterion(rank=6), svd)
    assert found.A.dtype == found.B.dtype == np.float32
    energies = (found.A**2).sum(1)
    assert energies == pytest.approx((found.B**2).sum(0), rel=1e-4)
    assert energies == pytest.approx(0.7 ** np.arange(6), rel=1e-3)
    assert (np.sum(found.B * np.abs(found.B), axis=0) > 0).all()
    flipped = extract(-delta, Criterion(rank=6), svd)
    assert np.allclose(flipped.B, found.B, atol=1e-5)
    assert np.allclose(flipped.A, -found.A, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 50),
    svd=st.sampled_from(["auto", "exact", "random"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, columns, rank, svd, seed):
    delta = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    found = extract(delta, Criterion(rank=rank), svd)
    assert found.A.shape == (found.rank, columns)
    assert found.B.shape == (rows, found.rank)
    assert 1 <= found.rank <= min(rank, rows, columns)
    assert found.error <= best(delta, found.rank) * 1.001 + 1e-5


@pytest.mark.parametrize("svd", ["exact", "random", "auto"])
@pytest.mark.parametrize("limit", [0.9, 0.5, 0.1, 0.01])
def test_smallest_rank_within_an_error(svd, limit):
    delta = draw(600, 640, 0.95 ** np.arange(600))
    found = extract(delta, Criterion(max_error=limit), svd)
    assert found.error <= limit
    fewest = int(np.flatnonzero(all_best(delta) <= limit)[0])
    assert found.rank - fewest in ((0,) if svd == "exact" else (0, 1))


def test_smallest_rank_that_keeps_an_energy():
    delta = draw(100, 100, np.array([3.0, 2.0, 1.0, 1.0]))  # squares: 9, 4, 1, 1 of 15
    assert extract(delta, Criterion(energy=0.59)).rank == 1
    assert extract(delta, Criterion(energy=0.61)).rank == 2
    assert extract(delta, Criterion(energy=0.9)).rank == 3
    assert extract(delta, Criterion(energy=0.94)).rank == 4
    assert extract(delta, Criterion(energy=0.94, rank=2)).rank == 2  # rank is the limit then


@pytest.mark.parametrize("svd", ["exact", "random"])
def test_rounding_is_no_component(svd):
    delta = draw(130, 120, np.array([1.0, 0.5, 0.25]))
    found = extract(delta, Criterion(rank=16), svd)
    assert found.rank == 3
    assert found.error < 1e-6


def test_nothing_changed():
    found = extract(np.zeros((3, 4), np.float32), Criterion())
    assert (found.rank, found.norm, found.error) == (1, 0.0, 0.0)
    assert not found.A.any()
    assert not found.B.any()


def test_default_rank():
    assert extract(draw(60, 50, np.ones(50)), Criterion()).rank == DEFAULT_RANK == 16


def test_same_bytes_again():
    delta = draw(N, 600, SPECTRA["power"])
    first, second = (extract(delta, Criterion(), "random") for _ in range(2))
    assert first.A.tobytes() == second.A.tobytes()
    assert first.B.tobytes() == second.B.tobytes()


def test_auto_decides_by_size_and_rank(monkeypatch):
    calls = []
    exact, subspace = module._exact, module._subspace
    monkeypatch.setattr(module, "_exact", lambda d: calls.append("exact") or exact(d))
    monkeypatch.setattr(module, "_subspace", lambda *a: calls.append("random") or subspace(*a))
    extract(draw(512, 800, SPECTRA["flat"][:512]), Criterion())
    assert calls == ["exact"]
    calls.clear()
    extract(draw(N, 900, SPECTRA["flat"]), Criterion())
    assert calls == ["random"]
    calls.clear()
    extract(draw(N, 900, SPECTRA["flat"]), Criterion(rank=300))
    assert calls == ["exact"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.0},
        {"energy": float("nan")},
        {"max_error": 1e-6},
        {"max_error": 1.0},
        {"energy": 0.5, "max_error": 0.5},
    ],
)
def test_criteria_out_of_range(wrong):
    with pytest.raises(ShapeError):
        Criterion(**wrong)


def test_wrong_arrays():
    for bad in (np.zeros(3, np.float32), np.zeros((2, 2)), np.zeros((0, 2), np.float32)):
        with pytest.raises(ShapeError, match="float32"):
            extract(bad, Criterion())
    with pytest.raises(ShapeError, match="unknown svd"):
        extract(np.zeros((2, 2), np.float32), Criterion(), "fast")
