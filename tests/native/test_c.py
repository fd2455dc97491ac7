"""The C interface: strict C99, sizes, examples, conformance vectors, memory checkers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import google_crc32c
import native_build as build
import numpy as np
import pytest

from rmmformat import _native

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "spec" / "vectors"


def run(*command: object, code: int = 0) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "rich.rmm").write_bytes(build.rich(0).build())
    (folder / "deflated.rmm").write_bytes(
        build.rich(3, deflate=True, scratch=b"x", sequence=2).build()
    )
    (folder / "tiny.rmm").write_bytes(build.tiny().build())
    (folder / "broken.rmm").write_bytes(build.tiny().build()[:-1] + b"?")
    (folder / "later.rmm").write_bytes(build.patched(build.tiny().build(), 8, "H", 2))
    return folder


def test_list_and_load(c_programs: Path, files: Path) -> None:
    collection = build.rich(0)
    listed = run(c_programs / "list_and_load", files / "rich.rmm")
    assert [
        line.split()[1].rstrip(":") for line in listed.splitlines() if line.startswith("task")
    ] == [task.name for task in collection.tasks]
    loaded = run(c_programs / "list_and_load", files / "rich.rmm", "alpha").splitlines()
    task = collection.tasks[0]
    for j, (line, entry) in enumerate(zip(loaded, task.entries, strict=False)):
        a = google_crc32c.value(collection.evaluate(0, j, "a").tobytes())
        b = google_crc32c.value(np.ascontiguousarray(collection.evaluate(0, j, "b").T).tobytes())
        name = collection.targets[entry.target].name
        assert line == f"{name}: rank {entry.rank}, scale {entry.scale:g}, A {a:08x}, B {b:08x}"
    assert len(loaded) == len(task.entries) + len(task.privates)


def test_exit_codes(c_programs: Path, files: Path) -> None:
    run(c_programs / "list_and_load", code=2)
    run(c_programs / "list_and_load", files / "none.rmm", code=1)
    run(c_programs / "list_and_load", files / "rich.rmm", "nobody", code=1)
    run(c_programs / "list_and_load", files / "broken.rmm", code=3)
    run(c_programs / "list_and_load", files / "later.rmm", code=4)
    assert run(c_programs / "check", files / "deflated.rmm") == "valid\n"
    assert run(c_programs / "check", "--open", files / "deflated.rmm") == "valid\n"
    broken = run(c_programs / "check", files / "broken.rmm", code=3).splitlines()
    assert broken[0].startswith("RMM-025 ")
    assert broken[-1] == "malformed"
    assert run(c_programs / "check", files / "later.rmm", code=4).endswith("unsupported\n")


def test_vectors(c_programs: Path) -> None:
    """The validator lists the recorded rule; the reader names it; what is valid is passed."""
    manifest = VECTORS / "manifest.json"
    if not manifest.is_file():
        pytest.skip("no vectors here")
    wrong = []
    for vector in json.loads(manifest.read_text())["vectors"]:
        if vector["verdict"] == "free" or vector.get("rule") == "RMM-091":
            continue  # RMM-091 needs the schema
        path = VECTORS / vector["file"]
        code = {"valid": 0, "invalid": 3, "unsupported": 4}[vector["verdict"]]
        for option in ([], ["--open"]):
            if option and vector.get("when") == "validate":
                continue
            done = subprocess.run(
                [c_programs / "check", *option, path], capture_output=True, text=True, check=False
            )
            named = re.findall(r"^RMM-\d{3}", done.stdout, re.MULTILINE)
            expected = vector.get("rule")
            if done.returncode != code or (expected is not None and expected not in named):
                wrong.append((vector["id"], option, done.returncode, done.stdout))
    assert wrong == []


def test_values_of_vectors() -> None:
    """Recorded shapes, scales and digests of factors."""
    import hashlib

    paths = sorted(VECTORS.glob("valid/*.expect.json"))
    if not paths:
        pytest.skip("no vectors here")
    for path in paths:
        expected = json.loads(path.read_text())["tasks"]
        file = _native.File.open(str(path.with_name(path.name.replace(".expect.json", ".rmm"))))
        assert file.task_names() == list(expected), path.name
        for task, name in enumerate(expected):
            entries, size = file.entries(task, 1)
            arena = bytearray(size)
            file.load_task(task, 1, arena)
            assert len(entries) == len(expected[name]["entries"]), path.name
            for entry, want in zip(entries, expected[name]["entries"], strict=True):
                assert (entry.target, entry.rank, list(entry.kernel)) == (
                    want["target"],
                    want["rank"],
                    want["kernel"],
                )
                assert entry.scale == float.fromhex(want["scale"])
                for letter, offset, n in (
                    ("A", entry.offset_a, entry.n_in),
                    ("B", entry.offset_b, entry.n_out),
                ):
                    data = arena[offset : offset + 4 * n * entry.rank]
                    assert hashlib.sha256(data).hexdigest() == want[letter]["sha256"], (
                        path.name,
                        name,
                        letter,
                    )


def test_values_of_vectors_in_c(c_programs: Path) -> None:
    """A C program gives the bits that the reader gives that was written from the text alone."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "spec" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("reference", reference)
    sys.path.insert(0, str(ROOT / "spec"))
    try:
        spec.loader.exec_module(reference)
    finally:
        sys.path.remove(str(ROOT / "spec"))
    n_factors = 0
    for path in sorted(VECTORS.glob("valid/*.rmm")):
        opened = reference.open_file(path.read_bytes())
        for task in opened.tasks:
            lines = run(c_programs / "list_and_load", path, task).splitlines()
            want = []
            for target, (A, B, _) in opened.load(task).items():
                a, b = (google_crc32c.value(np.ascontiguousarray(x).tobytes()) for x in (A, B))
                want.append((target, f"A {a:08x}, B {b:08x}"))
                n_factors += 2
            got = [line for line in lines if not line.startswith("private ")]
            assert len(got) == len(want), path.name
            for line, (target, values) in zip(got, want, strict=True):
                assert line.startswith(f"{target}: "), path.name
                assert line.endswith(values), path.name
    assert n_factors > 200


SIZES = """
#include <stddef.h>
#include <stdio.h>
#include "rmm/rmm.h"
int main(void) {
    printf("%zu %zu %zu %zu %zu %zu %zu\\n", sizeof(rmm_error), sizeof(rmm_file_info),
           sizeof(rmm_task_info), sizeof(rmm_target_info), sizeof(rmm_entry_info),
           sizeof(rmm_private_info), sizeof(rmm_violation));
    printf("%zu %zu %zu\\n", offsetof(rmm_error, offset), offsetof(rmm_error, message),
           offsetof(rmm_entry_info, rank));
    printf("%d %d %d %d %d %d %d\\n", RMM_OK, RMM_NOT_RMM, RMM_MALFORMED, RMM_UNSUPPORTED_VERSION,
           RMM_NO_TASK, RMM_BAD_ARGUMENT, RMM_INTERNAL);
    printf("%s %u\\n", rmm_version(), (unsigned)rmm_abi_version());
    return 0;
}
"""


def test_the_interface_is_pinned(c_programs: Path, tmp_path: Path) -> None:
    """Sizes, offsets and codes of ABI version 1, seen by a program that links the library."""
    source, program = tmp_path / "sizes.c", tmp_path / "sizes"
    source.write_text(SIZES)
    flags = [f"-I{c_programs}/prefix/include", f"-L{c_programs}/prefix/lib", "-lrmm"]
    if shutil.which("pkg-config"):
        environment = os.environ | {"PKG_CONFIG_PATH": f"{c_programs}/prefix/lib/pkgconfig"}
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "rmm"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    run(
        "cc",
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        source,
        "-o",
        program,
        *flags,
        f"-Wl,-rpath,{c_programs}/prefix/lib",
    )
    lines = run(program).splitlines()
    assert lines[0] == "512 96 48 40 88 104 24"
    assert lines[1] == "8 24 68"
    assert lines[2] == "0 10 20 30 40 50 90"
    assert lines[3] == f"{_native.__version__} 1"


def test_only_the_interface_is_exported(c_programs: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    names = run("nm", "-D", "--defined-only", c_programs / "librmm.so").split()[2::3]
    assert [
        name for name in names if not name.startswith("rmm_") and not name.startswith("_Z")
    ] == []
    ours = [name for name in names if name.startswith("_Z") and "3rmm" in name]
    assert ours == []


def test_a_portable_build_gives_the_same(c_programs: Path, files: Path, tmp_path: Path) -> None:
    """Without anything particular to a processor: the same bits and checksums."""
    command = ["make", "-s", "-j2", "-C", ROOT / "native", f"BUILD={tmp_path}"]
    run(*command, "CXXFLAGS=-O1 -DRMM_PORTABLE", "examples")
    for path in [files / "rich.rmm", *sorted(VECTORS.glob("valid/*.rmm"))]:
        names = _native.File.open(path).task_names()
        for name in names:
            usual = run(c_programs / "list_and_load", path, name)
            assert run(tmp_path / "list_and_load", path, name) == usual


STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
# Tables that the library makes once are kept for the process: reachable at its end, and no leak.
VALGRIND = ["valgrind", "-q", "--error-exitcode=99", "--leak-check=full"]


def need_valgrind() -> None:
    if shutil.which("valgrind") is None:
        assert "RMM_NEED_VALGRIND" not in os.environ, "make memcheck needs valgrind"
        pytest.skip("no valgrind here; make memcheck needs it")


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of docs/c.md, far from the source tree."""
    (program,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "c.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("elsewhere") / "app.c"
    path.write_text(program)
    return path


def build_guide(guide: Path, prefix: Path, kind: str) -> Path:
    """As docs/c.md says, with what is installed and nothing else."""
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config here")
    environment = os.environ | {"PKG_CONFIG_PATH": f"{prefix}/lib/pkgconfig"}

    def flags(*options: str) -> list[str]:
        command = ["pkg-config", *options, "rmm"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert flags("--modversion") == [_native.__version__]
    program = guide.with_name(kind)
    if kind == "shared":
        libraries = [*flags("--libs"), f"-Wl,-rpath,{prefix}/lib"]
    else:
        private = [flag for flag in flags("--static", "--libs") if flag != "-lrmm"]
        libraries = [f"{prefix}/lib/librmm.a", *private]
    run("cc", *STRICT, guide, *flags("--cflags"), *libraries, "-o", program)
    return program


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_the_program_of_the_guide(kind: str, c_programs: Path, guide: Path, files: Path) -> None:
    program = build_guide(guide, c_programs / "prefix", kind)
    lines = run(program, files / "rich.rmm", "alpha").splitlines()
    collection = build.rich(0)
    entries = collection.tasks[0].entries
    assert len(lines) == len(entries) + 1
    for line, entry in zip(lines, entries, strict=False):
        target = collection.targets[entry.target]
        assert line == (
            f"{target.name}: A ({entry.rank}, {target.n_in}), B ({target.n_out}, {entry.rank}), "
            f"scale {entry.scale:g}"
        )
    A = collection.evaluate(0, 0, "a").astype(np.float64).reshape(entries[0].rank, -1)
    B = collection.evaluate(0, 0, "b").astype(np.float64).reshape(entries[0].rank, -1).T
    want = entries[0].scale * (B @ A).sum()
    assert float(lines[-1].rpartition(" ")[2]) == pytest.approx(want, rel=1e-4, abs=1e-6)
    run(program, code=2)
    run(program, files / "rich.rmm", "nobody", code=1)
    run(program, files / "broken.rmm", "alpha", code=1)


@pytest.mark.parametrize("name", ["list_and_load", "check"])
def test_examples_are_strict_c99(name: str, c_programs: Path, tmp_path: Path) -> None:
    source = ROOT / "native" / "examples" / f"{name}.c"
    include = f"-I{c_programs}/prefix/include"
    run("cc", *STRICT, include, "-c", source, "-o", tmp_path / "object.o")


def test_the_header_is_documented() -> None:
    """A comment stands before every function, and at every field or struct."""
    header = (ROOT / "native" / "include" / "rmm" / "rmm.h").read_text()
    bare = re.findall(r";\n(?:\n)?RMM_API [^;]*?(rmm_\w+)\(", header)
    assert bare == ["rmm_n_targets"]  # shares the comment of rmm_n_tasks
    assert re.findall(r"\n\n(?:typedef struct) (\w+)", header) == []


def test_valgrind(c_programs: Path, files: Path, guide: Path) -> None:
    need_valgrind()
    vectors = [VECTORS / "valid" / f"v-{name}.rmm" for name in ("encoding-trellis", "clusters")]
    for path in (files / "rich.rmm", files / "deflated.rmm", *vectors):
        if not path.is_file():
            continue
        run(*VALGRIND, c_programs / "list_and_load", path)
        for name in _native.File.open(path).task_names():
            run(*VALGRIND, c_programs / "list_and_load", path, name)
        run(*VALGRIND, c_programs / "check", path)
        run(*VALGRIND, c_programs / "check", "--open", path)
    run(*VALGRIND, c_programs / "check", files / "broken.rmm", code=3)
    run(*VALGRIND, c_programs / "list_and_load", files / "broken.rmm", code=3)
    run(*VALGRIND, c_programs / "list_and_load", files / "later.rmm", code=4)
    run(*VALGRIND, c_programs / "list_and_load", files / "none.rmm", code=1)
    program = build_guide(guide, c_programs / "prefix", "shared")
    run(*VALGRIND, program, files / "rich.rmm", "alpha")
    run(*VALGRIND, program, files / "rich.rmm", "nobody", code=1)


def test_replay(c_programs: Path, files: Path) -> None:
    """Every truncation and flipped bit of a small file, through the fuzz targets."""
    for target in ("open", "load", "validate", "capi"):
        assert "1 files" in run(c_programs / f"replay_{target}", "-flips", files / "tiny.rmm")


def test_sanitizers(files: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    flags = ["-fsanitize=address,undefined", probe, "-o", tmp_path / "probe"]
    if (
        shutil.which("make") is None
        or subprocess.run(["c++", *flags], capture_output=True, check=False).returncode
    ):
        pytest.skip("no sanitizers here")
    inputs = [
        files / "rich.rmm",
        files / "deflated.rmm",
        *VECTORS.glob("*/*.rmm"),
        "-flips",
        files / "tiny.rmm",
    ]
    if "RMM_TRUST" in os.environ:
        inputs += [VECTORS / "valid" / "v-small.rmm", VECTORS / "valid" / "v-encoding-trellis.rmm"]
    done = subprocess.run(
        [
            "make",
            "-s",
            "-j2",
            "-C",
            str(ROOT / "native"),
            f"BUILD={tmp_path}",
            "CXXFLAGS=-O0",
            "SANITIZED_FLAGS=-O0",
            "sanitize",
            "FILES=" + " ".join(map(str, inputs)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr
    sys.stdout.write(f"AddressSanitizer and UndefinedBehaviorSanitizer: {done.stdout}")
