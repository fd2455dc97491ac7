"""What tasks share is found, and pays; where nothing is shared nothing is lost."""

from __future__ import annotations

import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import rmmformat as rmm
from rmmformat import clusters
from rmmformat.coding import MaxError, Method, Size
from rmmformat.deltas import Delta
from rmmformat.format.catalog import decode_catalog
from rmmformat.inspect import compare_with_sources, entry_infos
from rmmformat.model import Factors
from rmmformat.pipeline import ConvertReport, convert
from rmmformat.plan import plan

from .conftest import MemoryTask

F64 = npt.NDArray[np.float64]
N_IN, N_OUT = 192, 160


def task(name: str, a: F64, b: F64) -> MemoryTask:
    return MemoryTask(name, {"layer": Factors(a.astype("f4"), b.astype("f4"), 2.0)})


def one_row_space(
    n: int, ranks: tuple[int, ...] = (6,), outlier: bool = False, seed: int = 5
) -> list[MemoryTask]:
    """Rows of A are combinations of the same 8, in other ones for each task."""
    rng = np.random.default_rng(seed)
    space = rng.standard_normal((8, N_IN))
    tasks = []
    for t in range(n):
        rank = ranks[t % len(ranks)]
        mixing = 0.6 ** np.arange(rank)[:, None] * rng.standard_normal((rank, 8))
        a = mixing @ space
        if outlier and t == n - 1:
            a = rng.standard_normal((rank, N_IN))
        tasks.append(task(f"t{t:02}", a, rng.standard_normal((N_OUT, rank))))
    return tasks


def one_start(n: int) -> list[MemoryTask]:
    """The same delta, each task having moved away a little in both factors."""
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((8, N_IN)), rng.standard_normal((N_OUT, 8))
    return [
        task(
            f"t{t:02}",
            a + 0.1 * rng.standard_normal(a.shape),
            b + 0.1 * rng.standard_normal(b.shape),
        )
        for t in range(n)
    ]


def unrelated(n: int) -> list[MemoryTask]:
    rng = np.random.default_rng(7)
    return [
        task(f"t{t:02}", rng.standard_normal((8, N_IN)), rng.standard_normal((N_OUT, 8)))
        for t in range(n)
    ]


def mixed(*kinds: list[MemoryTask]) -> list[MemoryTask]:
    """Tasks of several collections in one, taking turns."""
    longest = max(map(len, kinds))
    return [
        MemoryTask(f"{place:02}-{number}", items[place]._factors)
        for place in range(longest)
        for number, items in enumerate(kinds)
        if place < len(items)
    ]


def families() -> list[MemoryTask]:
    """Three that share with their own kind only, and four that share with none."""
    return mixed(one_row_space(7, seed=5), one_row_space(6, seed=15), one_start(6), unrelated(4))


def both(
    tasks: list[MemoryTask], method: Method, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ConvertReport, ConvertReport]:
    """Shared and alone; every recorded error is what the reader's factors give."""
    report = convert(tasks, folder / "shared.rmm", method)
    with rmm.open(folder / "shared.rmm") as collection:
        found = collection.validate()
        assert found.ok, found.violations
        for comparison in compare_with_sources(collection, tasks):
            assert not comparison.problems
    with monkeypatch.context() as patch:
        patch.setattr(clusters, "frames", lambda *_: [])
        alone = convert(tasks, folder / "alone.rmm", method, overwrite=True)
    return report, alone


@pytest.mark.parametrize(
    ("tasks", "bound", "gain"),
    [
        (one_row_space(24), 0.1, 1.8),
        (one_row_space(8), 0.1, 1.5),
        (one_row_space(24, (6, 3, 8)), 0.1, 1.75),
        (one_start(12), 0.1, 3.4),
        (one_start(12), 0.25, 6.7),
    ],
)
def test_gain_at_equal_error(
    tasks: list[MemoryTask],
    bound: float,
    gain: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, alone = both(tasks, MaxError(bound), tmp_path, monkeypatch)
    assert shared.max_error <= bound
    assert alone.factor_bytes / shared.factor_bytes > gain


def test_gain_grows_with_the_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = []
    for n in (4, 8, 16, 48):
        shared, alone = both(one_row_space(n), MaxError(0.1), tmp_path, monkeypatch)
        (tmp_path / "shared.rmm").unlink()
        gains.append(alone.factor_bytes / shared.factor_bytes)
    assert gains == sorted(gains)
    assert gains[-1] > 1.6


@pytest.mark.parametrize("method", [MaxError(0.1), MaxError(0.5), Size(0.05)])
def test_no_loss_where_nothing_is_shared(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(unrelated(6), method, tmp_path, monkeypatch)
    assert (tmp_path / "shared.rmm").read_bytes() == (tmp_path / "alone.rmm").read_bytes()


@pytest.mark.parametrize("tasks", [one_row_space(24), one_start(12), one_row_space(12, (6, 3, 8))])
@pytest.mark.parametrize("size", [0.02, 0.06, 0.15])
def test_a_size_buys_less_error(
    tasks: list[MemoryTask], size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, alone = both(tasks, Size(size), tmp_path, monkeypatch)
    assert shared.fraction <= size
    assert shared.mean_error < 0.92 * alone.mean_error


def test_one_that_shares_nothing_stands_alone(tmp_path: Path) -> None:
    tasks = one_row_space(24, outlier=True)
    report = convert(tasks, tmp_path / "x.rmm", MaxError(0.1))
    assert report.max_error <= 0.1
    own = {item.name: item.max_error for item in report.tasks}
    assert own["t23"] <= 0.1


def test_equal_ones_are_still_stored_once(tmp_path: Path) -> None:
    tasks = one_row_space(12)
    first = convert(tasks, tmp_path / "a.rmm", MaxError(0.1))
    twin = [MemoryTask(f"z{t}", tasks[0]._factors) for t in range(3)]
    second = convert([*tasks, *twin], tmp_path / "b.rmm", MaxError(0.1))
    assert second.max_error <= 0.1
    assert second.factor_bytes < 1.12 * first.factor_bytes


def test_the_file_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    tasks = one_start(6)
    convert(tasks, tmp_path / "a.rmm", MaxError(0.1))
    with ProcessPoolExecutor(2) as executor:
        convert(tasks, tmp_path / "b.rmm", MaxError(0.1), executor=executor)
    assert (tmp_path / "a.rmm").read_bytes() == (tmp_path / "b.rmm").read_bytes()


def test_scales_of_tasks_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []
    for t, item in enumerate(one_row_space(16)):
        layer = item._factors["layer"]
        tasks.append(task(f"t{t:02}", layer.A.astype("f8") * 10.0 ** (t - 8), layer.B.astype("f8")))
    shared, alone = both(tasks, MaxError(0.1), tmp_path, monkeypatch)
    assert shared.max_error <= 0.1
    assert alone.factor_bytes > 1.3 * shared.factor_bytes


def test_a_frame_may_be_made_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_SAMPLE", 8)
    for tasks, gain in ((one_row_space(24), 1.3), (one_start(12), 3.4)):
        shared, alone = both(tasks, MaxError(0.1), tmp_path, monkeypatch)
        (tmp_path / "shared.rmm").unlink()
        assert alone.factor_bytes > gain * shared.factor_bytes


def test_families_have_frames_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller than with one frame for all, which is smaller than with none or as small."""
    tasks = families()
    shared, alone = both(tasks, MaxError(0.1), tmp_path, monkeypatch)
    assert shared.max_error <= 0.1
    with rmm.open(tmp_path / "shared.rmm") as collection:
        frames = [len(found) for found in decode_catalog(collection.index, None).frames.values()]
        assert frames == [3]
    monkeypatch.setattr(clusters, "families", lambda _: [])
    one = convert(tasks, tmp_path / "one.rmm", MaxError(0.1))
    assert one.factor_bytes <= alone.factor_bytes
    assert shared.factor_bytes < 0.8 * one.factor_bytes


def test_families_at_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, alone = both(families(), Size(0.06), tmp_path, monkeypatch)
    assert shared.fraction <= 0.06
    assert shared.mean_error < 0.8 * alone.mean_error


def test_members_outside_the_sample_find_their_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(families(), tmp_path / "a.rmm", MaxError(0.1))
    monkeypatch.setattr(clusters, "_SAMPLE", 14)
    found = convert(families(), tmp_path / "b.rmm", MaxError(0.1))
    assert found.factor_bytes < 1.1 * whole.factor_bytes


def test_savings_of_one_target_go_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets that share unequally: the one that shares nothing gets more than it would alone."""
    tasks = [
        MemoryTask(f"t{t:02}", {"own": own._factors["layer"], "shared": same._factors["layer"]})
        for t, (own, same) in enumerate(zip(unrelated(10), one_start(10), strict=True))
    ]
    shared, _ = both(tasks, Size(0.06), tmp_path, monkeypatch)
    assert 0.97 * 0.06 < shared.fraction <= 0.06
    errors = {}
    for name in ("shared", "alone"):
        with rmm.open(tmp_path / f"{name}.rmm") as collection:
            errors[name] = {
                target: np.mean([e.error for e in entry_infos(collection) if e.target == target])
                for target in ("own", "shared")
            }
    assert errors["shared"]["own"] < 0.95 * errors["alone"]["own"]
    assert errors["shared"]["shared"] < 0.95 * errors["alone"]["shared"]


@pytest.mark.parametrize("method", [MaxError(0.1), Size(0.06)])
def test_decompositions_in_memory_are_bounded(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many deltas a target has, only so many bytes of them live; the file is the same."""
    tasks = one_row_space(40)
    convert(tasks, tmp_path / "a.rmm", method)
    one = 8 * 6 * (N_IN + N_OUT)
    monkeypatch.setattr(clusters, "_KEPT_BYTES", 5 * one)
    alive: set[int] = set()
    most = 0

    class Counted(Delta):
        def __init__(self, original: Factors) -> None:
            nonlocal most
            super().__init__(original)
            alive.add(id(self))
            weakref.finalize(self, alive.discard, id(self))
            most = max(most, len(alive))

    monkeypatch.setattr(clusters, "Delta", Counted)
    monkeypatch.setattr(clusters, "_SAMPLE_BYTES", 10 * one)
    convert(tasks, tmp_path / "b.rmm", method)
    assert 10 <= most <= 5 + 10 + 2
    assert len(tasks) == 40


def test_the_plan_foresees_what_is_shared(tmp_path: Path) -> None:
    for tasks in (one_row_space(24), one_start(12), families()):
        settings = {"max_errors": [0.1, 0.3], "sizes": [0.05]}
        foreseen = plan(tasks, **settings).points  # type: ignore[arg-type]
        measured = plan(tasks, measure=True, **settings).points  # type: ignore[arg-type]
        for guess, fact in zip(foreseen[:3], measured[:3], strict=True):
            assert guess.option == fact.option
            assert guess.factor_bytes == pytest.approx(fact.factor_bytes, rel=0.05)
            assert guess.mean_error == pytest.approx(fact.mean_error, rel=0.1)
