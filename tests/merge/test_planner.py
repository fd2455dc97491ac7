"""The model of bytes and errors, and what it makes of a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmmformat.errors import ShapeError
from rmmformat.merge.planner import Spectra, allocate, predict, steps_for_error


def spectra(n: int = 12, r: int = 8, seed: int = 0, **options: object) -> Spectra:
    rng = np.random.default_rng(seed)
    energies = [np.sort(rng.exponential(size=r) ** 3)[::-1] for _ in range(n)]
    n_in, n_out = rng.integers(64, 512, n).tolist(), rng.integers(64, 512, n).tolist()
    exact = [4 * r * (a + b) for a, b in zip(n_in, n_out, strict=True)]
    return Spectra.collect(energies, n_in, n_out, exact, **options)  # type: ignore[arg-type]


@given(st.integers(0, 1000), st.floats(1e-4, 0.2))
@settings(max_examples=40, deadline=None)
def test_a_finer_step_costs_more_and_loses_less(seed: int, step: float) -> None:
    s = spectra(seed=seed)
    coarse, fine = (predict(s, np.full(12, x)) for x in (step, step / 2))
    assert np.all(fine.n_bytes >= coarse.n_bytes)
    assert np.all(fine.errors <= coarse.errors)
    assert np.all(fine.counts[fine.steps > 0] >= coarse.counts[fine.steps > 0])


def test_a_bit_a_value_halves_the_error_where_bits_are_many() -> None:
    s = Spectra.collect([np.ones(4)], [1000], [1000], [10**9])
    a, b = predict(s, np.array([1e-4])), predict(s, np.array([5e-5]))
    assert b.n_bytes[0] - a.n_bytes[0] == pytest.approx(4 * 2000 / 8, rel=0.01)
    assert a.errors[0] / b.errors[0] == pytest.approx(2, rel=0.01)


@given(st.integers(0, 1000), st.floats(0.01, 0.9))
@settings(max_examples=20, deadline=None)
def test_steps_for_an_error_keep_it(seed: int, error: float) -> None:
    s = spectra(seed=seed)
    assert np.all(predict(s, steps_for_error(s, error)).errors <= error)


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5])
def test_a_budget_is_kept_and_used(exponent: float) -> None:
    s = spectra(60)
    total = s.exact_bytes.sum()
    previous = np.inf
    for part in (0.005, 0.01, 0.03, 0.1, 0.25):
        found = allocate(s, part * total, exponent)
        assert 0.98 * part * total < found.n_bytes.sum() <= part * total
        assert found.errors.mean() < previous
        previous = found.errors.mean()


def test_the_exponent_trades_the_largest_error_for_the_mean() -> None:
    s = spectra(60)
    rms, mean = (allocate(s, 0.05 * s.exact_bytes.sum(), a).errors for a in (0.0, 0.5))
    assert np.square(rms).mean() < np.square(mean).mean()
    assert mean.mean() < rms.mean()
    assert mean.max() > rms.max()


def test_room_for_everything_means_exact() -> None:
    s = spectra(exact=[True] + [False] * 11)
    found = allocate(s, 0.05 * s.exact_bytes.sum() + s.exact_bytes[0])
    assert found.steps[0] == 0
    assert found.n_bytes[0] == s.exact_bytes[0]
    assert np.all(found.steps[1:] > 0)
    tiny = Spectra.collect([np.ones(2)] * 3, [3] * 3, [3] * 3, [24] * 3)
    assert np.all(allocate(tiny, 72).steps == 0)


def test_nothing_fits_in_nothing() -> None:
    found = allocate(spectra(), 1)
    assert not found.counts.any()
    assert np.all(found.errors == pytest.approx(1))


def test_what_many_tasks_have_is_coded_finer() -> None:
    s = spectra(2, seed=3, weight=[1, 1])
    found = allocate(twins(s, weight=[1, 9]), 0.2 * s.exact_bytes[0])
    assert found.errors[1] < 0.6 * found.errors[0]


def test_where_sharing_makes_bytes_cheap_steps_are_finer() -> None:
    same = twins(spectra(2, seed=3), rate=[1.0, 0.4])
    found = allocate(same, 0.1 * same.exact_bytes.sum())
    assert found.steps[1] < 0.8 * found.steps[0]
    assert found.n_bytes[1] < found.n_bytes[0]
    assert found.errors[1] < found.errors[0]
    plain = allocate(twins(spectra(2, seed=3)), 0.1 * same.exact_bytes.sum())
    assert found.errors.mean() < plain.errors.mean()
    assert found.errors[0] < plain.errors[0]  # what one saves is given to the other


def twins(s: Spectra, **options: object) -> Spectra:
    """The first entry twice, but for what is said."""
    return Spectra.collect(
        [s.energy[0]] * 2,
        [int(s.n_in[0])] * 2,
        [int(s.n_out[0])] * 2,
        [int(s.exact_bytes[0])] * 2,
        **options,  # type: ignore[arg-type]
    )


def test_zero_deltas_cost_nothing() -> None:
    s = Spectra.collect([np.zeros(4), np.ones(4)], [64, 64], [64, 64], [2048, 2048])
    found = predict(s, np.full(2, 0.01))
    assert found.n_bytes[0] == found.errors[0] == 0
    assert np.all(np.isfinite(allocate(s, 300).errors))


def test_statistics_must_fit() -> None:
    with pytest.raises(ShapeError):
        Spectra.collect([np.ones(2)], [3, 4], [3], [24])
