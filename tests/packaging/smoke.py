"""Does an installed package do its job, with nothing but what it depends on?

Usage: python smoke.py ADAPTERS, in an interpreter that has the package and not the repository.
Prints one line.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path


def main() -> int:
    adapters = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-I", "-m", "rmmformat"]
        for words in (
            ["convert", str(adapters), "-o", "x.rmm"],
            ["validate", "x.rmm", "--against", str(adapters)],
            ["info", "x.rmm", "--html", "x.html"],
            ["card", "x.rmm", "-o", "README.md"],
            ["export", "x.rmm", "imdb", "--to", "peft", "-o", "imdb"],
        ):
            subprocess.run([*run, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)  # fmt: skip
        assert (Path(folder) / "imdb" / "adapter_model.safetensors").is_file()

        import rmmformat

        package = Path(rmmformat.__file__).parent
        assert package.is_relative_to(Path(sys.prefix).resolve()) or sys.prefix in str(package)
        assert (package / "py.typed").is_file()
        with rmmformat.open(Path(folder) / "x.rmm") as collection:
            n_factors = sum(len(collection.load(task)) for task in collection.tasks)
    top = {str(file).split("/")[0] for file in metadata.files("rmmformat") or []}
    assert "converters" not in top, "the wheel claims a global name"
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {version}: rmmformat {rmmformat.__version__}, {n_factors} factors")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
