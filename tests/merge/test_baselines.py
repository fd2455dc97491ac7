"""The methods RMM is compared with, against small cases worked by hand and dense algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmmformat.errors import ShapeError
from rmmformat.merge.baselines import dare, mean_factors, mean_product, ties, truncate_rank


@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_truncation_is_the_best_of_its_rank(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((5, 9)), rng.standard_normal((8, 5))
    a, b = truncate_rank(A, B, rank)
    assert a.shape == (rank, 9)
    assert b.shape == (8, rank)
    s = np.linalg.svd(B @ A, compute_uv=False)
    assert np.linalg.norm(b @ a - B @ A) == pytest.approx(np.linalg.norm(s[rank:]), abs=1e-10)


def test_mean_factors() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float16)
    np.testing.assert_allclose(mean_factors(x), x.astype(float).sum(axis=0) / 4)


def test_mean_product_is_the_mean_delta_of_ragged_tasks() -> None:
    rng = np.random.default_rng(1)
    factors = [(rng.standard_normal((r, 7)), rng.standard_normal((6, r))) for r in (2, 4, 1)]
    scales = [2.0, 0.5, 1.0]
    a, b = mean_product(factors, scales)
    assert a.shape == (7, 7)
    want = sum(s * B @ A for (A, B), s in zip(factors, scales, strict=True)) / 3
    np.testing.assert_allclose(b @ a, want, atol=1e-12)


def test_ties_by_hand() -> None:
    tasks = np.array(
        [
            [5.0, -4.0, 0.1, 3.0],
            [3.0, 6.0, 0.2, -0.1],
            [-7.0, 1.0, 0.3, 2.0],
        ]
    )
    # Half of each kept: [5 -4 . .], [3 6 . .], [-7 . . 2]; sums 1, 2, 0, 2.
    np.testing.assert_allclose(ties(tasks, density=0.5), [4.0, 6.0, 0.0, 2.0])
    np.testing.assert_allclose(ties(tasks, density=0.5, weight=0.5), [2.0, 3.0, 0.0, 1.0])


def test_ties_of_one_task_is_a_trim() -> None:
    x = np.random.default_rng(2).standard_normal((1, 10, 10))
    got = ties(x, density=0.2)
    assert np.count_nonzero(got) == 20
    np.testing.assert_array_equal(got[got != 0], x[0][got != 0])
    np.testing.assert_allclose(ties(x, density=1.0), x[0])


def test_ties_of_opposites_and_of_zero_is_zero() -> None:
    assert not ties(np.array([[1.0, -2.0], [-1.0, 2.0]]), density=1.0).any()
    assert not ties(np.zeros((3, 4))).any()


def test_dare_is_seeded_sparse_and_unbiased() -> None:
    x = np.random.default_rng(3).standard_normal((2, 40, 50))
    one = dare(x, np.random.default_rng(7), density=0.2)
    np.testing.assert_array_equal(one, dare(x, np.random.default_rng(7), density=0.2))
    single = dare(x[:1], np.random.default_rng(8), density=0.2)
    kept = single != 0
    assert abs(kept.mean() - 0.2) < 0.05
    np.testing.assert_allclose(single[kept], 5.0 * x[0][kept])
    many = np.mean([dare(x, np.random.default_rng(i), density=0.5) for i in range(400)], axis=0)
    assert np.abs(many - x.mean(axis=0)).max() < 0.3
    np.testing.assert_allclose(dare(x, np.random.default_rng(0), density=1.0), x.mean(axis=0))


def test_refusals() -> None:
    x = np.ones((2, 3))
    for density in (0.0, 1.5, -0.1):
        with pytest.raises(ShapeError, match="density"):
            ties(x, density)
        with pytest.raises(ShapeError, match="density"):
            dare(x, np.random.default_rng(0), density)
    with pytest.raises(ShapeError, match="stack"):
        mean_factors(np.ones(3))
    with pytest.raises(ShapeError, match="stack"):
        ties(np.ones((0, 3)))
    with pytest.raises(ShapeError, match="one scale"):
        mean_product([(np.ones((1, 2)), np.ones((2, 1)))], [])
    with pytest.raises(ShapeError, match="rank"):
        truncate_rank(np.ones((1, 2)), np.ones((2, 1)), 2)
