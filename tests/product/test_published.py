"""RMM as published, from adapters to file to factors: storage, error, and exactness at full p."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rmmformat as rmm
from rmmformat.inspect import file_info
from rmmformat.merge.error import relative_error
from rmmformat.merge.rmm import storage_fraction
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert, open_sources

from .conftest import make_tasks


@pytest.mark.parametrize(
    ("align", "mean", "median", "worst"),
    [("none", 0.4878, 0.4471, 0.8036), ("svd", 0.2246, 0.195, 0.695)],
)
def test_the_demo_adapters_have_the_known_errors(
    demo_adapters: Path, tmp_path: Path, align: str, mean: float, median: float, worst: float
) -> None:
    report = rmm.convert(
        demo_adapters, tmp_path / "x.rmm", components=3, encoding="f32", align=align
    )
    with rmm.open(tmp_path / "x.rmm") as collection:
        errors = collection.index.table("erro")["error"]
    assert errors.mean() == pytest.approx(mean, abs=1e-3)
    assert np.median(errors) == pytest.approx(median, abs=5e-3)
    assert errors.max() == pytest.approx(worst, abs=2e-3)
    # The originals are f16: the published 0.6875 in f32 is twice that of their bytes.
    assert report.fraction == pytest.approx(2 * 0.6875, abs=1e-12)
    assert len(report.tasks) == 8


def test_rows_keep_the_dtype_of_the_originals(demo_adapters: Path, tmp_path: Path) -> None:
    report = rmm.convert(demo_adapters, tmp_path / "x.rmm", components=3)
    assert report.fraction == pytest.approx(0.6875, abs=1e-12)
    overhead = 1 - (report.factor_bytes + report.private_bytes) / report.file_bytes
    assert overhead < 0.01


@given(
    n=st.integers(2, 9),
    rank=st.sampled_from([16, 32, 64, 128]),
    p=st.integers(1, 7),
)
@settings(max_examples=12, deadline=None)
def test_info_reports_the_published_storage(
    tmp_path_factory: pytest.TempPathFactory, n: int, rank: int, p: int
) -> None:
    path = tmp_path_factory.mktemp("formula") / "x.rmm"
    p = min(p, n - 1)
    convert(
        make_tasks(n, rank=rank, sides=((24, 9),), seed=n * rank + p),
        path,
        choose_method(components=p, encoding="f32"),
    )
    with rmm.open(path) as collection:
        assert file_info(collection).fraction == pytest.approx(storage_fraction(n, rank, p))


def test_all_components_give_every_task_back(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    rmm.convert(demo_adapters, path, components=7, encoding="f32")
    with rmm.open(path) as collection:
        for source in open_sources(demo_adapters):
            loaded = collection.load(source.name)
            for target in source.targets:
                want, got = source.factors(target), loaded[target]
                original = want.A.astype(np.float32)
                atol = 3e-7 * float(np.abs(original).max())
                np.testing.assert_allclose(got.A, original, rtol=0, atol=atol)
                error = relative_error(want.A, want.B, want.scale, got.A, got.B, got.scale)
                assert error < 2e-7


@pytest.mark.parametrize("grouping", ["position", "factor", "row", 5])
@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q8", "q4"])
def test_every_grouping_and_encoding_comes_back_as_recorded(
    tmp_path: Path, grouping: str | int, encoding: str
) -> None:
    tasks = make_tasks(4, rank=lambda t: 2 + t)
    path = tmp_path / "x.rmm"
    report = convert(tasks, path, choose_method(components=2, grouping=grouping, encoding=encoding))
    with rmm.open(path) as collection:
        assert collection.validate().ok
        for task, told in zip(tasks, report.tasks, strict=True):
            loaded = collection.load(task.name)
            errors = []
            for target in task.targets:
                want, got = task.factors(target), loaded[target]
                assert got.A.shape == want.A.shape
                assert got.B.shape == want.B.shape
                errors.append(relative_error(want.A, want.B, want.scale, got.A, got.B, got.scale))
            assert max(errors) == pytest.approx(told.max_error, rel=1e-6)
            assert np.mean(errors) == pytest.approx(told.mean_error, rel=1e-6)


def test_one_task_alone_is_its_mean(tmp_path: Path) -> None:
    (task,) = make_tasks(1)
    report = convert([task], tmp_path / "x.rmm", choose_method(components=3, encoding="f32"))
    assert report.tasks[0].max_error < 1e-7
    assert report.fraction == pytest.approx(1.0)


def test_values_beyond_half_precision_are_kept_wide(tmp_path: Path) -> None:
    (task,) = make_tasks(1)
    task.factors("layer.0").A[1] *= 1e6
    convert([task], tmp_path / "x.rmm", choose_method(components=1, encoding="f16"))
    with rmm.open(tmp_path / "x.rmm") as collection:
        A = collection.load("task0")["layer.0"].A
    assert np.isfinite(A).all()
    np.testing.assert_allclose(A, task.factors("layer.0").A, rtol=1e-3)
