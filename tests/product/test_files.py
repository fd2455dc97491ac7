"""Files that the product writes: deterministic, whole or absent, and every fault in them found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import rmmformat as rmm
from rmmformat import _native
from rmmformat.errors import LossyConversionError, NonFiniteError, RmmError, UnsupportedError
from rmmformat.format.validate import validate_bytes
from rmmformat.format.writer import Writer
from rmmformat.methods import choose_method
from rmmformat.model import Factors, TargetKind, TargetShape
from rmmformat.pipeline import convert, open_sources

from .conftest import MemoryTask, make_tasks

EXACT = choose_method(exact=True)
PUBLISHED = choose_method(components=1)


def small_file(path: Path) -> bytes:
    tasks = make_tasks(2, rank=2, sides=((6, 4),), privates={"head.weight": np.arange(6.0)})
    convert(tasks, path, PUBLISHED)
    return path.read_bytes()


def test_the_order_of_sources_and_the_executor_leave_no_trace(tmp_path: Path) -> None:
    tasks = make_tasks(3, privates={"head": np.ones(3, np.float32)})
    convert(tasks, tmp_path / "a.rmm", PUBLISHED)
    convert(tasks[::-1], tmp_path / "b.rmm", PUBLISHED)
    with ThreadPoolExecutor(3) as threads:
        convert(tasks, tmp_path / "c.rmm", PUBLISHED, executor=threads)
    with ProcessPoolExecutor(2) as processes:
        convert(tasks, tmp_path / "d.rmm", PUBLISHED, executor=processes)
    first = (tmp_path / "a.rmm").read_bytes()
    assert all((tmp_path / f"{name}.rmm").read_bytes() == first for name in "bcd")


def test_every_flipped_bit_is_found_by_both_validators(tmp_path: Path) -> None:
    good = small_file(tmp_path / "x.rmm")
    assert validate_bytes(good).ok
    assert _native.validate_bytes(good) == []
    missed = []
    for position in range(8 * len(good)):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << (position % 8)
        data = bytes(bad)
        if validate_bytes(data).ok or not _native.validate_bytes(data):
            missed.append(position)
    assert missed == []


def test_every_truncation_is_found_and_refused(tmp_path: Path) -> None:
    good = small_file(tmp_path / "x.rmm")
    for length in range(len(good)):
        data = good[:length]
        assert not validate_bytes(data).ok
        assert _native.validate_bytes(data)
        with pytest.raises(RmmError) as caught:
            rmm.open(data)
        assert caught.value.rule in ("RMM-001", "RMM-013")
        assert caught.value.offset is not None


def test_appended_bytes_are_refused(tmp_path: Path) -> None:
    good = small_file(tmp_path / "x.rmm")
    with pytest.raises(RmmError) as caught:
        rmm.open(good + b"PK\x05\x06")
    assert caught.value.rule == "RMM-014"


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    path.write_bytes(b"mine")
    with pytest.raises(LossyConversionError, match="exists already"):
        convert(make_tasks(), path, EXACT)
    assert path.read_bytes() == b"mine"
    convert(make_tasks(), path, EXACT, overwrite=True)
    assert rmm.validate(path).ok


@pytest.mark.parametrize("fault", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, fault: BaseException) -> None:
    tasks = make_tasks(2)

    def fail(_target: str) -> Factors:
        raise fault

    tasks[1].factors = fail  # type: ignore[method-assign]
    with pytest.raises(type(fault)):
        convert(tasks, tmp_path / "x.rmm", EXACT)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.rmm"
    old = small_file(path)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        convert(make_tasks(), path, EXACT, overwrite=True)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_interrupting_the_command_leaves_nothing(demo_adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.rmm"
    script = (
        "import rmmformat.pipeline as p, time\n"
        "slow = p.code_target\n"
        "def code(*a):\n    print('at work', flush=True); time.sleep(60); return slow(*a)\n"
        "p.code_target = code\n"
        "from rmmformat.cli.main import main\n"
        f"main(['convert', {str(demo_adapters)!r}, '-o', {str(out)!r}, '--components', '1'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted" in errors
    assert list(tmp_path.iterdir()) == []


def test_the_spool_has_no_name_and_goes_with_the_writer(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.rmm") as writer:
        writer.add_task("t")
        assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded_by_one_target(tmp_path: Path) -> None:
    """Peak of a conversion of 25 MB of factors stays far below them."""
    script = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from rmmformat.model import Factors
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert
from tests_memory import Lazy
tasks = [Lazy(f"t{i}", 24, 512) for i in range(16)]
convert(tasks[:1], sys.argv[1], choose_method(exact=True), overwrite=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(tasks, sys.argv[1], choose_method(encoding='f16'), overwrite=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    (tmp_path / "tests_memory.py").write_text(
        """
import numpy as np
from rmmformat.model import Factors, TargetInfo, TargetShape
class Lazy:
    path = base_model = config_text = ""
    privates, ledger, files = {}, (), ()
    def __init__(self, name, n_targets, side):
        self.name, self.side = name, side
        f32 = np.dtype("f4")
        info = TargetInfo(TargetShape(side, side), 16, 1.0, f32, f32)
        self.targets = {f"t{i}": info for i in range(n_targets)}
    def factors(self, target):
        rng = np.random.default_rng(hash((self.name, target)) % 2**32)
        return Factors(rng.standard_normal((16, self.side), np.float32),
                       rng.standard_normal((self.side, 16), np.float32), 1.0)
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.rmm"), str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    total = 16 * 24 * 2 * 16 * 512 * 4
    grown = 1024 * int(done.stdout)
    assert total > 25e6
    assert grown < total / 2, f"{grown} bytes for {total} of factors"


def test_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    tasks = make_tasks(2)
    tasks[1].factors("layer.1").B[3, 2] = np.nan
    with pytest.raises(NonFiniteError):
        convert(tasks, tmp_path / "x.rmm", PUBLISHED)
    assert list(tmp_path.iterdir()) == []


def test_different_bases_are_refused(tmp_path: Path) -> None:
    tasks = [*make_tasks(1), *make_tasks(2, base_model="other/base")[1:]]
    with pytest.raises(RmmError, match=r"other/base.*tiny/base") as caught:
        convert(tasks, tmp_path / "x.rmm", EXACT)
    assert "--allow-base-mismatch" in str(caught.value)
    convert(tasks, tmp_path / "x.rmm", EXACT, allow_base_mismatch=True)


def test_names_that_the_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    (task,) = make_tasks(1)
    task.name = "a\nb"
    with pytest.raises(UnsupportedError) as caught:
        convert([task], tmp_path / "x.rmm", EXACT)
    assert caught.value.rule == "RMM-030"


def test_exact_gives_every_bit_back(tmp_path: Path) -> None:
    special = np.array([[0.0, -0.0, 1e-45, -np.inf, np.nan, 3.0]], np.float32)
    special[0, 4:5].view(np.uint32)[:] = 0x7F812345  # a signalling NaN with a payload
    half = np.array([[0.5, -0.0, 6e-8, 65504.0]], np.float16)
    brain = np.array([[1.0, -0.0, 3e38, 1e-40]], ml_dtypes.bfloat16)
    factors = {
        "f32": Factors(special, special.T.copy(), 1.0),
        "mixed": Factors(half, brain.T.copy(), 0.5),
        "zero": Factors(np.zeros((2, 5), np.float32), np.ones((3, 2), np.float32), 0.0),
    }
    tasks = [MemoryTask("a", factors), MemoryTask("b", factors)]
    convert(tasks, tmp_path / "x.rmm", EXACT)
    with rmm.open(tmp_path / "x.rmm") as collection:
        assert collection.validate().ok
        for name in "ab":
            stored = collection.source(name)
            for target, want in factors.items():
                got = stored.factors(target)
                assert got.A.dtype == want.A.dtype
                assert got.B.dtype == want.B.dtype
                assert got.A.tobytes() == want.A.tobytes(), target
                assert got.B.tobytes() == want.B.tobytes(), target
                assert got.scale == want.scale


def test_exact_stores_what_tasks_have_in_common_once(tmp_path: Path) -> None:
    one, two = make_tasks(2, sides=((4096, 64),))
    shared = Factors(one.factors("layer.0").A, two.factors("layer.0").B, 2.0)
    tasks = [one, MemoryTask("task1", {"layer.0": shared})]
    report = convert(tasks, tmp_path / "x.rmm", EXACT)
    assert report.factor_bytes == 4 * 4 * (4096 + 2 * 64)
    twins = [one, MemoryTask("twin", {"layer.0": one.factors("layer.0")})]
    assert convert(twins, tmp_path / "y.rmm", EXACT).fraction == 0.5


def test_exact_costs_no_more_than_the_originals(demo_adapters: Path, tmp_path: Path) -> None:
    report = rmm.convert(demo_adapters, tmp_path / "x.rmm", exact=True)
    originals = sum(file.n_bytes for task in open_sources(demo_adapters) for file in task.files)
    assert report.file_bytes <= 1.01 * originals


def test_private_tensors_come_back_byte_for_byte(tmp_path: Path) -> None:
    head = np.array([np.nan, -0.0, 1.5], np.float16)
    flags = np.array(True)
    table = np.arange(12, dtype=np.int64).reshape(3, 4)
    empty = np.zeros((0, 7), np.float32)
    privates = {"head": head, "flags": flags, "table": table, "empty": empty}
    (task,) = make_tasks(1, privates=privates)
    other = MemoryTask("other", {}, privates={"table": table})
    report = convert([task, other], tmp_path / "x.rmm", EXACT)
    assert report.private_bytes == 6 + 1 + 96
    with rmm.open(tmp_path / "x.rmm") as collection:
        got = collection.privates("task0")
        for name, want in privates.items():
            assert got[name].dtype == want.dtype
            assert got[name].shape == want.shape
            assert got[name].tobytes() == want.tobytes()
        assert collection.privates("other")["table"].tobytes() == table.tobytes()
        assert len(collection.load("other")) == 0


def test_targets_of_one_name_and_two_shapes_are_not_mixed(tmp_path: Path) -> None:
    def resized(name: str, vocabulary: int) -> MemoryTask:
        rng = np.random.default_rng(vocabulary)
        A = rng.standard_normal((2, vocabulary)).astype(np.float32)
        B = rng.standard_normal((8, 2)).astype(np.float32)
        shape = TargetShape(vocabulary, 8, TargetKind.EMBEDDING)
        return MemoryTask(name, {"embed": Factors(A, B, 1.0)}, shapes={"embed": shape})

    tasks = [resized("old", 320), resized("new", 324)]
    convert(tasks, tmp_path / "x.rmm", PUBLISHED)
    with rmm.open(tmp_path / "x.rmm") as collection:
        assert collection.validate().ok
        for task in tasks:
            got = collection.load(task.name)["embed"]
            np.testing.assert_allclose(got.A, task.factors("embed").A, rtol=1e-6)
            assert collection.targets(task.name)["embed"].shape.kind is TargetKind.EMBEDDING


def test_what_a_target_is_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "conv": TargetShape(18, 4, TargetKind.CONV, kernel=(3, 3)),
        "gpt": TargetShape(6, 4, transposed=True),
    }
    factors = {
        name: Factors(
            rng.standard_normal((2, shape.n_in)).astype(np.float32),
            rng.standard_normal((shape.n_out, 2)).astype(np.float32),
            -0.25,
        )
        for name, shape in shapes.items()
    }
    convert([MemoryTask("t", factors, shapes=shapes)], tmp_path / "x.rmm", EXACT)
    with rmm.open(tmp_path / "x.rmm") as collection:
        targets = collection.targets("t")
        assert {name: info.shape for name, info in targets.items()} == shapes
        assert all(info.scale == -0.25 for info in targets.values())


def test_a_collection_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RmmError):
        rmm.convert(tmp_path / "empty", tmp_path / "x.rmm")
    assert not (tmp_path / "x.rmm").exists()
