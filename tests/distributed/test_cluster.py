"""Conversions on other processes: the same bytes, whoever computes them and whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import rmmformat as rmm
from rmmformat import pipeline, workers
from rmmformat.cli.main import main
from rmmformat.errors import OptionError, RemoteError, RmmError, UnsupportedError
from rmmformat.methods import choose_method
from rmmformat.model import Factors
from rmmformat.workers import worker_pool

from ..product.conftest import make_tasks
from .conftest import Cluster

METHODS: list[dict[str, Any]] = [
    {"max_error": 0.05},
    {"size": 0.1},
    {"components": 2, "align": "svd"},
    {"components": 2},  # done here, whoever would help
]


def bytes_of(
    sources: Any,
    path: Path,
    options: dict[str, Any],
    executor: Executor | None = None,
    **other: Any,
) -> bytes:
    method = choose_method(**options)
    pipeline.convert(sources, path, method, executor=executor, overwrite=True, **other)
    return path.read_bytes()


def test_a_cluster_gives_the_same_bytes(
    two_workers: Cluster, adapters: list[Path], tmp_path: Path
) -> None:
    with worker_pool(scheduler=two_workers.address) as executor:
        for options in METHODS:
            alone = bytes_of(adapters, tmp_path / "alone.rmm", options)
            assert bytes_of(adapters, tmp_path / "x.rmm", options, executor) == alone
    method = ["--components", "2"]
    for number, more in enumerate((["--scheduler", two_workers.address], [])):
        out = ["-o", os.fspath(tmp_path / f"{number}.rmm")]
        result = CliRunner().invoke(
            main, ["convert", *map(os.fspath, adapters), *out, *method, *more]
        )
        assert result.exit_code == 0, result.output
    assert (tmp_path / "0.rmm").read_bytes() == (tmp_path / "1.rmm").read_bytes() == alone


def test_a_worker_killed_midway(two_workers: Cluster, adapters: list[Path], tmp_path: Path) -> None:
    """One of two dies while targets are under way; the other one takes over."""
    alone = bytes_of(adapters, tmp_path / "alone.rmm", {"max_error": 0.05})
    victim = two_workers.processes[1]
    seen: list[tuple[int, int]] = []

    def progress(_what: str, done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3 and victim.poll() is None:
            victim.send_signal(signal.SIGKILL)
            victim.wait()

    with worker_pool(scheduler=two_workers.address) as executor:
        got = bytes_of(
            adapters, tmp_path / "x.rmm", {"max_error": 0.05}, executor, progress=progress
        )
    assert victim.returncode == -signal.SIGKILL
    assert seen[2][1] > 6  # most of the work was still to do
    assert got == alone
    assert two_workers.n_workers() == 1


def test_a_worker_that_dies_on_its_work(cluster: Cluster, tmp_path: Path) -> None:
    """Work that kills every worker ends in one error, and in nothing else."""
    for _ in range(5):
        cluster.add_worker()
    cluster.wait(lambda: cluster.n_workers() == 5)
    targets = pipeline.group_targets(make_tasks(2, sides=((30, 20),)))
    with worker_pool(scheduler=cluster.address) as executor:
        results = pipeline.map_targets(lambda _key: die, targets, executor)
        with pytest.raises(RmmError) as caught:
            list(results)
    assert "the cluster gave up" in str(caught.value)
    assert "memory" in str(caught.value)


def test_a_cluster_that_nobody_is_left_of(cluster: Cluster) -> None:
    cluster.add_worker()
    cluster.wait(lambda: cluster.n_workers() == 1)
    targets = pipeline.group_targets(make_tasks(2))
    with worker_pool(scheduler=cluster.address, patience=5) as executor:
        results = pipeline.map_targets(lambda _key: die, targets, executor)
        with pytest.raises(RemoteError, match="no workers left"):
            list(results)


def die(_factors: Sequence[Factors]) -> None:
    """Leave the process at once, as when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


die.__module__ = "__main__"  # goes over by value: workers do not know this module


def test_a_scheduler_that_dies(two_workers: Cluster, tmp_path: Path) -> None:
    import dask

    path = tmp_path / "x.rmm"

    def progress(_what: str, done: int, _total: int) -> None:
        if done == 2:
            two_workers.processes[0].kill()
            two_workers.processes[0].wait()

    tasks = make_tasks(3, sides=tuple((200 + n, 200) for n in range(40)))
    method = choose_method(max_error=0.05)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
        worker_pool(scheduler=two_workers.address) as pool,
        pytest.raises(RmmError) as caught,
    ):
        pipeline.convert(tasks, path, method, executor=pool, progress=progress)
    assert "scheduler was lost" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cluster"]


def test_nobody_schedules() -> None:
    with (
        pytest.raises(RemoteError, match="no Dask scheduler"),
        worker_pool(scheduler="tcp://127.0.0.1:9", patience=1),
    ):
        pass
    with (
        pytest.raises(RemoteError, match="no Dask scheduler"),
        worker_pool(scheduler="nonsense://x y", patience=1),
    ):
        pass


def test_nobody_works(cluster: Cluster) -> None:
    with (
        pytest.raises(RemoteError, match="no workers"),
        worker_pool(scheduler=cluster.address, patience=1),
    ):
        pass


def test_workers_of_another_version(two_workers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "__version__", "99.0")
    with (
        pytest.raises(RemoteError, match=r"Install version 99\.0"),
        worker_pool(scheduler=two_workers.address),
    ):
        pass


def test_options_that_exclude_one_another() -> None:
    with pytest.raises(OptionError, match="not both"), worker_pool(2, "tcp://127.0.0.1:9"):
        pass


def test_dask_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UnsupportedError, match=r"rmmformat\[distributed\]"),
        worker_pool(scheduler="tcp://127.0.0.1:9"),
    ):
        pass


# -- processes of this machine --------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    adapters: list[Path], tmp_path: Path, count: int
) -> None:
    for options in METHODS:
        alone = bytes_of(adapters, tmp_path / "alone.rmm", options)
        with worker_pool(count) as executor:
            assert bytes_of(adapters, tmp_path / "x.rmm", options, executor) == alone


def test_threads_of_the_machine_do_not_matter(adapters: list[Path], tmp_path: Path) -> None:
    """The same bytes whatever BLAS was told in the environment."""
    program = (
        "import sys, rmmformat as rmm; "
        "rmm.convert(sys.argv[3:], sys.argv[1], components=2, align='procrustes'); "
        "rmm.convert(sys.argv[3:], sys.argv[2], size=0.05)"
    )
    made = []
    for threads in ("1", "2", "7"):
        outs = [os.fspath(tmp_path / f"{threads}.{n}.rmm") for n in range(2)]
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        env = {**os.environ, **dict.fromkeys(names, threads)}
        command = [sys.executable, "-c", program, *outs, *map(os.fspath, adapters)]
        subprocess.run(command, env=env, check=True)
        made.append([Path(out).read_bytes() for out in outs])
    assert made[0] == made[1] == made[2]


class Shuffled(Executor):
    """Finishes what it is given in an order of its own, on one thread."""

    _max_workers = 8

    def __init__(self) -> None:
        self.inner = ThreadPoolExecutor(1)
        self.held: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.lock = threading.Lock()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self.lock:
            self.held.append((future, lambda: fn(*args, **kwargs)))
        self.inner.submit(self.run)
        return future

    def run(self) -> None:
        time.sleep(0.005)
        with self.lock:
            future, call = self.held.pop()  # the last first
        future.set_result(call())


def test_the_order_of_results_does_not_matter(adapters: list[Path], tmp_path: Path) -> None:
    for options in METHODS:
        alone = bytes_of(adapters, tmp_path / "alone.rmm", options)
        executor = Shuffled()
        assert bytes_of(adapters, tmp_path / "x.rmm", options, executor) == alone
        executor.inner.shutdown()


def test_a_process_that_dies_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    with worker_pool(2) as executor:
        assert isinstance(executor, ProcessPoolExecutor)

        def progress(_what: str, done: int, _total: int) -> None:
            if done == 2:
                for number in list(executor._processes):
                    os.kill(number, signal.SIGKILL)

        tasks = make_tasks(3, sides=tuple((200 + n, 200) for n in range(40)))
        method = choose_method(max_error=0.05)
        with pytest.raises(RmmError, match="a worker process died") as caught:
            pipeline.convert(tasks, path, method, executor=executor, progress=progress)
    assert "--workers" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_leaves_a_growing_file_as_it_was(tmp_path: Path) -> None:
    from rmmformat.grow import add

    path, sides = tmp_path / "x.rmm", tuple((200 + n, 200) for n in range(40))
    pipeline.convert(make_tasks(3, sides=sides), path, choose_method(max_error=0.05))
    newcomer = make_tasks(1, sides=sides, seed=7)[0]
    newcomer.name = "newcomer"
    with worker_pool(2) as executor:
        assert executor is not None

        def progress(_what: str, done: int, _total: int) -> None:
            if done == 2:
                for number in list(executor._processes):  # type: ignore[attr-defined]
                    os.kill(number, signal.SIGKILL)

        with pytest.raises(RmmError, match="a worker process died"):
            add(path, [newcomer], executor=executor, progress=progress)
    with rmm.open(path) as collection:
        assert collection.tasks == ("task0", "task1", "task2")
    assert rmm.validate(path).ok
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".rmm"] == ["x.rmm"]


def test_add_and_plan_take_executors(adapters: list[Path], tmp_path: Path) -> None:
    runner, files = CliRunner(), []
    for count in ("1", "2"):
        path = os.fspath(tmp_path / f"{count}.rmm")
        for arguments in (
            ["convert", os.fspath(adapters[0]), "-o", path, "--max-error", "5%"],
            ["add", path, os.fspath(adapters[1]), "--workers", count],
        ):
            result = runner.invoke(main, arguments)
            assert result.exit_code == 0, result.output
        files.append(Path(path).read_bytes())
    assert files[0] == files[1]
    sources = list(map(os.fspath, adapters))
    plans = [
        runner.invoke(main, ["plan", *sources, "--json", "--workers", count]).stdout
        for count in ("1", "2")
    ]
    assert plans[0] == plans[1]
    assert plans[0]


def test_compare_takes_an_executor(adapters: list[Path]) -> None:
    import json

    found = []
    for count in ("1", "2"):
        sources = list(map(os.fspath, adapters[:2]))
        arguments = [
            "compare",
            *sources,
            "--methods",
            "planned",
            "--size",
            "0.1",
            "--json",
            "--workers",
            count,
        ]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["rows"]
        found.append([(row["method"], row["n_bytes"], row["mean_error"]) for row in rows])
    assert found[0] == found[1]
