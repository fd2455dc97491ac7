"""The figures of every method on eight real adapters, and how they are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from rmmformat.compare import Comparison, Row, _error, compare
from rmmformat.contenders import FAMILIES, Computed, Dense, contenders, survey_target
from rmmformat.errors import OptionError
from rmmformat.merge.lore import lore, lore_merge
from rmmformat.model import Factors
from rmmformat.pipeline import open_sources


@pytest.fixture(scope="module")
def found(demo_adapters: Path) -> Comparison:
    rows = contenders(8, 16, components=(1, 3, 7), sizes=(0.14, 0.03))
    return compare(open_sources(demo_adapters), rows)


@pytest.fixture(scope="module")
def rows(found: Comparison) -> Mapping[str, Row]:
    return {row.method: row for row in found.rows}


def test_what_was_measured(found: Comparison) -> None:
    assert found.tasks == ("amazon", "bbc", "brands", "imdb", "movies", "spam", "tweets", "yelp")
    assert (found.n_targets, found.ranks) == (12, (16,))
    assert found.f32_bytes == 2 * found.original_bytes == 8 * 12 * 16 * 768 * 4
    assert {row.family for row in found.rows} == set(FAMILIES)
    assert all(row.n_bytes is not None for row in found.rows)


@pytest.mark.parametrize(
    ("method", "size", "mean", "largest"),
    [
        ("no delta", 0.0, 100.0, 100.0),
        ("exact", 50.0, 0.0, 0.0),
        ("RMM p=1", 31.25, 82.55, 97.65),
        ("RMM p=3", 68.75, 48.78, 80.36),
        ("RMM p=7", 143.75, 0.0, 0.0),
        ("RMM p=3, svd", 68.75, 22.46, 69.48),
        ("RMM p=3, procrustes", 68.75, 25.91, 73.18),
        ("RMM by factor p=3", 50.05, 68.20, 100.25),
        ("shared subspace k=16", 16.67, 39.10, 95.39),
        ("rank 8", 50.0, 11.31, 42.44),
        ("rank 4", 25.0, 18.90, 60.49),
        ("8-bit blocks", 26.56, 0.42, 0.61),
        ("4-bit blocks", 14.06, 6.83, 9.53),
        ("2-bit blocks", 7.81, 31.67, 38.18),
        ("EMR, on factors", 15.64, 77.24, 116.29),
        ("EMR, on products", 187.51, 82.33, 104.36),
        ("FlexMerge, 50 %", 50.0, 55.84, 115.11),
        ("Task Arithmetic, on factors", 12.5, 98.09, 100.30),
        ("Task Arithmetic, on products", 100.0, 92.66, 114.37),
        ("NAN, on products", 100.0, 90.26, 99.25),
        ("TIES, on factors", 12.5, 199.30, 405.13),
        ("TIES, on products", 150.0, 205.52, 398.32),
        ("LoRE, on products", 150.0, 215.86, 417.09),
    ],
)
def test_figures(
    rows: Mapping[str, Row], method: str, size: float, mean: float, largest: float
) -> None:
    row = rows[method]
    assert row.fraction is not None
    assert row.mean_error is not None
    assert row.max_error is not None
    assert 100 * row.fraction == pytest.approx(size, abs=0.01)
    assert row.fraction_stored == pytest.approx(2 * row.fraction)
    assert 100 * row.mean_error == pytest.approx(mean, abs=0.1)
    assert 100 * row.max_error == pytest.approx(largest, abs=0.5)


def test_dare_is_worse_than_the_mean_and_seeded(rows: Mapping[str, Row]) -> None:
    for on in ("factors", "products"):
        mean, dropped = rows[f"Task Arithmetic, on {on}"], rows[f"DARE, on {on}"]
        assert mean.mean_error is not None
        assert dropped.mean_error is not None
        assert mean.mean_error < dropped.mean_error < 1.5


@pytest.mark.parametrize(("label", "size", "most"), [("14", 0.14, 0.08), ("3", 0.03, 0.30)])
def test_the_planner_keeps_its_size_and_beats_the_rest(
    rows: Mapping[str, Row], label: str, size: float, most: float
) -> None:
    row = rows[f"planned, {label} %"]
    assert row.fraction_stored is not None
    assert row.mean_error is not None
    assert row.file_bytes is not None
    assert row.n_bytes is not None
    assert row.fraction_stored <= size
    assert row.mean_error < most
    assert row.best
    assert row.n_bytes < row.file_bytes < row.n_bytes + 20_000


def test_best_rows_are_no_worse_than_any_smaller_one(found: Comparison) -> None:
    best = {row.method for row in found.rows if row.best}
    assert "exact" in best
    assert "RMM p=3" not in best
    for row in found.rows:
        beaten = [
            other
            for other in found.rows
            if other is not row
            and (other.n_bytes or 0) <= (row.n_bytes or 0)
            and (other.mean_error or 0) < (row.mean_error or 0)
        ]
        assert not (row.best and beaten)


def test_which_methods_keep_tasks_apart(found: Comparison) -> None:
    collapsed = {row.family for row in found.rows if not row.keeps_tasks}
    assert collapsed == {"none", "task-arithmetic", "nan", "ties", "dare", "lore"}


def _factors(seed: int = 0, ranks: tuple[int, ...] = (2, 3, 1)) -> list[Factors]:
    rng = np.random.default_rng(seed)
    return [
        Factors(
            rng.standard_normal((r, 9)).astype(np.float32),
            rng.standard_normal((7, r)).astype(np.float32),
            1.0 + r,
        )
        for r in ranks
    ]


def _products(factors: list[Factors]) -> np.ndarray:
    return np.stack([f.scale * f.B.astype(np.float64) @ f.A.astype(np.float64) for f in factors])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("flexmerge",)])
def test_every_formula_takes_ranks_and_scales_that_differ(family: str) -> None:
    factors = _factors()
    for row in contenders(3, 3, families=[family]):
        if isinstance(row, Computed):
            rebuilt = row.rebuild(factors, 0)
            assert len(rebuilt.deltas) == 3
            assert all(math.isfinite(_error(f, d)) for f, d in zip(factors, rebuilt.deltas))  # noqa: B905


def test_lore_in_the_deltas_own_space_is_lore() -> None:
    factors = _factors(1, (2, 2, 2))
    (row,) = contenders(3, 2, families=["lore"])
    assert isinstance(row, Computed)
    (merged, *_) = row.rebuild(factors, 0).deltas
    assert isinstance(merged, Dense)
    want = lore_merge(lore(_products(factors)), 1.0, "ties", 0.2)
    np.testing.assert_allclose(merged.values, want, atol=1e-8)


def test_the_mean_of_products_is_counted_as_the_smaller_form() -> None:
    (_, row) = contenders(3, 3, families=["task-arithmetic"])
    assert isinstance(row, Computed)
    narrow = row.rebuild(_factors(2, (1, 1, 1)), 0)
    assert isinstance(narrow.deltas[0], Factors)
    assert narrow.n_bytes == 4 * 3 * 16
    wide = row.rebuild(_factors(2, (3, 3, 3)), 0)
    assert isinstance(wide.deltas[0], Dense)
    assert wide.n_bytes == 4 * 63
    np.testing.assert_allclose(
        wide.deltas[0].values, _products(_factors(2, (3, 3, 3))).mean(axis=0), atol=1e-12
    )


def test_error_of_a_dense_delta() -> None:
    (f,) = _factors(3, (2,))
    delta = f.scale * f.B.astype(np.float64) @ f.A.astype(np.float64)
    noise = np.random.default_rng(0).standard_normal(delta.shape)
    want = np.linalg.norm(noise) / np.linalg.norm(delta)
    assert _error(f, Dense(delta + noise)) == pytest.approx(want)
    assert _error(f, Dense(delta)) < 1e-7
    zero = Factors(f.A, np.zeros_like(f.B), 1.0)
    assert _error(zero, Dense(np.zeros_like(delta))) == 0.0
    assert _error(zero, Dense(delta)) == math.inf


def test_flexmerge_runs_from_all_apart_to_one() -> None:
    factors = _factors(4, (2, 2, 2))
    similarities, costs = survey_target(factors)

    class Survey:
        n_targets = 1

    Survey.similarities, Survey.costs = [similarities], [costs]  # type: ignore[attr-defined]
    sizes = []
    for row in contenders(3, 2, families=["flexmerge"]):
        assert isinstance(row, Computed)
        assert row.plan is not None
        sizes.append(row.rebuild(factors, row.plan(Survey())[0]).n_bytes)  # type: ignore[arg-type]
    one = 4 * 2 * 16
    assert sizes == [2 * one, one, one]


def test_refusals() -> None:
    with pytest.raises(OptionError, match="no method is called 'best'"):
        contenders(3, 4, families=["best"])
    with pytest.raises(OptionError, match="sizes"):
        contenders(3, 4, sizes=[0.0])
