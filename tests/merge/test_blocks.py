"""Block by block is the same as all at once: merging, and errors from Gram matrices."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rmmformat import threads
from rmmformat.errors import NonFiniteError, ShapeError
from rmmformat.merge import rmm
from rmmformat.merge.error import error_of_grams, relative_error, row_gram
from rmmformat.merge.rmm import merge, merge_tasks, pad_rank


def some_factors(n: int = 5, length: int = 200) -> list[Any]:
    rng = np.random.default_rng(3)
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.float32]
    return [
        # As B transposed is: columns of a row-major array.
        np.asarray(rng.standard_normal((length, 2 + t % 3)), kinds[t % 5]).T
        for t in range(n)
    ]


@pytest.mark.parametrize("grouping", ["position", 7, "factor", "row"])
@pytest.mark.parametrize("components", [0, 2, 9])
@pytest.mark.parametrize("count", [1, 3])
def test_blocks_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, grouping: Any, components: int, count: int
) -> None:
    factors = some_factors()
    want, want_numbers = merge(pad_rank(factors, np.float64), components, grouping)
    monkeypatch.setattr(rmm, "_STACK_VALUES", 1)
    monkeypatch.setattr(rmm, "_STACK_POSITIONS", 24)
    monkeypatch.setattr(threads, "n_threads", lambda: count)
    got, numbers = merge_tasks(factors, components, grouping, each=threads.each)
    assert want.mean is not None
    assert got.mean is not None
    assert got.mean.tobytes() == want.mean.tobytes()
    assert got.basis.tobytes() == want.basis.tobytes()
    assert numbers.tobytes() == want_numbers.tobytes()
    assert (got.group, got.row_mixing) == (want.group, want.row_mixing)


def test_what_cannot_be_merged_is_refused() -> None:
    factors = some_factors()
    with pytest.raises(ShapeError):
        merge_tasks([], 1)
    with pytest.raises(ShapeError):
        merge_tasks([factors[0], factors[1][:, :9]], 1)
    with pytest.raises(ShapeError):
        merge_tasks(factors, -1)
    broken = [np.full((2, 200), np.nan, np.float32), *factors]
    with pytest.raises(NonFiniteError):
        merge_tasks(broken, 1, each=threads.each)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-5, 1e-7])
def test_errors_are_those_of_the_deltas(size: float) -> None:
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((6, 5000)), rng.standard_normal((3000, 6))
    A2 = A + size * rng.standard_normal(A.shape)
    B2 = B + size * rng.standard_normal(B.shape)
    got = error_of_grams(row_gram(A, A2), row_gram(B.T, B2.T))
    assert got == pytest.approx(relative_error(A, B, 1.0, A2, B2, 1.0), rel=1e-7)


def test_errors_of_nothing() -> None:
    A, B = np.ones((2, 9), np.float32), np.ones((7, 2), np.float32)
    nought = np.zeros_like(A)
    same = row_gram(B.T, B.T)
    assert error_of_grams(row_gram(A, A), same) == 0.0
    assert error_of_grams(row_gram(nought, nought), same) == 0.0
    assert error_of_grams(row_gram(nought, A), same) == float("inf")
    assert error_of_grams(row_gram(A, nought), same) == pytest.approx(1.0)
    with pytest.raises(ShapeError):
        row_gram(A, A[:, :3])


def test_threads_keep_the_order_and_tell_of_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "n_threads", lambda: 4)
    assert list(threads.each(lambda n: n * n, range(50))) == [n * n for n in range(50)]

    def fail(n: int) -> int:
        if n == 7:
            raise ValueError("seven")
        return n

    found = threads.each(fail, range(50))
    with pytest.raises(ValueError, match="seven"):
        list(found)
