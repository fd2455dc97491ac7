"""Build of the native module; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

NATIVE = Path("native")

# Reconstructed values are part of the format (spec/rmm-1.md, 8.1): a compiler that fuses a product
# and a sum, or reorders either, would make them depend on the machine.
FLAGS = (
    ["/O2", "/fp:precise"]
    if sys.platform == "win32"
    else [
        "-O3",
        "-ffp-contract=off",
        "-fno-fast-math",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
    ]
)

setup(
    ext_modules=[
        Pybind11Extension(
            "rmmformat._native",
            sorted(
                str(path)
                for folder in ("src", "bindings")
                for path in (NATIVE / folder).glob("*.cpp")
            ),
            include_dirs=[str(NATIVE / "include"), str(NATIVE / "src")],
            depends=sorted(
                str(path)
                for pattern in ("include/rmm/*.h", "src/*.hpp", "src/*.inc")
                for path in NATIVE.glob(pattern)
            ),
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
