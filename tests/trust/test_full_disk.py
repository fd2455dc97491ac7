"""A disk that is full at any point of any change: a real one of a few pages.

Needs the right to mount a tmpfs; without it ``tests/growth`` has a limit on file sizes instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rmmformat as rmm
from rmmformat.converters.base import DEFAULTS
from rmmformat.converters.registry import get_exporter
from rmmformat.errors import RmmError

from ..growth.conftest import content
from ..growth.test_faults import fill

LONG = "RMM_TRUST" in os.environ
PAGE = 4096
ADAPTERS = Path(__file__).parents[1] / "data" / "demo-adapters"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode
    except FileNotFoundError:
        done = 1
    if done:
        pytest.skip("no right to mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "start.rmm"
    rmm.convert([ADAPTERS / "bbc", ADAPTERS / "spam"], path, max_error="30%")
    rmm.add(path, ADAPTERS / "yelp")
    rmm.remove(path, "yelp")
    return path


def export(path: Path) -> None:
    with rmm.open(path) as collection:
        get_exporter("peft").export(
            collection.source("bbc"), path.with_name("out"), force=True, options=DEFAULTS
        )


CHANGES: dict[str, Callable[[Path], object]] = {
    "add": lambda path: rmm.add(path, ADAPTERS / "imdb"),
    "remove": lambda path: rmm.remove(path, ["spam"]),
    "compact": rmm.compact,
    "convert": lambda path: rmm.convert(ADAPTERS / "imdb", path, max_error="30%", overwrite=True),
    "export": export,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_disk_that_is_full_at_any_page(disk: Path, start: Path, name: str) -> None:
    path, ballast = disk / "x.rmm", disk / "ballast"
    old = content(start)
    n_failed = n_done = 0
    room = 0
    while n_done < (3 if LONG else 1):
        shutil.copyfile(start, path)
        fill(ballast)
        left = max(0, ballast.stat().st_size - room * PAGE)
        os.truncate(ballast, left)
        failed = ""
        try:
            CHANGES[name](path)
        except (OSError, RmmError) as error:
            failed = str(error)
        found = content(path)
        if failed:
            assert os.strerror(errno.ENOSPC) in failed
            assert found == old
            n_failed += 1
        else:
            n_done += 1
        # Nothing is left behind, but for what was asked for.
        kept = {"x.rmm", "ballast", *(["out"] if name == "export" and not failed else [])}
        assert {entry.name for entry in disk.iterdir()} == kept
        ballast.unlink()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(disk / "out")
        room += 1 if LONG else 7
        assert room < 160
    assert n_failed or name == "remove"
    sys.stdout.write(f"{name}: {n_failed} times the disk was full, each time the old file stayed\n")
