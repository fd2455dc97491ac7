"""Bytes of the demo adapters in every format that can hold them, and errors of their deltas."""

from __future__ import annotations

import io
import shutil
import statistics
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import vlora_ways
from deltas import errors_against, errors_of_file, open_source
from measure import available
from report import Column, Table
from setting import Setting

import rmmformat as rmm
from rmmformat.converters.base import Options
from rmmformat.converters.registry import get_exporter

ADAPTERS = Path(__file__).parents[2] / "tests" / "data" / "demo-adapters"
KINDS: dict[str, dict[str, Any]] = {
    "rmm --exact": {"exact": True},
    "rmm --encoding q8": {"encoding": "q8"},
    "rmm --max-error 1%": {"max_error": 0.01},
    "rmm --max-error 5% (default)": {"max_error": 0.05},
    "rmm --components 3": {"components": 3},
}


def tables(setting: Setting) -> list[Table]:
    root = setting.folder("sizes")
    sources = sorted(path for path in ADAPTERS.iterdir() if path.is_dir())
    table = Table(
        "size",
        f"The {len(sources)} demo adapters (rank 16, float16, with heads)",
        "kept as",
        (
            Column("bytes", "kB", ".0f"),
            Column("ratio", "of the originals", ".3f"),
            Column("mean", "mean error, %"),
            Column("worst", "largest, %"),
            Column("heads", "heads"),
        ),
    )

    def put(name: str, size: int, errors: list[float], heads: bool = True) -> None:
        table.put(
            name,
            bytes=size / 1e3,
            mean=100 * statistics.mean(errors),
            worst=100 * max(errors),
            heads="yes" if heads else "no",
        )

    originals = "the folders: safetensors and config"
    put(originals, size_of(ADAPTERS), [0.0])
    put("a zip of them", zipped(sources), [0.0])
    if available("zstandard"):
        put("a tar of them, zstd level 19", zstd(sources), [0.0])
    for name, how in KINDS.items():
        if setting.quick and "max_error" in how:
            continue
        out = root / "x.rmm"
        rmm.convert(sources, out, overwrite=True, **how)
        put(name, out.stat().st_size, errors_of_file(out, sources))
    if available("onnxruntime"):
        put("a file a task: .onnx_adapter", *onnx_files(sources, root))
    if available("gguf"):
        for dtype in ("f16", "q8_0"):
            put(f"a file a task: GGUF, {dtype}", *gguf_files(sources, root, dtype), False)
    if available("vlora"):
        for name, way in vlora_ways.WAYS.items():
            out = root / "subspace"
            shutil.rmtree(out, ignore_errors=True)
            way(sources, out)
            put(name, size_of(out), vlora_ways.errors(out, sources), False)
    table.compare(originals, "bytes")
    for module in ("zstandard", "onnxruntime", "gguf", "vlora"):
        if not available(module):
            table.notes.append(f"{module} is not installed.")
    return [table]


def size_of(folder: Path) -> int:
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"
    )


def zipped(sources: list[Path]) -> int:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for source in sources:
            for path in sorted(source.iterdir()):
                archive.write(path, f"{source.name}/{path.name}")
    return len(buffer.getvalue())


def zstd(sources: list[Path]) -> int:
    import zstandard

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for source in sources:
            archive.add(source, source.name)
    return len(zstandard.ZstdCompressor(level=19).compress(buffer.getvalue()))


def exported(sources: list[Path], root: Path, kind: str, options: Options) -> list[Path]:
    paths = []
    for source in sources:
        out = root / f"{source.name}.{kind}"
        get_exporter(kind).export(open_source(source), out, force=True, options=options)
        paths.append(out)
    return paths


def onnx_files(sources: list[Path], root: Path) -> tuple[int, list[float]]:
    """ONNX Runtime's own adapter files, read back with its own reader."""
    import onnxruntime as ort

    errors = []
    paths = exported(sources, root, "onnx", Options(dtype="f16"))
    for source, path in zip(sources, paths, strict=True):
        values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        task = open_source(source)
        found = {
            target: (
                np.asarray(values[f"{target}.lora_A"].numpy(), np.float32),
                np.asarray(values[f"{target}.lora_B"].numpy(), np.float32),
                float(values[f"{target}.lora_scale"].numpy()[0]),
            )
            for target in task.targets
        }
        errors += errors_against(task, found)
    return sum(path.stat().st_size for path in paths), errors


def gguf_files(sources: list[Path], root: Path, dtype: str) -> tuple[int, list[float]]:
    """llama.cpp's adapter files, read back as its tools read them."""
    base = root / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text('{"architectures": ["BertModel"]}')
    errors = []
    paths = exported(sources, root, "gguf", Options(base=base, drop_private=True, dtype=dtype))
    for source, path in zip(sources, paths, strict=True):
        task, back = open_source(source), open_source(path, "gguf")
        names = {name: f"bert.{name}" for name in back.targets}
        found = {}
        for name in back.targets:
            factors = back.factors(name)
            found[names[name]] = (factors.A, factors.B, factors.scale)
        errors += errors_against(task, found)
    return sum(path.stat().st_size for path in paths), errors
