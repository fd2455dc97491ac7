"""The dials: an error that holds for every delta, a size that is not exceeded, and the curve."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import rmmformat as rmm
from rmmformat.cli.main import main
from rmmformat.deltas import fit_size
from rmmformat.errors import OptionError
from rmmformat.inspect import compare_with_sources, entry_infos
from rmmformat.merge.error import relative_error
from rmmformat.methods import choose_method, parse_fraction
from rmmformat.model import Factors
from rmmformat.pipeline import ConvertReport, convert, open_sources
from rmmformat.plan import plan

from .conftest import MemoryTask, make_tasks


def decaying(
    n: int, *, rank: int = 8, sides: tuple[int, int] = (200, 300), seed: int = 0
) -> list[MemoryTask]:
    """Tasks whose singular values fall by half from one to the next."""
    rng, fall = np.random.default_rng(seed), 0.5 ** np.arange(rank)[:, None]
    return [
        MemoryTask(
            f"task{t}",
            {
                f"layer.{i}": Factors(
                    (fall * rng.standard_normal((rank, sides[0]))).astype("f4"),
                    rng.standard_normal((sides[1], rank)).astype("f4"),
                    2.0,
                )
                for i in range(3)
            },
        )
        for t in range(n)
    ]  # fmt: skip


def check_file(path: Path, tasks: list[MemoryTask]) -> None:
    """Every recorded error is what the native reader's factors give, and the file is valid."""
    with rmm.open(path) as collection:
        report = collection.validate()
        assert report.ok, report.violations
        for comparison in compare_with_sources(collection, tasks):
            assert not comparison.problems


# Pinned on the demo adapters: factor bytes in per cent, mean and largest error in per cent.
@pytest.mark.parametrize(
    ("options", "size", "mean", "largest"),
    [
        ({"max_error": 0.05}, 16.51, 4.96, 5.0),
        ({"max_error": "20%"}, 5.55, 19.83, 20.0),
        ({"max_error": 0.001}, 51.1, 0.099, 0.1),
        ({"size": "10%"}, 9.96, 10.21, 19.4),
        ({"size": 0.03}, 2.99, 26.45, 73.0),
        ({"size": 0.01}, 0.997, 49.9, 100.0),
    ],
)
def test_figures_on_real_adapters(
    demo_adapters: Path,
    tmp_path: Path,
    options: dict[str, float | str],
    size: float,
    mean: float,
    largest: float,
) -> None:
    path = tmp_path / "x.rmm"
    report = rmm.convert(demo_adapters, path, **options)  # type: ignore[arg-type]
    assert 100 * report.fraction == pytest.approx(size, rel=0.01)
    assert 100 * report.mean_error == pytest.approx(mean, rel=0.01)
    assert 100 * report.max_error == pytest.approx(largest, rel=0.03)
    with rmm.open(path) as collection:
        assert collection.validate().ok
        errors = {(e.task, e.target): e.error for e in entry_infos(collection)}
        tasks = open_sources(demo_adapters)
        for task in tasks:
            loaded = collection.load(task.name)
            for target in task.targets:
                want, got = task.factors(target), loaded[target]
                error = relative_error(want.A, want.B, want.scale, got.A, got.B, got.scale)
                assert error == pytest.approx(errors[task.name, target], rel=1e-5)
                if "max_error" in options:
                    assert error <= parse_fraction(options["max_error"], "max_error")
    if "size" in options:
        asked = parse_fraction(options["size"], "size")
        assert 0.98 * asked < report.fraction <= asked


def test_the_default_is_within_5_per_cent(tmp_path: Path) -> None:
    tasks = decaying(2)
    convert(tasks, tmp_path / "a.rmm", choose_method())
    convert(tasks, tmp_path / "b.rmm", choose_method(max_error=0.05))
    assert (tmp_path / "a.rmm").read_bytes() == (tmp_path / "b.rmm").read_bytes()


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.02, 1e-3, 1e-5, 3e-7, 1e-12])
def test_the_bound_holds_from_coarse_to_exact(tmp_path: Path, bound: float) -> None:
    tasks = decaying(2)
    report = convert(tasks, tmp_path / "x.rmm", choose_method(max_error=bound))
    check_file(tmp_path / "x.rmm", tasks)
    assert report.max_error <= bound
    assert report.fraction <= 1


def test_curves_fall(tmp_path: Path) -> None:
    tasks, path = decaying(3), tmp_path / "x.rmm"

    def run(**options: float) -> ConvertReport:
        return convert(tasks, path, choose_method(**options), overwrite=True)  # type: ignore[arg-type]

    sizes = [run(size=s) for s in (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 1.0)]
    assert all(a.mean_error > b.mean_error for a, b in itertools.pairwise(sizes))
    assert sizes[-1].max_error == 0
    bounds = [run(max_error=e) for e in (0.5, 0.3, 0.1, 0.03, 0.01, 0.001)]
    assert all(a.factor_bytes < b.factor_bytes for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("options", [{"max_error": 0.05}, {"size": 0.1}])
@pytest.mark.parametrize("case", ["zero", "rank one", "rank above sides", "one", "ragged", "tiny",
                                  "huge scale", "extreme", "sparse", "half"])  # fmt: skip
def test_every_kind_of_delta(tmp_path: Path, case: str, options: dict[str, float]) -> None:
    rng = np.random.default_rng(5)
    tasks = decaying(3)
    if case == "zero":
        dead = Factors(np.ones((4, 50), np.float32), np.zeros((60, 4), np.float32), 1.0)
        tasks = [*tasks, MemoryTask("zero", {"layer.0": dead, "layer.9": dead})]
        tasks[-1].targets.pop("layer.0")
    elif case == "rank one":
        tasks = decaying(2, rank=1)
    elif case == "rank above sides":
        tasks = make_tasks(2, rank=20, sides=((7, 5), (3, 400)))
    elif case == "one":
        tasks = decaying(1)
    elif case == "ragged":
        tasks = make_tasks(4, rank=lambda t: 1 + 3 * t, sides=((90, 70), (200, 31)))
        tasks[2].targets.pop("layer.1")
    elif case == "tiny":
        tasks = make_tasks(2, rank=1, sides=((3, 2), (1, 1)))
    elif case == "huge scale":
        factors = dict(tasks[0]._factors)
        one = factors["layer.0"]
        factors["layer.0"] = Factors(1e12 * one.A, 1e-11 * one.B, -3e4)
        tasks[0] = MemoryTask("task0", factors)
    elif case == "extreme":
        a, b = rng.standard_normal((4, 90)), rng.standard_normal((80, 4))
        tasks = []
        for e in (-21, -11, 0, 11, 18):
            factors = Factors((10.0**e * a).astype("f4"), (10.0**e * b).astype("f4"), 1.0)
            tasks.append(MemoryTask(f"e{e}", {"layer": factors}))
    elif case == "sparse":
        a, b = np.zeros((4, 900), "f4"), np.zeros((800, 4), "f4")
        a[np.arange(4), [1, 5, 77, 800]] = 1, 2, 3, 4
        b[[9, 3, 700, 2], np.arange(4)] = 1, 1, 1, 100
        tasks = [MemoryTask("s", {"layer": Factors(a, b, 1.0)})]
    elif case == "half":
        tasks = make_tasks(2, rank=8, sides=((300, 200),), dtype=ml_dtypes.bfloat16)
    if "size" in options and case in ("tiny", "extreme"):
        options = {"size": 1.0}  # less has no room for anything; what f32 cannot hold stays exact
    report = convert(tasks, tmp_path / "x.rmm", choose_method(**options))  # type: ignore[arg-type]
    check_file(tmp_path / "x.rmm", tasks)
    assert report.fraction <= options.get("size", 1.0)
    assert report.max_error <= options.get("max_error", 1.0)


def test_duplicates_cost_once(tmp_path: Path) -> None:
    (one,) = decaying(1)
    alone = convert([one], tmp_path / "a.rmm", choose_method(max_error=0.1))
    twins = [one, MemoryTask("twin", one._factors), *decaying(1, seed=7)]
    twins[2].name = "other"
    report = convert(twins, tmp_path / "b.rmm", choose_method(max_error=0.1))
    check_file(tmp_path / "b.rmm", twins)
    assert report.factor_bytes < 2.1 * alone.factor_bytes
    sized = convert(twins, tmp_path / "c.rmm", choose_method(size=0.05))
    check_file(tmp_path / "c.rmm", twins)
    assert 0.97 * 0.05 < sized.fraction <= 0.05
    errors = {task.name: task.mean_error for task in sized.tasks}
    assert errors["task0"] == errors["twin"] < errors["other"]


def test_not_finite_stays_exact(tmp_path: Path) -> None:
    tasks = decaying(2)
    bad = tasks[0]._factors["layer.1"].A
    bad.view(np.uint32)[2, 5] = 0x7FC12345
    for options in ({"max_error": 0.1}, {"size": 0.5}):
        path = tmp_path / "x.rmm"
        convert(tasks, path, choose_method(**options), overwrite=True)  # type: ignore[arg-type]
        with rmm.open(path) as collection:
            assert collection.load("task0")["layer.1"].A.tobytes() == bad.tobytes()
    with pytest.raises(OptionError, match="NaN"):
        convert(tasks, path, choose_method(size=0.01), overwrite=True)


def test_a_size_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no room"):
        convert(decaying(1), tmp_path / "x.rmm", choose_method(size=1e-6))
    assert list(tmp_path.iterdir()) == []


def test_fitting_a_size_survives_bytes_that_no_slope_foresees() -> None:
    """A frame's rows may cost thousands of times what the components at the first step promise."""

    def attempt(factor: float) -> list[Any]:
        return [SimpleNamespace(n_bytes=10_000 if factor < 2.0**40 else 10)]

    coded, factor = fit_size(attempt, 100, 1 / 8)
    assert coded[0].n_bytes == 10
    assert 2.0**40 <= factor < np.inf
    coded, factor = fit_size(attempt, -100, 1 / 8)  # nothing fits
    assert (coded[0].n_bytes, factor) == (10, np.inf)


@pytest.mark.parametrize("options", [{"max_error": 0.1}, {"size": 0.05}])
def test_workers_write_the_same_file(
    demo_adapters: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    one, two = tmp_path / "1.rmm", tmp_path / "2.rmm"
    rmm.convert(demo_adapters, one, **options)  # type: ignore[arg-type]
    with ProcessPoolExecutor(2) as executor:
        rmm.convert(demo_adapters, two, executor=executor, **options)  # type: ignore[arg-type]
    assert one.read_bytes() == two.read_bytes()


def test_half_precision_holds_both_factors(tmp_path: Path) -> None:
    """Factors come back balanced, so that an export in f16 overflows no more than the delta."""
    tasks = decaying(1)
    one = tasks[0]._factors["layer.0"]
    tasks = [MemoryTask("t", {"layer.0": Factors(1e6 * one.A, 1e-6 * one.B, 1.0)})]
    convert(tasks, tmp_path / "x.rmm", choose_method(max_error=0.01))
    with rmm.open(tmp_path / "x.rmm") as collection:
        got = collection.load("t", dtype="f16")["layer.0"]
    assert 0.25 < np.linalg.norm(got.A.astype("f8")) / np.linalg.norm(got.B.astype("f8")) < 4
    want = tasks[0]._factors["layer.0"]
    assert relative_error(want.A, want.B, 1.0, got.A, got.B, 1.0) < 0.0101


@pytest.mark.parametrize(
    "options",
    [
        {"max_error": 0.1, "size": 0.1},
        {"max_error": 0.1, "exact": True},
        {"size": 0.1, "components": 3},
        {"size": 0.1, "encoding": "q8"},
        {"max_error": 0.1, "align": "svd"},
        {"exact": True, "encoding": "f32"},
        {"encoding": "trellis"},
        {"max_error": 0},
        {"max_error": 1},
        {"max_error": "5 percent"},
        {"size": -0.1},
        {"size": "nan"},
    ],
)
def test_contradictions_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        choose_method(**options)  # type: ignore[arg-type]


def test_fractions() -> None:
    assert parse_fraction("5%", "size") == parse_fraction(" 5 %", "size") == 0.05
    assert parse_fraction("0.05", "size") == parse_fraction(0.05, "size") == 0.05


def test_an_interrupt_leaves_nothing(demo_adapters: Path, tmp_path: Path) -> None:
    script = """
import os, signal, sys
import rmmformat
def stop(what, done, total):
    if what == sys.argv[3] and done == 3:
        os.kill(os.getpid(), signal.SIGINT)
rmmformat.convert(sys.argv[1], sys.argv[2], size=0.05, progress=stop)
"""
    for moment in ("survey", "targets"):
        done = subprocess.run(
            [sys.executable, "-c", script, demo_adapters, tmp_path / "x.rmm", moment],
            capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )  # fmt: skip
        assert done.returncode in (-signal.SIGINT, 1), done.stderr
        assert "KeyboardInterrupt" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_exact_tensors_survive_the_way_there_and_back(demo_adapters: Path, tmp_path: Path) -> None:
    """Through export: every source tensor's bytes and dtype, in all three dtypes and with a NaN."""
    source = tmp_path / "in" / "mixed"
    source.mkdir(parents=True)
    config = json.loads((demo_adapters / "imdb" / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config))
    original = load_file(demo_adapters / "imdb" / "adapter_model.safetensors")
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    for number, name in enumerate(sorted(original)):
        if "lora" in name:
            original[name] = original[name].astype(kinds[number % 3])
    odd = next(n for n in sorted(original) if "lora_A" in n and original[n].dtype == np.float32)
    original[odd] = original[odd] + np.float32(1e-6)  # values that no narrower dtype has
    original[odd].view(np.uint32)[0, 0] = 0x7FC54321
    save_file(original, source / "adapter_model.safetensors")
    adapters = [source, demo_adapters / "bbc", demo_adapters / "spam"]
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in (demo_adapters / "bbc").iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    report = rmm.convert([*adapters, twin], tmp_path / "x.rmm", exact=True, options=_any())
    files = sum(
        f.n_bytes for path in adapters for t in open_sources(path, options=_any()) for f in t.files
    )
    assert report.file_bytes <= 1.01 * files
    with rmm.open(tmp_path / "x.rmm") as collection:
        assert collection.validate().ok
        assert collection.tasks == ("bbc", "mixed", "spam", "twin")
    for path in (*adapters, twin):
        out = tmp_path / "out" / path.name
        out.parent.mkdir(exist_ok=True)
        words = ["export", tmp_path / "x.rmm", path.name, "--to", "peft", "-o", out]
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        want, got = (load_file(p / "adapter_model.safetensors") for p in (path, out))
        assert sorted(want) == sorted(got)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype, name
            assert got[name].tobytes() == tensor.tobytes(), name


def _any() -> object:
    from rmmformat.converters.base import Options

    return Options(allow_nonfinite=True)


def test_the_plan_foresees_what_comes_out(demo_adapters: Path) -> None:
    foreseen = plan(demo_adapters, max_errors=[0.1], sizes=[0.03])
    measured = plan(demo_adapters, max_errors=[0.1], sizes=[0.03], measure=True)
    assert foreseen.n_distinct == foreseen.n_deltas == 96
    assert foreseen.original_bytes == 8 * 12 * 2 * 16 * (384 + 384)
    for guess, fact in zip(foreseen.points, measured.points, strict=True):
        assert guess.option == fact.option
        assert guess.factor_bytes == pytest.approx(fact.factor_bytes, rel=0.015)
        assert guess.file_bytes == pytest.approx(fact.file_bytes, rel=0.02)
        assert guess.saves == fact.saves
        if guess.mean_error is not None:
            assert guess.mean_error == pytest.approx(fact.mean_error, rel=0.02)
    published = [p for p in foreseen.points if "components" in p.option]
    assert [p.option for p in published] == [f"--components {p}" for p in range(1, 6)]
    assert published[2].fraction == pytest.approx(0.6875)
    assert not published[-1].saves


def test_the_plan_says_where_nothing_is_saved(demo_adapters: Path, tmp_path: Path) -> None:
    words = ["plan", str(demo_adapters), "--size", "3%", "--json"]
    report = json.loads(CliRunner().invoke(main, words).stdout)
    assert [p["saves"] for p in report["points"]][:2] == [True, True]
    done = CliRunner().invoke(main, words[:-1])
    assert done.exit_code == 0
    assert "no saving here" in done.output
    tiny = {"layer": Factors(np.ones((1, 4), np.float32), np.ones((4, 1), np.float32), 1.0)}
    points = plan([MemoryTask("a", tiny)]).points
    assert not any(point.saves for point in points)


def test_the_command_says_what_it_does_by_default(demo_adapters: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", str(demo_adapters), "-o", str(tmp_path / "x.rmm")])
    assert done.exit_code == 0
    assert "within 5.00 %" in done.stderr
    assert "--exact" in done.stderr
    assert "max 5.00 %" in done.stdout or "max 4.9" in done.stdout
