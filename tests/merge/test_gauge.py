"""Changing the gauge keeps the delta and gives it a canonical or a common form."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmmformat.errors import ShapeError
from rmmformat.merge.gauge import align, procrustes, svd_gauge

F64 = npt.NDArray[np.float64]
Pair = tuple[F64, F64]


def pair(rng: np.random.Generator, r: int, n_in: int, n_out: int) -> Pair:
    return rng.standard_normal((r, n_in)), rng.standard_normal((n_out, r))


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_svd_gauge_is_the_svd(seed: int, r: int, n_in: int, n_out: int) -> None:
    A, B = pair(np.random.default_rng(seed), r, n_in, n_out)
    a, b = svd_gauge(A, B)
    assert a.shape == A.shape
    assert b.shape == B.shape
    np.testing.assert_allclose(b @ a, B @ A, atol=1e-12)
    s = np.linalg.svd(B @ A, compute_uv=False)[:r]
    s = np.pad(s, (0, r - len(s)))
    np.testing.assert_allclose(a @ a.T, np.diag(s), atol=1e-12)
    np.testing.assert_allclose(b.T @ b, np.diag(s), atol=1e-12)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_svd_gauge_forgets_the_gauge_it_came_in(seed: int) -> None:
    rng = np.random.default_rng(seed)
    A, B = pair(rng, 3, 12, 10)
    G = rng.standard_normal((3, 3)) + 3 * np.eye(3)
    a, b = svd_gauge(A, B)
    a2, b2 = svd_gauge(np.linalg.inv(G) @ A, B @ G)
    np.testing.assert_allclose(a2, a, atol=1e-7)
    np.testing.assert_allclose(b2, b, atol=1e-7)


def test_svd_gauge_fixes_signs() -> None:
    A, B = pair(np.random.default_rng(0), 4, 20, 15)
    _, b = svd_gauge(A, B)
    assert np.all((b * np.abs(b)).sum(axis=0) > 0)


def test_svd_gauge_of_zero() -> None:
    A = np.random.default_rng(1).standard_normal((3, 7))
    a, b = svd_gauge(A, np.zeros((5, 3)))
    assert not a.any()
    assert not b.any()
    a, b = svd_gauge(np.zeros((0, 7)), np.zeros((5, 0)))
    assert a.shape == (0, 7)
    assert b.shape == (5, 0)


def test_svd_gauge_of_a_smaller_rank_has_zero_components() -> None:
    A, B = pair(np.random.default_rng(8), 6, 20, 15)
    A[4:] = A[:2] + A[2:4]
    a, b = svd_gauge(A, B)
    assert not a[4:].any()
    assert not b[:, 4:].any()
    np.testing.assert_allclose(b @ a, B @ A, atol=1e-12)


def test_svd_gauge_of_low_precision_input() -> None:
    A, B = pair(np.random.default_rng(2), 4, 20, 15)
    half_a, half_b = A.astype(np.float16), B.astype(np.float16)
    a, b = svd_gauge(half_a, half_b)
    want = half_b.astype(np.float64) @ half_a.astype(np.float64)
    np.testing.assert_allclose(b @ a, want, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_procrustes_keeps_every_delta_and_rank(seed: int, ranks: list[int]) -> None:
    rng = np.random.default_rng(seed)
    factors = [pair(rng, r, 9, 8) for r in ranks]
    for (A, B), (a, b) in zip(factors, procrustes(factors), strict=True):
        assert a.shape == A.shape
        assert b.shape == B.shape
        np.testing.assert_allclose(b @ a, B @ A, atol=1e-11)


def test_procrustes_undoes_rotations() -> None:
    rng = np.random.default_rng(3)
    A, B = pair(rng, 4, 30, 20)
    factors = []
    for _ in range(5):
        G, _ = np.linalg.qr(rng.standard_normal((4, 4)))
        noise_a, noise_b = pair(rng, 4, 30, 20)
        factors.append((G @ (A + 0.01 * noise_a), (B + 0.01 * noise_b) @ G.T))
    stacked = np.stack([a for a, _ in procrustes(factors)])
    spread = np.linalg.norm(stacked - stacked.mean(axis=0)) / np.linalg.norm(stacked)
    assert spread < 0.02


def spread(factors: list[Pair]) -> float:
    z = np.stack([np.concatenate([a, b.T], axis=1) for a, b in factors])
    return float(((z - z.mean(axis=0)) ** 2).sum())


def test_procrustes_never_rises() -> None:
    rng = np.random.default_rng(4)
    factors = [pair(rng, 4, 12, 10) for _ in range(6)]
    values = [spread(procrustes(factors, max_steps=k, tolerance=0.0)) for k in (0, 1, 2, 5, 20)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))
    assert values[-1] < values[0]


def test_procrustes_with_zero_tasks() -> None:
    A, B = pair(np.random.default_rng(5), 3, 8, 6)
    zero = (np.zeros((3, 8)), np.zeros((6, 3)))
    got = procrustes([zero, (A, B), zero])
    assert not got[0][0].any()
    np.testing.assert_allclose(got[1][1] @ got[1][0], B @ A, atol=1e-12)


def test_align() -> None:
    rng = np.random.default_rng(6)
    factors = [pair(rng, 3, 8, 6) for _ in range(3)]
    none = align(factors, "none")
    assert all(np.array_equal(a, A) for (a, _), (A, _) in zip(none, factors, strict=True))
    np.testing.assert_array_equal(align(factors, "svd")[1][0], svd_gauge(*factors[1])[0])
    np.testing.assert_array_equal(align(factors, "procrustes")[1][0], procrustes(factors)[1][0])


def test_refusals() -> None:
    rng = np.random.default_rng(7)
    with pytest.raises(ShapeError, match="unknown alignment"):
        align([pair(rng, 2, 4, 3)], "other")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="at least one"):
        procrustes([])
    with pytest.raises(ShapeError, match="sides"):
        procrustes([pair(rng, 2, 4, 3), pair(rng, 2, 5, 3)])
    with pytest.raises(ShapeError, match="factors must be"):
        svd_gauge(np.zeros((2, 4)), np.zeros((3, 3)))
