"""Shared row spaces and common gauges, as mathematics."""

from __future__ import annotations

import numpy as np
import pytest

from rmmformat.merge import sharing
from rmmformat.merge.sharing import Side, common_gauge, n_directions, subspace


@pytest.mark.parametrize(("n", "length"), [(20, 50), (60, 40), (700, 600)])
def test_subspace_is_the_leading_one(n: int, length: int) -> None:
    rng = np.random.default_rng(1)
    fall = np.diag(0.8 ** np.arange(min(n, length)))
    left = np.linalg.qr(rng.standard_normal((n, len(fall))))[0]
    right = np.linalg.qr(rng.standard_normal((length, len(fall))))[0]
    rows = left @ fall @ right.T
    directions, energy = subspace([rows[: n // 3], rows[n // 3 :]], 12)
    assert directions.shape == (12, length)
    np.testing.assert_allclose(directions @ directions.T, np.eye(12), atol=1e-9)
    np.testing.assert_allclose(energy, 0.64 ** np.arange(12), rtol=1e-6)
    overlap = np.abs(np.sum(directions * right.T[:12], axis=1))
    np.testing.assert_allclose(overlap, 1.0, atol=1e-6)


def test_directions_without_energy_are_left_out() -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((30, 3)) @ rng.standard_normal((3, 40))
    assert len(subspace([rows])[0]) == 3
    assert not len(subspace([np.zeros((4, 9))])[0])


def test_nothing_shared_is_seen() -> None:
    rng = np.random.default_rng(3)
    rows = [np.linalg.qr(rng.standard_normal((200, 4)))[0].T for _ in range(8)]
    sides = [Side(row, np.full(4, 4000.0), even=True) for row in rows]
    found = subspace([np.sqrt(side.weight)[:, None] * side.rows for side in sides])
    assert n_directions(sides, *found, 4) == 0
    same = [Side(rows[0], np.full(4, 4000.0), even=True) for _ in rows]
    found = subspace([np.sqrt(side.weight)[:, None] * side.rows for side in same])
    assert n_directions(same, *found, 4) == 4


def test_common_gauge_keeps_deltas_and_orders_the_mean() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((5, 30)), rng.standard_normal((40, 5))
    factors = [
        (a + 0.1 * rng.standard_normal(a.shape), b + 0.1 * rng.standard_normal(b.shape))
        for _ in range(6)
    ]
    found = common_gauge(factors)
    assert found is not None
    gauge, mean_a, mean_b, left_a, left_ab = found
    np.testing.assert_allclose(mean_a, gauge @ np.mean([x for x, _ in factors], axis=0))
    gram = mean_a @ mean_a.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-8 * gram.max())
    assert np.all(np.diff(np.diag(gram)) <= 0)
    deltas = [y @ x for x, y in factors]
    total = sum(np.sum(d * d) for d in deltas)
    rest = sum(np.sum((d - mean_b.T @ mean_a) ** 2) for d in deltas)
    assert left_ab == pytest.approx(rest / total)
    space = np.linalg.qr(mean_a.T)[0]
    rest = sum(np.sum((d - d @ space @ space.T) ** 2) for d in deltas)
    assert left_a == pytest.approx(rest / total)
    assert common_gauge([(np.zeros((2, 9)), np.ones((8, 2)))]) is None


def test_bound_on_what_is_shared() -> None:
    assert max(sharing._GRID) <= sharing.MOST
