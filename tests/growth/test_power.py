"""Power failures: every state that a change can leave holds the old or the new collection."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rmmformat.errors import FormatError
from rmmformat.format.disk import DISK

from .conftest import SCENARIOS, Scenario, content, loaded
from .crash import Recorder, apply, states

RANDOM_SUBSETS = int(os.environ.get("RMM_POWER_SUBSETS", "40"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_every_state_of_the_device_is_old_or_new(scenario: Scenario, tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    scenario.before(path)
    before = {path.name: path.read_bytes()}
    old, recorder = content(path), Recorder()
    scenario.change(path, recorder)
    new = content(path)
    assert old != new or scenario.name == "compact"
    found = set()
    n = 0
    for state in states(recorder.ops, before, random_subsets=RANDOM_SUBSETS):
        got = content(state[path.name])
        assert got in (old, new)
        found.add(got == new)
        n += 1
    assert found == {True, False} or old == new
    sys.stdout.write(f"{scenario.name}: {n} states of {len(recorder.ops)} operations\n")


def test_a_slot_torn_at_any_byte_stops_no_reader(tmp_path: Path) -> None:
    for scenario in SCENARIOS[:3]:
        path = tmp_path / "x.rmm"
        scenario.before(path)
        data = path.read_bytes()
        old, recorder = loaded(path), Recorder()
        scenario.change(path, recorder)
        new = loaded(path)
        for op in recorder.ops:
            if op.kind == "write" and len(op.data) == 128:
                for cut in range(128):
                    torn = type(op)("write", op.name, op.offset, op.data[:cut])
                    assert loaded(apply(data, [torn])) in (old, new)
            if op.kind in ("write", "truncate"):
                data = apply(data, [op])


def test_nothing_below_the_length_is_written_but_the_slots(tmp_path: Path) -> None:
    for scenario in SCENARIOS[:7]:
        path = tmp_path / "x.rmm"
        scenario.before(path)
        length = len(path.read_bytes()) - 40_000 * ("interruption" in scenario.name)
        recorder = Recorder()
        scenario.change(path, recorder)
        for op in recorder.ops:
            assert op.kind in ("write", "sync", "truncate")
            if op.kind == "write":
                slot = op.offset in (64, 512) and len(op.data) == 128
                assert slot or op.offset >= length
            if op.kind == "truncate":
                assert op.offset >= length


def test_the_model_finds_a_writer_that_does_not_sync(tmp_path: Path) -> None:
    """Without its syncs the same change is found wanting: the test can fail."""
    scenario = SCENARIOS[0]
    path = tmp_path / "x.rmm"
    scenario.before(path)
    before = {path.name: path.read_bytes()}
    recorder = Recorder()
    scenario.change(path, recorder)
    for left_out in range(3):
        syncs = [i for i, op in enumerate(recorder.ops) if op.kind == "sync"]
        ops = [op for i, op in enumerate(recorder.ops) if i != syncs[left_out]]
        faults = 0
        for state in states(ops, before, random_subsets=5):
            try:
                content(state[path.name])
            except (AssertionError, FormatError):  # noqa: PERF203
                faults += 1
        assert (faults > 0) == (left_out < 2), left_out  # the last one is for durability alone
    assert DISK is not recorder
