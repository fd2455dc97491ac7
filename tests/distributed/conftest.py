"""A real cluster: a scheduler and two workers, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Cluster:
    """Scheduler and workers as processes; every one has a single thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        where = folder / "scheduler.json"
        self.start(
            "dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(where)
        )
        self.wait(where.exists)

        self.address: str = json.loads(where.read_text())["address"]

    def start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        module = f"distributed.cli.{program}"
        log = (self.folder / f"{program}.{len(self.processes)}.log").open("wb")
        command = [sys.executable, "-m", module, *arguments]
        process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        log.close()
        self.processes.append(process)
        return process

    def add_worker(self) -> subprocess.Popen[bytes]:
        """One that is not started again when it dies."""
        return self.start(
            "dask_worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard",
            "--local-directory", str(self.folder), "--death-timeout", "60",
        )  # fmt: skip

    def n_workers(self) -> int:
        from distributed import Client

        with Client(self.address, timeout=10, set_as_default=False) as client:
            return len(client.nthreads())

    def wait(self, ready: object, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not ready():  # type: ignore[operator]
            assert time.monotonic() < end, "the cluster does not start"
            time.sleep(0.1)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    made = Cluster(folder)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def two_workers(cluster: Cluster) -> Cluster:
    cluster.add_worker()
    cluster.add_worker()
    cluster.wait(lambda: cluster.n_workers() == 2)
    return cluster


@pytest.fixture
def adapters(demo_adapters: Path) -> list[Path]:
    """Three real adapters: twelve targets."""
    return [demo_adapters / name for name in ("bbc", "imdb", "spam")]
