"""``rmm bench``: what it counts and shows; how fast things are is not tested."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import rmmformat as rmm
from rmmformat import bench as module
from rmmformat.bench import bench, copy_speed
from rmmformat.cli.main import main
from rmmformat.errors import NotFoundError
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert

from .conftest import make_tasks


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENOUGH", 0.0)
    monkeypatch.setattr(module, "_STREAM", 1 << 20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.rmm"
    method = choose_method(components=2, encoding="f32")
    convert(make_tasks(20, sides=((300, 200), (170, 330))), path, method)
    return path


def test_counts_the_bytes_that_must_move(file: Path) -> None:
    report = bench(file)
    # Mean and two directions of both factors, shared; two coefficients a position, of each task.
    positions = 300 + 200 + 170 + 330
    frames, own, factors = 4 * 4 * 3 * positions, 4 * 2 * positions, 4 * 4 * positions
    for task in report.tasks:
        assert task.n_targets == 2
        assert frames + own <= task.read_bytes <= frames + own + 4 * 64
        assert factors <= task.written_bytes <= factors + 4 * 64
    assert report.file_bytes == file.stat().st_size
    assert (report.n_tasks, report.dtype, report.path) == (20, "f32", os.fspath(file))


def test_half_as_many_bytes_are_written_as_f16(file: Path) -> None:
    (full,), (half,) = (bench(file, tasks=["task3"], dtype=d).tasks for d in ("f32", "f16"))
    assert half.read_bytes == full.read_bytes
    assert half.written_bytes < 0.6 * full.written_bytes


def test_figures_agree(file: Path) -> None:
    report = bench(file)
    assert report.open > 0
    for task in report.tasks:
        moved = task.read_bytes + task.written_bytes
        assert min(task.first, task.switch) > 0
        assert task.rate == pytest.approx(moved / task.switch)
        assert task.copy == pytest.approx(moved / report.copy.rate)
        assert task.ratio == pytest.approx(task.rate / report.copy.rate)
    assert report.ratio == statistics.median(task.ratio for task in report.tasks)
    assert report.copy.n_bytes == 1 << 20
    assert report.same_size.n_bytes == max(task.written_bytes for task in report.tasks)
    assert 1 <= report.copy.threads <= report.cpus


def test_the_copy_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copyto = np.copyto

    def counted(target: np.ndarray, source: np.ndarray) -> None:
        copied.append(target.nbytes)
        copyto(target, source)

    monkeypatch.setattr(module.np, "copyto", counted)
    monkeypatch.setattr(module, "_cpus", lambda: 3)
    speed = copy_speed(3000)
    assert copied.count(3000) == module._LEAST
    assert copied.count(1000) == 3 * module._LEAST
    assert speed.rate == pytest.approx(6000 / speed.seconds)


def test_a_switch_comes_from_another_task(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[str, int]] = []
    load = rmm.Collection.load

    def watched(self: rmm.Collection, task: str, **given: object) -> rmm.LoadedTask:
        out = given["out"]
        assert isinstance(out, np.ndarray)
        loads.append((task, out.ctypes.data))
        return load(self, task, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(rmm.Collection, "load", watched)
    bench(file, tasks=["task3", "task4"])
    switches = [(a, b) for a, b in itertools.pairwise(loads) if a[0] != b[0] and a[1] == b[1]]
    assert sum(b[0] == "task3" for _, b in switches) >= module._LEAST
    assert sum(b[0] == "task4" for _, b in switches) >= module._LEAST


def test_which_tasks(file: Path) -> None:
    names = [task.name for task in bench(file).tasks]
    with rmm.open(file) as collection:
        tasks = collection.tasks
    assert len(names) == 8
    assert (names[0], names[-1]) == (tasks[0], tasks[-1])
    assert names == sorted(names)
    found = [task.name for task in bench(file, tasks=["task1*", "task10"]).tasks]
    assert found == [name for name in tasks if name.startswith("task1")]
    with pytest.raises(NotFoundError, match="tusk"):
        bench(file, tasks=["tusk1"])


def test_a_file_without_tasks(tmp_path: Path) -> None:
    from rmmformat.format.writer import Writer

    with Writer(tmp_path / "empty.rmm") as writer:
        writer.finish(None)
    report = bench(tmp_path / "empty.rmm")
    assert (report.tasks, report.ratio) == ((), 0.0)


def test_the_verb(file: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(main, ["bench", os.fspath(file), "--json", "--task", "task5"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (task,) = found["tasks"]
    assert task["ratio"] == pytest.approx(task["rate"] / found["copy"]["rate"])
    assert found["same_size"]["rate"] > 0
    result = runner.invoke(main, ["bench", os.fspath(file), "--threads", "1", "--dtype", "bf16"])
    assert result.exit_code == 0, result.output
    assert "task19" in result.stdout
    assert "of the streaming copy's rate" in result.stdout
    assert runner.invoke(main, ["bench", os.fspath(file), "--task", "no"]).exit_code == 1
