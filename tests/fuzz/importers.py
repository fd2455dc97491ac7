"""Coverage-guided fuzzing of the importers, with atheris.

    python tests/fuzz/importers.py CASE CORPUS_FOLDER [options of libFuzzer]
    python tests/fuzz/importers.py CASE --replay FILE...

A case is one file of a source: the fuzzer chooses its bytes, what lies beside it is sound.  The
source is opened and all of it read, as ``rmm convert`` does.  Only an `RmmError` may come out;
libFuzzer bounds time and memory.  Every sixteenth source that can be read is converted too, and the
collection must be one that the validator passes.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mutations
import seeds

REPLAY = "--replay" in sys.argv
if not REPLAY:
    import atheris

# What is imported later, within functions, is observed as well if it is imported here.
with contextlib.nullcontext() if REPLAY else atheris.instrument_imports(include=["rmmformat"]):
    import rmmformat
    import rmmformat.pipeline
    from rmmformat.converters.base import Options
    from rmmformat.converters.registry import BUILT_IN, get_importer
    from rmmformat.errors import RmmError

    IMPORTERS = {
        row.name: get_importer(row.name) for row in BUILT_IN if row.importer and row.available
    }
    if "pickle" in sys.argv:
        import rmmformat.converters.torch_pickle


@dataclass(frozen=True)
class Case:
    """A file under test."""

    #: Name of the importer.
    format: str
    #: Name of the file within the source's folder.
    file: str
    #: Sound contents to begin with.
    seeds: Callable[[], list[bytes]]
    #: What lies beside it.
    beside: Callable[[], dict[str, bytes]] = field(default=dict)
    #: Whether the importer is given the file itself, not its folder.
    alone: bool = False
    #: The base model's folder, where one is wanted.
    base: Callable[[], dict[str, bytes]] = field(default=dict)
    #: Whether the file is one of the base model's, and the source is sound.
    of_base: bool = False
    #: What is known of the bytes: "json", "safetensors" (length, JSON, data) or nothing.
    shape: str = ""


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

CASES: dict[str, Case] = {
    "config": Case("peft", CONFIG, seeds.configs, lambda: {WEIGHTS: seeds.adapter()}, shape="json"),
    "safetensors": Case(
        "peft", WEIGHTS, seeds.adapters, lambda: {CONFIG: seeds.configs()[0]}, shape="safetensors"
    ),
    "index": Case(
        "peft",
        WEIGHTS + ".index.json",
        seeds.indices,
        lambda: {CONFIG: seeds.configs()[0], **seeds.shards()},
        shape="json",
    ),
    "pickle": Case(
        "peft", "adapter_model.bin", seeds.pickles, lambda: {CONFIG: seeds.configs()[0]}
    ),
    "kohya": Case("kohya", "x.safetensors", seeds.kohya, alone=True, shape="safetensors"),
    "gguf": Case("gguf", "x.gguf", seeds.ggufs, alone=True, base=seeds.llama_base),
    "checkpoint": Case(
        "checkpoint",
        "model.safetensors",
        seeds.checkpoints,
        base=lambda: {"model.safetensors": seeds.checkpoints()[0]},
        shape="safetensors",
    ),
    "base": Case(
        "checkpoint",
        "model.safetensors",
        lambda: seeds.checkpoints()[:1],
        beside=lambda: {"model.safetensors": seeds.checkpoints()[1]},
        base=lambda: {"model.safetensors": seeds.checkpoints()[0]},
        of_base=True,
        shape="safetensors",
    ),
}


class Run:
    """A case with its folder."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.source = folder / "source"
        self.source.mkdir()
        for name, data in case.beside().items():
            (self.source / name).write_bytes(data)
        self.options = Options(allow_pickle=True)
        if files := case.base():
            base = folder / "base"
            base.mkdir()
            for name, data in files.items():
                (base / name).write_bytes(data)
            self.options = Options(allow_pickle=True, base=base)
        self.importer = IMPORTERS[case.format]
        self.n = self.n_read = self.n_converted = 0

    def one(self, data: bytes) -> str:
        """Read one source; say what became of it."""
        self.n += 1
        file = (self.folder / "base" if self.case.of_base else self.source) / self.case.file
        file.write_bytes(data)
        place = file if self.case.alone else self.source
        try:
            self.importer.detect(place)
            tasks = self.importer.open(place, name="x", options=self.options)
            for task in tasks:
                for target, info in task.targets.items():
                    factors = task.factors(target)
                    assert factors.A.shape == (info.rank, info.shape.n_in)
                    assert factors.B.shape == (info.shape.n_out, info.rank)
                for name, private in task.privates.items():
                    assert task.private_tensor(name).shape == private.shape
                assert task.ledger is not None
                assert task.files
            self.n_read += 1
            if self.n_read % 16 == 1:
                out = self.folder / "out.rmm"
                rmmformat.convert(tasks, out, exact=True, overwrite=True)
                self.n_converted += 1
                report = rmmformat.validate(out)
                assert report.ok, report.violations
        except RmmError as error:
            return f"{type(error).__name__}: {error}"
        return "read"


def main() -> int:
    """Fuzz one case, or replay inputs."""
    name, *rest = sys.argv[1:]
    case = CASES[name]
    if case.format not in IMPORTERS:
        sys.stdout.write(f"{name}: skipped, {case.format} cannot be read here\n")
        return 0
    memory = Path("/dev/shm")  # noqa: S108  # where there is one, files cost no disk
    folder = Path(tempfile.mkdtemp(prefix="rmm-fuzz-", dir=memory if memory.is_dir() else None))
    try:
        run = Run(case, folder)
        if "--replay" in rest:
            for path in rest[rest.index("--replay") + 1 :]:
                sys.stdout.write(f"{path}: {run.one(Path(path).read_bytes())}\n")
            return 0
        corpus = Path(rest[0])
        corpus.mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(case.seeds()):
            (corpus / f"seed-{i}").write_bytes(data)
        atheris.Setup(
            [sys.argv[0], *rest],
            lambda data: run.one(data) and None,
            custom_mutator=lambda data, n, seed: mutations.mutate(
                case.shape, data, n, seed, atheris.Mutate
            ),
        )
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
