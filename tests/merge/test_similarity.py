"""Inner products and cosines of deltas against the deltas themselves."""

from __future__ import annotations

import numpy as np
import pytest

from rmmformat.errors import ShapeError
from rmmformat.merge.similarity import cosines, delta_products


def deltas(ranks: tuple[int, ...], dtype: type = np.float32) -> list:
    rng = np.random.default_rng(3)
    return [
        (rng.standard_normal((r, 19)).astype(dtype), rng.standard_normal((11, r)).astype(dtype), s)
        for s, r in zip((2.0, -0.5, 1.0, 3.0), ranks, strict=True)
    ]


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (1, 7, 0, 3), (12, 2, 30, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_products_are_those_of_the_deltas(ranks: tuple[int, ...], dtype: type) -> None:
    given = deltas(ranks, dtype)
    whole = [s * B.astype(np.float64) @ A.astype(np.float64) for A, B, s in given]
    want = np.array([[np.sum(x * y) for y in whole] for x in whole])
    np.testing.assert_allclose(delta_products(given), want, rtol=1e-10, atol=1e-10)


def test_a_delta_in_other_factors_is_the_same_direction() -> None:
    A, B, scale = deltas((4, 4, 4, 4), np.float64)[0]
    G = np.random.default_rng(1).standard_normal((4, 4))
    other = (np.linalg.solve(G, A), B @ G, 7.0 * scale)
    got = cosines(delta_products([(A, B, scale), other, (A, -B, scale)]))
    np.testing.assert_allclose(got, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-12)


def test_a_zero_delta_has_no_direction() -> None:
    A, B, scale = deltas((4, 4, 4, 4))[0]
    got = cosines(delta_products([(A, B, scale), (A, np.zeros_like(B), scale)]))
    assert got[0, 0] == 1.0
    assert np.isnan([got[0, 1], got[1, 0], got[1, 1]]).all()


def test_no_delta_and_deltas_that_differ_in_shape() -> None:
    assert delta_products([]).shape == (0, 0)
    A, B, scale = deltas((4, 4, 4, 4))[0]
    with pytest.raises(ShapeError, match="differ in shape"):
        delta_products([(A, B, scale), (A[:, :5], B, scale)])
    with pytest.raises(ShapeError, match="factors must be"):
        delta_products([(A, B[:, :2], scale)])
