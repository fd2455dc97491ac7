"""Errors through small matrices equal the dense ones, down to rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmmformat.errors import ShapeError
from rmmformat.merge.error import Summary, delta_norm, relative_error, summarize


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_agrees_with_dense(seed: int, r: int, r2: int, n_in: int, n_out: int) -> None:
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((r, n_in)), rng.standard_normal((n_out, r))
    A2, B2 = rng.standard_normal((r2, n_in)), rng.standard_normal((n_out, r2))
    dense, dense2 = 2.0 * B @ A, -0.5 * B2 @ A2
    assert delta_norm(A, B, -2.0) == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    want = np.linalg.norm(dense2 - dense) / np.linalg.norm(dense)
    assert relative_error(A, B, 2.0, A2, B2, -0.5) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("size", [1e-1, 1e-4, 1e-7, 1e-8, 1e-11])
def test_small_errors_are_right(size: float) -> None:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((16, 60)), rng.standard_normal((50, 16))
    # One more component, orthogonal to nothing in particular, of a size that is known exactly.
    u, v = rng.standard_normal(50), rng.standard_normal(60)
    A2 = np.concatenate([A, v[None]])
    B2 = np.concatenate([B, (size * u)[:, None]], axis=1)
    want = size * np.linalg.norm(u) * np.linalg.norm(v) / np.linalg.norm(B @ A)
    assert relative_error(A, B, 2.0, A2, B2, 2.0) == pytest.approx(want, rel=1e-4)


def test_another_gauge_is_no_error() -> None:
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((8, 40)), rng.standard_normal((30, 8))
    G = rng.standard_normal((8, 8)) + 4 * np.eye(8)
    assert relative_error(A, B, 1.0, np.linalg.inv(G) @ A, 0.5 * B @ G, 2.0) < 1e-14
    assert relative_error(A, B, 1.0, A, B, 1.0) < 1e-15


def test_float32_rounding_is_measured() -> None:
    rng = np.random.default_rng(2)
    A, B = rng.standard_normal((8, 200)), rng.standard_normal((100, 8))
    A2, B2 = A.astype(np.float32), B.astype(np.float32)
    want = np.linalg.norm(B2.astype(float) @ A2.astype(float) - B @ A) / np.linalg.norm(B @ A)
    assert 1e-8 < want < 1e-7
    assert relative_error(A, B, 1.0, A2, B2, 1.0) == pytest.approx(want, rel=1e-6)


def test_zero_references() -> None:
    A, B, zero = np.ones((2, 4)), np.ones((3, 2)), np.zeros((3, 2))
    assert relative_error(A, zero, 1.0, A, zero, 1.0) == 0.0
    assert relative_error(A, zero, 1.0, A, B, 1.0) == float("inf")
    assert relative_error(A, B, 0.0, A, B, 1.0) == float("inf")
    assert relative_error(A, B, 1.0, A, zero, 1.0) == 1.0
    empty_a, empty_b = np.zeros((0, 4)), np.zeros((3, 0))
    assert delta_norm(empty_a, empty_b) == 0.0
    assert relative_error(A, B, 1.0, empty_a, empty_b, 1.0) == pytest.approx(1.0)
    assert relative_error(empty_a, empty_b, 1.0, empty_a, empty_b, 1.0) == 0.0


def test_summarize() -> None:
    assert summarize(iter([3.0, 1.0, 8.0])) == Summary(mean=4.0, median=3.0, max=8.0)
    with pytest.raises(ShapeError):
        summarize([])


def test_refusals() -> None:
    A, B = np.ones((2, 4)), np.ones((3, 2))
    with pytest.raises(ShapeError, match="factors must be"):
        delta_norm(A, B.T)
    with pytest.raises(ShapeError, match="differ in shape"):
        relative_error(A, B, 1.0, np.ones((2, 5)), B, 1.0)
