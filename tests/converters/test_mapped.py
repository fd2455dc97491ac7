"""Arrays that lie in files: what they give, what they keep, and what becomes of changed files."""

from __future__ import annotations

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rmmformat.converters.tensors import SafetensorsStore
from rmmformat.errors import SourceError
from rmmformat.mapped import MappedFile, is_mapped, release


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rng = np.random.default_rng(0)
    tensors = {
        "bytes": rng.integers(0, 255, 3).astype(np.uint8),
        "wide": rng.standard_normal((5, 7)).astype(np.float32),
        "half": rng.standard_normal((4, 3)).astype(ml_dtypes.bfloat16),
        "one": np.array(2.5),
        "none": np.zeros((0, 4), np.float16),
    }
    save_file(tensors, path)
    store = SafetensorsStore((path,))
    for name, values in tensors.items():
        read = store.read(name)
        assert read.dtype == values.dtype
        assert read.shape == values.shape
        assert read.tobytes() == values.tobytes()
    wide = store.read("wide")
    assert is_mapped(wide)
    assert is_mapped(wide.T)
    assert not wide.flags.writeable
    release([wide, wide.T, np.ones(3)])
    assert wide.tobytes() == tensors["wide"].tobytes()


def test_what_is_not_aligned_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"x" + np.arange(4, dtype=np.float32).tobytes())
    array = MappedFile(path).array(1, np.dtype(np.float32), (2, 2))
    assert array.flags.aligned
    assert not is_mapped(array)
    assert array.tolist() == [[0, 1], [2, 3]]


def test_an_array_outlives_its_store_and_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32)}, path)
    array = SafetensorsStore((path,)).read("a")
    path.unlink()
    assert array.tolist() == list(range(6))


def test_a_replaced_file_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({"a": np.zeros(6, np.float32)}, path)
    store = SafetensorsStore((path,))
    travelled = pickle.dumps(store)
    save_file({"a": np.ones(5, np.float32)}, other)
    other.replace(path)
    assert store.read("a").tolist() == [0.0] * 6
    with pytest.raises(SourceError, match="has changed"):
        pickle.loads(travelled).read("a")


def test_many_files_need_no_open_ones(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    paths = [tmp_path / f"{n}.safetensors" for n in range(60)]
    for number, path in enumerate(paths):
        save_file({"a": np.full(3, number, np.float32)}, path)
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").is_dir() else 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        stores = [SafetensorsStore((path,)) for path in paths]
        assert [store.read("a")[0] for store in stores] == list(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
