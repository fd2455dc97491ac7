"""The cache: one reconstruction for many threads, a budget that holds, views that stay."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import rmmformat as rmm
from rmmformat.ahead import Ahead
from rmmformat.arena import ArenaPool
from rmmformat.cache import CacheStats, TaskCache
from rmmformat.errors import NotFoundError, OptionError, RmmError, ShapeError

TASKS = ("amazon", "bbc", "brands", "imdb")


def nothing(task: str) -> None:
    pass


class Counting(rmm.Collection):
    """Counts reconstructions, and lets a test stop them half-way or make them fail."""

    def __init__(self, other: rmm.Collection) -> None:
        super().__init__(other._native, other.path)
        self.counts: Counter[str] = Counter()
        self.before: Callable[[str], object] = nothing
        self._count = threading.Lock()

    def load(self, task: str, **options: Any) -> rmm.LoadedTask:
        with self._count:
            self.counts[task] += 1
        self.before(task)
        return super().load(task, **options)


@pytest.fixture(scope="module")
def path(demo_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "skills.rmm"
    rmm.convert([demo_adapters / task for task in TASKS], path, components=2, encoding="f16")
    return path


@pytest.fixture
def collection(path: Path) -> Iterator[Counting]:
    with rmm.open(path) as opened:
        yield Counting(opened)


@pytest.fixture
def size(collection: Counting) -> int:
    """Memory of one task: all of them are alike."""
    cache = TaskCache(collection)
    cache.get("imdb")
    collection.counts.clear()
    return cache.stats.n_bytes


def same(got: rmm.LoadedTask, want: rmm.LoadedTask) -> bool:
    return list(got) == list(want) and all(
        got[name].A.tobytes() == want[name].A.tobytes()
        and got[name].B.tobytes() == want[name].B.tobytes()
        and got[name].scale == want[name].scale
        for name in want
    )


def test_a_kept_task_is_given_again(collection: Counting) -> None:
    cache = TaskCache(collection, dtype="f16")
    first = cache.get("imdb")
    assert cache.get("imdb") is first
    assert same(first, collection.load("imdb", dtype="f16"))
    assert collection.counts["imdb"] == 2  # the second one is this test's own
    assert cache.stats == CacheStats(1, 1, 0, 1, cache.stats.n_bytes)
    assert first.arena.nbytes <= cache.stats.n_bytes < first.arena.nbytes + (1 << 16)


def test_factors_are_read_only(collection: Counting) -> None:
    factors = next(iter(TaskCache(collection).get("imdb").values()))
    for array in (factors.A, factors.B):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_one_reconstruction_for_all_threads_that_want_it_at_once(collection: Counting) -> None:
    cache, n = TaskCache(collection), 16
    start = threading.Barrier(n)
    waiting, go = threading.Semaphore(0), threading.Event()

    def before(task: str) -> None:
        waiting.release()
        assert go.wait(30)

    collection.before = before

    def get() -> rmm.LoadedTask:
        start.wait(30)
        return cache.get("imdb")

    with ThreadPoolExecutor(n) as threads:
        results = [threads.submit(get) for _ in range(n)]
        assert waiting.acquire(timeout=30)  # one thread is inside the reconstruction
        assert not waiting.acquire(timeout=0.2)  # and no other one comes
        go.set()
        tasks = [result.result(30) for result in results]
    assert collection.counts == {"imdb": 1}
    assert all(task is tasks[0] for task in tasks)
    assert (cache.stats.loads, cache.stats.hits) == (1, n - 1)


def test_different_tasks_are_reconstructed_side_by_side(collection: Counting) -> None:
    cache = TaskCache(collection)
    both = threading.Barrier(2)
    collection.before = lambda _: both.wait(30)  # passes only with two inside
    with ThreadPoolExecutor(2) as threads:
        names = [task.name for task in threads.map(cache.get, ["imdb", "bbc"], timeout=30)]
    assert names == ["imdb", "bbc"]


def test_a_failure_reaches_every_waiter_and_is_not_kept(collection: Counting) -> None:
    cache, n = TaskCache(collection), 8
    entered, go = threading.Event(), threading.Event()

    def fail(task: str) -> None:
        entered.set()
        assert go.wait(30)
        raise RmmError("the disk is on fire")

    collection.before = fail
    with ThreadPoolExecutor(n) as threads:
        results = [threads.submit(cache.get, "imdb")]
        assert entered.wait(30)
        results += [threads.submit(cache.get, "imdb") for _ in range(n - 1)]
        while waiters(cache, "imdb") < n - 1:
            pass
        go.set()
        for result in results:
            with pytest.raises(RmmError, match="on fire"):
                result.result(30)
    assert collection.counts == {"imdb": 1}
    collection.before = nothing
    assert cache.get("imdb").name == "imdb"
    assert collection.counts == {"imdb": 2}
    assert (cache.stats.loads, cache.stats.hits) == (1, 0)


def waiters(cache: TaskCache, task: str) -> int:
    flight = cache._loading.get(task)
    return 0 if flight is None else len(flight._condition._waiters)  # type: ignore[attr-defined]


def test_an_interrupted_load_is_the_loading_threads_own_affair(collection: Counting) -> None:
    cache = TaskCache(collection)
    entered, go = threading.Event(), threading.Event()

    def interrupt(task: str) -> None:
        entered.set()
        assert go.wait(30)
        collection.before = nothing
        raise KeyboardInterrupt

    collection.before = interrupt
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get, "imdb")
        assert entered.wait(30)
        second = threads.submit(cache.get, "imdb")
        while waiters(cache, "imdb") < 1:
            pass
        go.set()
        with pytest.raises(KeyboardInterrupt):
            first.result(30)
        assert second.result(30).name == "imdb"


def test_the_task_not_used_for_longest_makes_room(collection: Counting, size: int) -> None:
    cache = TaskCache(collection, 2 * size)
    for task in ("amazon", "bbc", "amazon", "brands"):
        cache.get(task)
    assert cache.stats == CacheStats(3, 1, 1, 2, 2 * size)
    cache.get("amazon")
    assert collection.counts["amazon"] == 1  # bbc went
    cache.get("bbc")
    assert collection.counts["bbc"] == 2


def adapter(folder: Path, rank: int) -> Path:
    rng = np.random.default_rng(rank)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": 8, "target_modules": ["query"]}}'
    )
    factors = {"A": rng.standard_normal((rank, 256)), "B": rng.standard_normal((192, rank))}
    save_file(
        {
            f"base_model.model.layer.query.lora_{letter}.weight": value.astype(np.float32)
            for letter, value in factors.items()
        },
        folder / "adapter_model.safetensors",
    )
    return folder


def test_a_task_beyond_the_budget_is_served_and_costs_no_other_its_place(tmp_path: Path) -> None:
    sources = [adapter(tmp_path / f"rank{rank}", rank) for rank in (2, 3, 64)]
    rmm.convert(sources, tmp_path / "x.rmm", exact=True)
    with rmm.open(tmp_path / "x.rmm") as opened:
        collection = Counting(opened)
        cache = TaskCache(collection, 32 << 10)
        cache.get("rank2")
        cache.get("rank3")
        before = cache.stats
        assert before.n_tasks == 2
        for _ in range(2):
            assert next(iter(cache.get("rank64").values())).A.shape == (64, 256)
        assert cache.stats == CacheStats(4, 0, 0, 2, before.n_bytes)
        cache.get("rank2")
        cache.get("rank3")
        assert collection.counts == {"rank2": 1, "rank3": 1, "rank64": 2}


def test_an_evicted_task_stays_whole_for_whoever_holds_it(collection: Counting, size: int) -> None:
    cache = TaskCache(collection, size)
    held = cache.get("amazon")
    factor = held[next(iter(held))].A
    before = factor.tobytes()
    place = held.arena.ctypes.data
    del held
    for task in ("bbc", "brands", "imdb"):
        assert cache.get(task).arena.ctypes.data != place
    assert factor.tobytes() == before
    assert cache.stats.evictions == 3
    del factor
    gc.collect()
    places = {cache.get(task).arena.ctypes.data for task in TASKS}
    assert place in places  # its memory is used again


def test_drop_and_clear(collection: Counting, size: int) -> None:
    cache = TaskCache(collection)
    cache.get("amazon")
    cache.get("bbc")
    assert cache.drop("amazon")
    assert not cache.drop("amazon")
    assert cache.stats.n_bytes == size
    cache.get("amazon")
    assert collection.counts["amazon"] == 2
    cache.clear()
    assert cache.stats == CacheStats(3, 0, 0, 0, 0)


@pytest.mark.parametrize("how", ["drop", "clear"])
def test_a_task_dropped_while_it_loads_is_served_and_not_kept(
    collection: Counting, how: str
) -> None:
    cache = TaskCache(collection)
    entered, go = threading.Event(), threading.Event()

    def wait(task: str) -> None:
        entered.set()
        assert go.wait(30)

    collection.before = wait
    with ThreadPoolExecutor(2) as threads:
        result = threads.submit(cache.get, "imdb")
        assert entered.wait(30)
        cache.drop("imdb") if how == "drop" else cache.clear()
        go.set()
        assert result.result(30).name == "imdb"
    assert cache.stats.n_tasks == cache.stats.n_bytes == 0


def test_many_threads_under_a_small_budget_always_get_the_right_values(
    collection: Counting, size: int
) -> None:
    wanted = {task: rmm.open(collection.path).load(task) for task in TASKS}
    cache = TaskCache(collection, 2 * size)
    n, rounds = 8, 60
    start = threading.Barrier(n)

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        start.wait(30)
        for task in rng.choice(TASKS, rounds):
            assert same(cache.get(str(task)), wanted[str(task)])
            if rng.random() < 0.05:
                cache.drop(str(rng.choice(TASKS)))
        return rounds

    with ThreadPoolExecutor(n) as threads:
        assert sum(threads.map(work, range(n), timeout=120)) == n * rounds
    stats = cache.stats
    assert stats.loads + stats.hits == n * rounds
    assert stats.loads == sum(collection.counts.values())
    assert stats.n_bytes == stats.n_tasks * size <= 2 * size
    assert not cache._loading


def test_errors(collection: Counting) -> None:
    with pytest.raises(OptionError, match="-1"):
        TaskCache(collection, -1)
    with pytest.raises(NotFoundError, match="imbd"):
        TaskCache(collection).get("imbd")
    with pytest.raises(ShapeError, match="f32, f16 or bf16"):
        TaskCache(collection, dtype="i8").get("imdb")
    cache = TaskCache(collection)
    cache.get("imdb")
    collection.close()
    assert cache.get("imdb").name == "imdb"
    with pytest.raises(RmmError, match="closed"):
        cache.get("bbc")


def test_a_pool_that_the_collector_enters_while_it_lends() -> None:
    """An arena in a reference cycle may be given back in the middle of a loan."""
    pool = ArenaPool()
    with pool._lock:
        cycle: list[Any] = [pool.lend(100)]
        cycle.append(cycle)
        del cycle
        gc.collect()
    assert len(pool._free) == 1


def test_importing_the_package_imports_no_runtime() -> None:
    code = (
        "import sys, rmmformat as rmm; rmm.runtimes; rmm.TaskCache; "
        "print([name for name in ('torch', 'peft', 'onnxruntime', 'llama_cpp') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def until(condition: Callable[[], bool]) -> bool:
    """Wait until something holds, but not for ever; say whether it does."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def test_a_prefetched_task_is_there(collection: Counting) -> None:
    cache = TaskCache(collection)
    threads = []

    def before(task: str) -> None:
        threads.append((task, threading.current_thread().name))

    collection.before = before
    cache.prefetch("imdb")
    assert until(lambda: cache.stats.n_tasks == 1)
    cache.prefetch("imdb")  # nothing to do
    assert same(cache.get("imdb"), collection.load("imdb"))
    assert collection.counts["imdb"] == 2  # the second one is this test's own
    assert (cache.stats.loads, cache.stats.hits) == (1, 1)
    assert threads[0][1].startswith("rmm-ahead")


def test_a_prefetch_under_way_is_waited_for(collection: Counting) -> None:
    cache = TaskCache(collection, budget_bytes=0)  # what is not kept can be waited for
    begun, go = threading.Event(), threading.Event()

    def before(task: str) -> None:
        begun.set()
        assert go.wait(30)

    collection.before = before
    cache.prefetch("imdb")
    assert begun.wait(30)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(cache.get, "imdb")
        assert not waiting.done()
        time.sleep(0.05)
        go.set()
        assert waiting.result(30).name == "imdb"
    assert collection.counts == {"imdb": 1}


def test_a_prefetch_that_has_not_begun_is_not_waited_for(collection: Counting) -> None:
    cache = TaskCache(collection)
    begun, go = threading.Event(), threading.Event()

    def before(task: str) -> None:
        if task == "bbc":
            begun.set()
            assert go.wait(30)

    collection.before = before
    cache.prefetch("bbc")
    assert begun.wait(30)
    cache.prefetch("imdb")  # waits behind the other
    cache.prefetch("imdb")
    assert cache.get("imdb").name == "imdb"
    go.set()
    assert cache.get("bbc").name == "bbc"
    assert collection.counts == {"bbc": 1, "imdb": 1}


def test_a_failed_prefetch_is_told_by_get(collection: Counting) -> None:
    cache = TaskCache(collection)

    def fail(task: str) -> None:
        raise RmmError("cannot decode")

    collection.before = fail
    cache.prefetch("imdb")
    assert until(lambda: collection.counts["imdb"] == 1 and not cache._loading)
    with pytest.raises(RmmError, match="cannot decode"):
        cache.get("imdb")
    collection.before = nothing
    cache.prefetch("imbd")
    with pytest.raises(NotFoundError, match="imbd"):
        cache.get("imbd")
    cache.prefetch("imdb")
    assert cache.get("imdb").name == "imdb"
    assert cache.stats.loads == 1


def test_work_ahead_that_is_called_off() -> None:
    ahead = Ahead()
    begun, go, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        assert go.wait(30)
        done.append("slow")

    ahead.begin("slow", slow)
    assert begun.wait(30)
    ahead.begin("more", lambda: done.append("more"))
    ahead.begin("last", lambda: done.append("last"))
    ahead.settle("more")  # has not begun: nothing to wait for
    ahead.close()
    go.set()
    assert until(lambda: done == ["slow"])
    ahead.settle("slow")
    ahead.begin("again", lambda: done.append("again"))  # a closed one starts anew
    assert until(lambda: done == ["slow", "again"])
