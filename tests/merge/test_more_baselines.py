"""NAN, EMR-Merging and FlexMerge, against cases worked by hand and dense algebra."""

from __future__ import annotations

import numpy as np
import pytest

from rmmformat.errors import ShapeError
from rmmformat.merge.emr import emr
from rmmformat.merge.flex import flex_groups, merge_group, similarity
from rmmformat.merge.nan import inverse_norm_weights, nan_product


def test_inverse_norms_by_hand() -> None:
    np.testing.assert_allclose(inverse_norm_weights([1.0, 2.0, 4.0]), [4 / 7, 2 / 7, 1 / 7])
    np.testing.assert_allclose(inverse_norm_weights([0.0, 3.0]), [0.0, 1.0])
    np.testing.assert_array_equal(inverse_norm_weights([0.0, 0.0]), [0.0, 0.0])


def test_nan_product_is_the_weighted_sum() -> None:
    rng = np.random.default_rng(0)
    factors = [(rng.standard_normal((r, 7)), rng.standard_normal((6, r))) for r in (2, 4)]
    deltas = [2.0 * factors[0][1] @ factors[0][0], 0.5 * factors[1][1] @ factors[1][0]]
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    a, b = nan_product(factors, [2.0, 0.5], norms)
    want = (deltas[0] / norms[0] + deltas[1] / norms[1]) / (1 / norms[0] + 1 / norms[1])
    np.testing.assert_allclose(b @ a, want, atol=1e-12)


def test_emr_by_hand() -> None:
    tasks = np.array([[1.0, -2.0, 3.0, 1.0], [2.0, 1.0, -4.0, -1.0]])
    merged = emr(tasks)
    # Sums 3, -1, -1, 0: the signs are + - - none; the largest that agree are 2, 2, 4, none.
    np.testing.assert_array_equal(merged.unified, [2.0, -2.0, -4.0, 0.0])
    np.testing.assert_array_equal(
        merged.masks, [[True, True, False, False], [True, False, True, False]]
    )
    np.testing.assert_allclose(merged.rescalers, [7 / 4, 8 / 6])
    np.testing.assert_allclose(merged.task(0), [3.5, -3.5, 0.0, 0.0])
    np.testing.assert_allclose(merged.task(1), [8 / 3, 0.0, -16 / 3, 0.0], rtol=1e-6)
    assert merged.n_bytes == 4 * 4 + 2 * 1 + 2 * 4


def test_emr_keeps_one_task_and_equal_tasks() -> None:
    x = np.random.default_rng(1).standard_normal((1, 5, 7)).astype(np.float32)
    np.testing.assert_allclose(emr(x).task(0), x[0], rtol=1e-6)
    np.testing.assert_allclose(emr(np.repeat(x, 3, axis=0)).task(2), x[0], rtol=1e-6)
    assert not emr(np.zeros((2, 3))).task(1).any()


def test_emr_keeps_each_tasks_mean_magnitude() -> None:
    x = np.random.default_rng(2).standard_normal((4, 6, 9))
    merged = emr(x)
    for t in range(4):
        assert np.abs(merged.task(t)).sum() == pytest.approx(np.abs(x[t]).sum(), rel=1e-5)


def test_similarity_is_the_cosine_of_the_deltas() -> None:
    rng = np.random.default_rng(3)
    factors = [(rng.standard_normal((r, 7)), rng.standard_normal((6, r))) for r in (2, 3, 1)]
    factors.append((np.zeros((2, 7)), np.zeros((6, 2))))
    scales = [1.0, -0.5, 2.0, 1.0]
    deltas = [s * (B @ A).ravel() for (A, B), s in zip(factors, scales, strict=True)]
    got = similarity(factors, scales)
    for i in range(3):
        for j in range(3):
            norms = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
            assert got[i, j] == pytest.approx(deltas[i] @ deltas[j] / norms, abs=1e-12)
    assert not got[3].any()


def test_flex_groups_by_hand() -> None:
    first = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    second = np.array([[1.0, 0.5, 0.3], [0.5, 1.0, 0.4], [0.3, 0.4, 1.0]])
    costs = [[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]
    apart = ((0,), (1,), (2,))
    assert flex_groups([first, second], costs, 9.0) == [apart, apart]
    assert flex_groups([first, second], costs, 7.0) == [((0, 1), (2,)), apart]
    assert flex_groups([first, second], costs, 6.5) == [((0, 1), (2,)), ((0, 1), (2,))]
    # Left are 0.1 (the smaller of 0.1 and 0.2) in the first and 0.3 in the second.
    assert flex_groups([first, second], costs, 5.5) == [((0, 1), (2,)), ((0, 1, 2),)]
    assert flex_groups([first, second], costs, 0.0) == [((0, 1, 2),), ((0, 1, 2),)]


def test_flex_budget_falls_by_the_cheaper_of_a_pair() -> None:
    alike = np.ones((2, 2))
    assert flex_groups([alike], [[4.0, 1.0]], 4.0) == [((0, 1),)]
    assert flex_groups([], [], 1.0) == []


def test_merge_group_is_the_mean_at_the_groups_rank() -> None:
    rng = np.random.default_rng(4)
    A, B = rng.standard_normal((2, 7)), rng.standard_normal((6, 2))
    a, b = merge_group([(A, B), (A, B)], [1.0, 3.0])
    assert a.shape == (2, 7)
    np.testing.assert_allclose(b @ a, 2.0 * B @ A, atol=1e-12)


def test_refusals() -> None:
    with pytest.raises(ShapeError):
        inverse_norm_weights([])
    with pytest.raises(ShapeError):
        inverse_norm_weights([-1.0])
    with pytest.raises(ShapeError):
        nan_product([(np.ones((1, 2)), np.ones((2, 1)))], [1.0], [1.0, 1.0])
    with pytest.raises(ShapeError):
        emr(np.zeros((0, 3)))
    with pytest.raises(ShapeError):
        similarity([], [])
    with pytest.raises(ShapeError):
        flex_groups([np.ones((2, 2))], [[1.0]], 1.0)
