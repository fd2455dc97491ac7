"""LoRE-Merging: the objective falls, its fixed point is the optimum, planted structure is found."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmmformat.errors import ShapeError
from rmmformat.merge.baselines import ties
from rmmformat.merge.lore import LoreResult, lore, lore_merge

F64 = npt.NDArray[np.float64]


def objective(thetas: F64, result: LoreResult, mu: float) -> float:
    """The objective from its definition, by dense SVD."""
    total = 0.0
    for i, theta in enumerate(thetas):
        delta = result.delta(i)
        total += 0.5 * ((result.theta0 + delta - theta) ** 2).sum()
        total += mu * np.linalg.svd(delta, compute_uv=False).sum()
    return float(total)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.1, 1.0, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_objective_is_the_stated_one_and_falls(
    seed: int, n: int, n_out: int, n_in: int, mu: float
) -> None:
    thetas = np.random.default_rng(seed).standard_normal((n, n_out, n_in))
    result = lore(thetas, mu, steps=8, tolerance=-1.0)
    history = result.objective
    assert 1 <= result.steps <= 8
    slack = 1e-12 * (1.0 + history[0])
    assert all(b <= a + slack for a, b in itertools.pairwise(history))
    assert history[-1] == pytest.approx(objective(thetas, result, mu), rel=1e-9, abs=1e-9)
    first = 0.5 * ((thetas - thetas.mean(axis=0)) ** 2).sum()
    assert history[0] == pytest.approx(first, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_first_step_is_singular_value_thresholding(shape: tuple[int, int]) -> None:
    thetas = np.random.default_rng(0).standard_normal((4, *shape))
    result = lore(thetas, mu=1.5, steps=1)
    np.testing.assert_allclose(result.theta0, thetas.mean(axis=0), atol=1e-12)
    for i, theta in enumerate(thetas):
        u, s, vt = np.linalg.svd(theta - thetas.mean(axis=0), full_matrices=False)
        want = (u * np.maximum(s - 1.5, 0)) @ vt
        np.testing.assert_allclose(result.delta(i), want, atol=1e-12)
        A, B = result.factors[i]
        kept = s[s > 1.5] - 1.5
        assert A.shape == (len(kept), shape[1])
        np.testing.assert_allclose(A @ A.T, np.diag(kept), atol=1e-12)  # balanced and sorted
        np.testing.assert_allclose(B.T @ B, np.diag(kept), atol=1e-12)


def test_fixed_point_satisfies_the_optimality_conditions() -> None:
    mu = 0.8
    thetas = np.random.default_rng(1).standard_normal((3, 6, 5))
    result = lore(thetas, mu, steps=5000, tolerance=0.0)
    gaps = [theta - result.theta0 - result.delta(i) for i, theta in enumerate(thetas)]
    # Gradient with respect to theta0 vanishes; each gap / mu is a subgradient of the nuclear norm.
    np.testing.assert_allclose(np.mean(gaps, axis=0), 0.0, atol=1e-5)
    for i, gap in enumerate(gaps):
        assert np.linalg.norm(gap, 2) <= mu * (1 + 1e-6)
        nuclear = np.linalg.svd(result.delta(i), compute_uv=False).sum()
        assert (gap * result.delta(i)).sum() == pytest.approx(mu * nuclear, rel=1e-6)
    # Convex: no nearby point is better.
    best = objective(thetas, result, mu)
    rng = np.random.default_rng(2)
    for _ in range(20):
        moved = LoreResult(
            result.theta0 + 0.01 * rng.standard_normal((6, 5)), result.factors, (best,)
        )
        assert objective(thetas, moved, mu) >= best - 1e-9


def test_equal_matrices_are_their_own_base() -> None:
    theta = np.random.default_rng(3).standard_normal((5, 6))
    result = lore([theta] * 4, mu=0.01)
    np.testing.assert_allclose(result.theta0, theta, atol=1e-15)
    assert all(A.shape == (0, 6) and B.shape == (5, 0) for A, B in result.factors)
    assert result.objective[-1] == pytest.approx(0.0, abs=1e-25)
    np.testing.assert_allclose(lore_merge(result), theta, atol=1e-15)


def test_planted_low_rank_deltas() -> None:
    rng = np.random.default_rng(4)
    base = rng.standard_normal((30, 40))
    deltas = [rng.standard_normal((30, 2)) @ rng.standard_normal((2, 40)) for _ in range(12)]
    thetas = [(base + d).astype(np.float32) for d in deltas]
    result = lore(thetas, mu=2.0, steps=200)  # type: ignore[arg-type]
    mean_error = np.linalg.norm(np.mean(thetas, axis=0) - base)
    assert np.linalg.norm(result.theta0 - base) < 0.5 * mean_error
    A, B = result.factors[0]
    cosine = ((B[:, :2] @ A[:2]) * deltas[0]).sum() / (
        np.linalg.norm(B[:, :2] @ A[:2]) * np.linalg.norm(deltas[0])
    )
    assert cosine > 0.98


def test_stops_early() -> None:
    thetas = np.random.default_rng(5).standard_normal((3, 6, 5))
    result = lore(thetas, mu=100.0, steps=50)  # everything is below the threshold
    assert result.steps == 1
    loose = lore(thetas, mu=0.5, steps=50, tolerance=1e-2)
    assert loose.steps < lore(thetas, mu=0.5, steps=50, tolerance=-1.0).steps == 50


def test_no_steps_is_the_mean() -> None:
    thetas = np.random.default_rng(6).standard_normal((3, 6, 5))
    result = lore(thetas, steps=0)
    assert result.steps == 0
    np.testing.assert_allclose(lore_merge(result), thetas.mean(axis=0), atol=1e-14)


def test_merge() -> None:
    thetas = np.random.default_rng(7).standard_normal((3, 6, 5))
    result = lore(thetas, mu=0.5)
    deltas = np.stack([result.delta(i) for i in range(3)])
    np.testing.assert_allclose(
        lore_merge(result, 0.7), result.theta0 + 0.7 * deltas.mean(axis=0), atol=1e-12
    )
    np.testing.assert_allclose(
        lore_merge(result, 1.0, "ties", 0.5), result.theta0 + ties(deltas, 0.5), atol=1e-12
    )


def test_refusals() -> None:
    x = np.ones((2, 3, 4))
    for thetas in ([], [np.ones((2, 3)), np.ones((3, 2))], np.ones((2, 3)), np.ones((2, 0, 3))):
        with pytest.raises(ShapeError):
            lore(thetas)  # type: ignore[arg-type]
    for arguments in ((-0.1, 5), (0.1, -1)):
        with pytest.raises(ShapeError, match="negative"):
            lore(x, *arguments)
    with pytest.raises(ShapeError, match="unknown method"):
        lore_merge(lore(x), 1.0, "other")  # type: ignore[arg-type]
