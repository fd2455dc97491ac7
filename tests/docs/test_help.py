"""The examples at the end of each verb's help run as they are pasted."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from rmmformat.cli.main import VERBS, main

from .test_snippets import environment


def examples(verb: str | None) -> list[str]:
    """Lines of a help text behind "Example:"."""
    context = click.Context(main, info_name="rmm")
    command = main if verb is None else main.get_command(context, verb)
    assert command is not None
    text = command.get_help(click.Context(command, info_name=verb, parent=context))
    found = re.search(r"Examples?:\n((?: {4,}\S.*\n)+)", text)
    assert found, f"the help of {verb} has no example"
    joined = re.sub(r"\\\n\s*", "", found[1])
    return [line.strip() for line in joined.splitlines()]


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_examples_run(verb: str | None, desk: Path, converted: Path) -> None:
    shutil.copy(converted, desk / "skills.rmm")
    for line in examples(verb):
        assert line.startswith("rmm "), line
        # Each example is a start of its own: what it writes is not there yet.
        for out in re.findall(r"(?:-o|--output|--html) (\S+)", line):
            if "convert" in line:
                (desk / out).unlink(missing_ok=True)
        run(desk, line)


def run(folder: Path, line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "rmm"
    done = subprocess.run(
        [sys.executable, "-m", "rmmformat", *words[1:]],
        cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_every_verb_is_listed_in_the_first_help() -> None:
    text = main.get_help(click.Context(main, info_name="rmm"))
    assert all(re.search(rf"^ +{verb} ", text, re.MULTILINE) for verb in VERBS)
