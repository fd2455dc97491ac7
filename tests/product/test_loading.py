"""Loading: arenas, callers' buffers, dtypes, threads, and what errors say."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import rmmformat as rmm
from rmmformat.errors import NotFoundError, ShapeError
from rmmformat.format.restore import entry_factors
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert

from .conftest import make_tasks

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loading") / "x.rmm"
    convert(make_tasks(4), path, choose_method(components=2, encoding="f32"))
    return path


def aligned(n_bytes: int) -> np.ndarray:
    raw = np.zeros(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]


def test_native_and_python_agree_bit_for_bit(path: Path) -> None:
    with rmm.open(path) as collection:
        for number, name in enumerate(collection.tasks):
            loaded = collection.load(name)
            for entry, target in enumerate(loaded):
                A, B = entry_factors(collection.index, number, entry)
                assert loaded[target].A.tobytes() == A.tobytes()
                assert loaded[target].B.tobytes() == B.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_the_rounded_f32_values(path: Path, name: str) -> None:
    with rmm.open(path) as collection:
        wide, narrow = collection.load("task1"), collection.load("task1", dtype=name)
        again = collection.load("task1", dtype=DTYPES[name])
        for target in wide:
            for factor in "AB":
                want = getattr(wide[target], factor).astype(DTYPES[name])
                assert getattr(narrow[target], factor).dtype == want.dtype
                assert getattr(narrow[target], factor).tobytes() == want.tobytes()
                assert getattr(again[target], factor).tobytes() == want.tobytes()


def test_views_are_aligned_and_share_one_arena(path: Path) -> None:
    with rmm.open(path) as collection:
        task = collection.load("task0")
        start = task.arena.ctypes.data
        for factors in task.values():
            for array in (factors.A, factors.B):
                assert array.ctypes.data % 64 == 0
                assert start <= array.ctypes.data < start + task.arena.nbytes
                assert array.flags.c_contiguous


def test_the_arena_is_used_again_once_nobody_looks(path: Path) -> None:
    with rmm.open(path) as collection:
        first = collection.load("task0")
        place = first.arena.ctypes.data
        kept = torch.from_numpy(first["layer.0"].A)  # torch looks, too
        del first
        gc.collect()
        second = collection.load("task1")
        assert second.arena.ctypes.data != place
        before = kept.clone()
        collection.load("task2")
        assert torch.equal(kept, before)
        del kept
        gc.collect()
        third = collection.load("task3")
        assert third.arena.ctypes.data in (place, third.arena.ctypes.data)
        del second, third
        gc.collect()
        places = set()
        for _ in range(20):
            places.add(collection.load("task0").arena.ctypes.data)
        assert len(places) <= 2


def test_torch_and_dlpack_see_the_same_memory(path: Path) -> None:
    with rmm.open(path) as collection:
        task = collection.load("task0")
        A = task["layer.0"].A
        for tensor in (torch.from_numpy(A), torch.from_dlpack(A)):
            assert tensor.data_ptr() == A.ctypes.data
            assert np.array_equal(tensor.numpy(), A)


def test_views_outlive_the_collection(path: Path) -> None:
    with rmm.open(path) as collection:
        A = collection.load("task0")["layer.0"].A
        want = A.copy()
    del collection
    gc.collect()
    assert np.array_equal(A, want)


def test_a_closed_collection_says_so(path: Path) -> None:
    collection = rmm.open(path)
    collection.close()
    collection.close()
    with pytest.raises(rmm.RmmError, match="closed"):
        collection.load("task0")


def test_callers_memory(path: Path) -> None:
    with rmm.open(path) as collection:
        want = collection.load("task2")
        out = aligned(collection.arena_bytes("task2"))
        got = collection.load("task2", out=out)
        assert got.arena is out
        for target in want:
            assert np.array_equal(got[target].A, want[target].A)
            assert np.shares_memory(got[target].A, out)
        for bad in (out[:-1], out[1:], out.view(np.int8), out.reshape(-1, 1)):
            with pytest.raises(ShapeError):
                collection.load("task2", out=bad)
        out.flags.writeable = False
        with pytest.raises(ShapeError):
            collection.load("task2", out=out)


@pytest.mark.parametrize("name", DTYPES)
def test_one_factor_into_the_callers_array(path: Path, name: str) -> None:
    with rmm.open(path) as collection:
        want = collection.load("task1", dtype=name)["layer.1"]
        A = collection.load_factor("task1", "layer.1", "A", np.empty_like(want.A))
        B = collection.load_factor("task1", "layer.1", "B", np.empty_like(want.B))
        assert A.tobytes() == want.A.tobytes()
        assert B.tobytes() == want.B.tobytes()
        with pytest.raises(ShapeError):
            collection.load_factor("task1", "layer.1", "A", np.empty_like(want.B))
        with pytest.raises(ShapeError):
            collection.load_factor("task1", "layer.1", "C", np.empty_like(want.A))


def test_many_threads_read_one_collection(path: Path) -> None:
    with rmm.open(path) as collection:
        want = {
            name: {t: (f.A.copy(), f.B.copy()) for t, f in collection.load(name).items()}
            for name in collection.tasks
        }
        wrong: list[str] = []

        def work(name: str) -> None:
            for threads in (0, 1, 2, 3) * 10:
                task = collection.load(name, threads=threads)
                for target, (A, B) in want[name].items():
                    if not (np.array_equal(task[target].A, A) and
                            np.array_equal(task[target].B, B)):  # fmt: skip
                        wrong.append(name)

        workers = [threading.Thread(target=work, args=(n,)) for n in collection.tasks * 2]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert wrong == []


def test_what_is_not_there_is_named_with_what_is(path: Path) -> None:
    with rmm.open(path) as collection:
        with pytest.raises(NotFoundError, match=r"no task is called 'tsk1'.*There is task1"):
            collection.load("tsk1")
        with pytest.raises(NotFoundError, match=r"no target 'layer\.9'.*There is layer\."):
            collection.load("task1")["layer.9"]
        with pytest.raises(KeyError):
            collection.privates("nobody")
        with pytest.raises(ShapeError, match="f32, f16 or bf16"):
            collection.load("task1", dtype="f64")


def test_bytes_in_memory_are_a_file_too(path: Path) -> None:
    with rmm.open(path) as one, rmm.open(path.read_bytes()) as other:
        for target, factors in one.load("task0").items():
            assert np.array_equal(other.load("task0")[target].A, factors.A)


def test_entries_are_listed_once_for_all_factors_of_a_task(tmp_path: Path) -> None:
    class Counting:
        def __init__(self, native: object) -> None:
            self.native, self.listed = native, 0

        def __getattr__(self, name: str) -> object:
            self.listed += name == "entries"
            return getattr(self.native, name)

    path = tmp_path / "x.rmm"
    convert(make_tasks(), path, choose_method(components=1))
    with rmm.open(path) as collection:
        for name in collection.tasks[:2]:
            task = collection.source(name)
            targets = list(task.targets)
            counting = Counting(collection._native)
            collection._native = counting  # type: ignore[assignment]
            for target in targets:
                task.factors(target)
            collection._native = counting.native  # type: ignore[assignment]
            assert len(targets) > 1
            assert counting.listed == 1
