"""The stub of the compiled module says what the module has: mypy's stubtest compares them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rmmformat
from rmmformat import _native

PACKAGE = Path(rmmformat.__file__).parent

#: What no stub can say of pybind11's classes: their metaclass, and that they are not called.
ALLOWED = [
    "rmmformat._native.File",
    "rmmformat._native.File.__init__",
    "rmmformat._native.Map",
]


def stubtest(folder: Path, stub: str) -> subprocess.CompletedProcess[str]:
    """Compare a stub with the module, beside no more of the package than the module imports."""
    package = folder / "rmmformat"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(PACKAGE / "errors.py", package)
    shutil.copy(str(_native.__file__), package)
    (package / "_native.pyi").write_text(stub)
    allowed = folder / "allowed.txt"
    allowed.write_text("\n".join(ALLOWED) + "\n")
    return subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "rmmformat._native", "--allowlist", str(allowed)],
        cwd=folder, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def test_the_stub_is_that_of_the_module(tmp_path: Path) -> None:
    done = stubtest(tmp_path, (PACKAGE / "_native.pyi").read_text())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def crc32c(data: Any, crc: int = 0) -> int: ...", ""),
        ("def validate_bytes(", "def no_such() -> int: ...\ndef validate_bytes("),
    ],
)
def test_a_wrong_stub_is_found(old: str, new: str, tmp_path: Path) -> None:
    stub = (PACKAGE / "_native.pyi").read_text()
    assert old in stub
    assert stubtest(tmp_path, stub.replace(old, new)).returncode == 1


def described(text: str) -> list[tuple[str, bool]]:
    """Parameters in a docstring of pybind11's: name, and whether there is a default."""
    inside = re.match(r"\w+\((.*)\) -> ", text.splitlines()[0])
    assert inside, text
    parts, depth = [""], 0
    for character in inside[1]:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [(part.split(":")[0].strip(), " = " in part) for part in parts if part.strip()]


def test_parameters_are_called_as_in_the_stub() -> None:
    """What stubtest cannot see of compiled functions: their docstrings have it."""
    tree = ast.parse((PACKAGE / "_native.pyi").read_text())
    files = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "File"]
    owners = [(_native, tree), *((getattr(_native, node.name), node) for node in files)]
    checked = 0
    for owner, where in owners:
        for node in where.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            doc = getattr(owner, node.name).__doc__ if hasattr(owner, node.name) else None
            if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
                continue
            assert doc, node.name
            names = [argument.arg for argument in node.args.args]
            first = len(names) - len(node.args.defaults)
            assert described(doc) == [(n, i >= first) for i, n in enumerate(names)], node.name
            checked += 1
    assert checked > 12


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_native.pyi").is_file()
