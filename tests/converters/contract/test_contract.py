"""Every importer and exporter of the registry against the contract, on samples of its own.

A format is found through the registry, and its samples in ``samples/FORMAT.py``, a module with one
``PROVIDER``.  A format without that module fails here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

from rmmformat.converters import detect, formats, get_exporter, get_importer
from rmmformat.converters.contract import Flaw, Provider, Sample, Wrapped, closed
from rmmformat.converters.contract_export import EXPORT_CHECKS, check_join, check_round
from rmmformat.converters.contract_import import IMPORT_CHECKS
from rmmformat.errors import RmmError, SourceError

SAMPLES = Path(__file__).parent / "samples"


@functools.cache
def provider_of(name: str) -> Provider:
    """Load the samples of one format."""
    path = SAMPLES / f"{name}.py"
    if not path.is_file():
        raise LookupError(f"format {name!r} has no samples: write {path}")
    spec = importlib.util.spec_from_file_location(f"contract_samples_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    provider = module.PROVIDER
    assert isinstance(provider, Provider)
    assert provider.format == name
    return provider


@dataclasses.dataclass(frozen=True)
class Case:
    """One sample of one format."""

    format: str
    sample: Sample

    @property
    def id(self) -> str:
        return f"{self.format}/{self.sample.name}"


def _have_samples():
    for row in formats():
        if row.available and (SAMPLES / f"{row.name}.py").is_file():
            yield row


CASES = [Case(row.name, s) for row in _have_samples() for s in provider_of(row.name).samples]
EXPORTERS = [row.name for row in _have_samples() if row.exporter]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
by_exporter = pytest.mark.parametrize("exporter", EXPORTERS)


def build(case, folder, flaw=Flaw.NONE):
    folder.mkdir()
    return case.sample.build(folder, flaw)


def open_task(case, folder):
    return case.sample.open(get_importer(case.format), build(case, folder))


@pytest.mark.parametrize("row", formats(), ids=lambda row: row.name)
def test_every_format_has_samples(row):
    assert row.available, row.install
    provider = provider_of(row.name)
    assert bool(provider.samples) == bool(row.importer), "samples are for importers"
    assert bool(provider.output) == bool(row.exporter), "an output is for exporters"
    known = {case.id for case in CASES}
    if provider.output is not None:
        assert provider.output.takes, "an exporter takes at least one sample"
        assert provider.output.takes <= known
    if row.importer and row.exporter:
        own = {f"{row.name}/{sample.name}" for sample in provider.samples}
        assert own <= provider.output.takes, "an exporter takes what its importer gives"


def test_a_format_without_samples_fails():
    with pytest.raises(LookupError, match=r"'brand-new' has no samples: write .*brand-new\.py"):
        provider_of("brand-new")


@by_case
@pytest.mark.parametrize("check", IMPORT_CHECKS, ids=lambda check: check.__name__)
def test_import(check, case, tmp_path):
    check(get_importer(case.format), case.sample, tmp_path)


@by_case
def test_each_source_is_known_by_one_format(case, tmp_path):
    path = build(case, tmp_path / "source")
    claims = [row.name for row in formats() if row.importer and get_importer(row.name).detect(path)]
    # Whole models are the last resort: any weights at all may be some.
    known = [name for name in claims if name != "checkpoint" or case.format == name]
    assert known == ([case.format] if case.sample.detected else [])
    if known:
        assert detect(path) == case.format


@by_case
def test_what_may_not_be_read_is_no_known_source(case, tmp_path):
    path = build(case, tmp_path / "source")
    with closed(tmp_path / "source"), pytest.raises(SourceError, match="source"):
        detect(path)


@by_case
@by_exporter
def test_every_importer_joins_every_exporter(case, exporter, tmp_path):
    output = provider_of(exporter).output
    task = open_task(case, tmp_path / "source")
    must = case.id in output.takes
    (tmp_path / "out").mkdir()
    check_join(get_exporter(exporter), output, task, tmp_path / "out", must=must)


@by_case
@pytest.mark.parametrize(
    "both", [row.name for row in _have_samples() if row.exporter and row.importer]
)
def test_what_is_written_is_read_again(case, both, tmp_path):
    output = provider_of(both).output
    task = open_task(case, tmp_path / "source")
    must = case.id in output.takes
    (tmp_path / "out").mkdir()
    exporter, importer = get_exporter(both), get_importer(both)
    check_round(exporter, importer, output, task, tmp_path / "out", must=must)


@by_case
@by_exporter
def test_an_rmm_file_between_changes_nothing(case, exporter, tmp_path):
    import rmmformat

    output = provider_of(exporter).output
    if case.id not in output.takes:
        return
    path = build(case, tmp_path / "source")
    options = case.sample.options(path)
    rmmformat.convert([path], tmp_path / "x.rmm", exact=True, kind=case.format, options=options)
    with rmmformat.open(tmp_path / "x.rmm") as collection:
        (tmp_path / "out").mkdir()
        task = collection.source(case.sample.several or collection.tasks[0])
        check_join(get_exporter(exporter), output, task, tmp_path / "out", must=True)


@by_exporter
@pytest.mark.parametrize("check", EXPORT_CHECKS, ids=lambda check: check.__name__)
def test_export(check, exporter, tmp_path):
    output = provider_of(exporter).output
    for case in CASES:
        if case.id in output.takes:
            folder = tmp_path / case.id.replace("/", "-")
            folder.mkdir()
            task = open_task(case, folder / "source")
            work = folder / "work"
            work.mkdir()
            check(get_exporter(exporter), output, task, work)


# --- the kit itself: each kind of fault is found ------------------------------------------------


def own_copy(factors):
    """Arrays that can be written to, as views of a mapped file cannot."""
    return dataclasses.replace(factors, A=factors.A.copy(), B=factors.B.copy())


class Broken:
    """The PEFT importer with one fault."""

    name = "peft"

    def __init__(self, fault):
        self.fault = fault
        self._sound = get_importer("peft")

    def detect(self, path):
        return True if self.fault == "claims everything" else self._sound.detect(path)

    def open(self, path, *, name=None, options):
        if self.fault == "lets nan through":
            options = dataclasses.replace(options, allow_nonfinite=True)
        if self.fault == "forgets the name":
            name = None
        try:
            (task,) = self._sound.open(path, name=name, options=options)
        except RmmError as error:
            if self.fault == "raises what it likes":
                raise ValueError(str(error)) from error
            if self.fault == "names no file":
                raise RmmError("something is wrong") from error
            raise
        broken = Wrapped(task)
        if self.fault == "drops a ledger line":
            broken.ledger = tuple(line for line in task.ledger if "lora_B" not in line.item)
        if self.fault == "overlooks tensors":
            broken.ledger = tuple(line for line in task.ledger if "no_such" not in line.item)
        if self.fault == "forgets the scale":
            targets = {t: dataclasses.replace(i, scale=1.0) for t, i in task.targets.items()}
            broken.targets = targets
            broken.factors = lambda t: dataclasses.replace(task.factors(t), scale=1.0)
        if self.fault == "shares its arrays":
            cache = {t: own_copy(task.factors(t)) for t in task.targets}
            broken.factors = lambda t: cache[t] if t in cache else task.factors(t)
        if self.fault == "has another value each time":
            counts = itertools.count(1)
            broken.factors = lambda t: dataclasses.replace(
                task.factors(t), B=task.factors(t).B * np.float32(next(counts))
            )
        if self.fault == "hashes nothing":
            broken.files = tuple(dataclasses.replace(f, sha256="0" * 64) for f in task.files)
        return [broken]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("forgets the scale", "check_deltas_are_right"),
        ("shares its arrays", "check_task_is_as_described"),
        ("forgets the name", "check_name_can_be_chosen"),
        ("hashes nothing", "check_files_are_hashed"),
        ("drops a ledger line", "check_ledger_is_complete"),
        ("overlooks tensors", "check_extra_tensor_is_seen"),
        ("lets nan through", "check_nan_is_refused"),
        ("claims everything", "check_detection"),
        ("names no file", "check_odd_places"),
        ("raises what it likes", "check_no_permission"),
        ("has another value each time", "check_exact_file_gives_the_task_back"),
        ("has another value each time", "check_task_is_as_described"),
        ("raises what it likes", "check_damaged_files"),
        ("names no file", "check_damaged_files"),
        ("raises what it likes", "check_replaced_files"),
    ],
)
def test_the_kit_finds_the_fault(fault, check, tmp_path):
    (found,) = [c for c in IMPORT_CHECKS if c.__name__ == check]
    sample = provider_of("peft").samples[0]
    expected = ValueError if fault == "raises what it likes" else AssertionError
    with pytest.raises(expected):
        found(Broken(fault), sample, tmp_path)


class Careless:
    """An exporter that writes in place, with one fault beside."""

    name = "careless"

    def __init__(self, fault):
        self.fault = fault
        self._sound = get_exporter("safetensors")

    def export(self, task, out, *, force=False, options):
        if self.fault == "writes in place":
            out.write_bytes(b"half")
            ledger = self._sound.export(task, out, force=True, options=options)
        elif self.fault == "always forces":
            ledger = self._sound.export(task, out, force=True, options=options)
        elif self.fault == "trusts names":
            ledger = self._sound.export(task, out, force=force, options=options)
            stray = out.parent / f"{task.name}.txt"
            if stray.parent.is_dir():
                stray.write_bytes(b"")
        else:
            ledger = self._sound.export(task, out, force=force, options=options)
            if self.fault == "adds the time":
                Careless.count += 1
                out.write_bytes(out.read_bytes() + bytes([Careless.count]))
            if self.fault == "says nothing":
                ledger = ()
        return ledger

    count = 0


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("says nothing", "check_ledger_names_everything"),
        ("adds the time", "check_same_bytes"),
        ("always forces", "check_force"),
        ("writes in place", "check_nothing_half_written"),
        ("trusts names", "check_no_path_from_names"),
    ],
)
def test_the_kit_finds_the_exporters_fault(fault, check, tmp_path):
    (found,) = [c for c in EXPORT_CHECKS if c.__name__ == check]
    task = open_task(CASES[0], tmp_path / "source")
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(AssertionError):
        found(Careless(fault), provider_of("safetensors").output, task, work)
