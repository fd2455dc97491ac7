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

from . import small_onnx
from .test_snippets import environment


def commands() -> dict[str, click.Command]:
    """Every command by its words, commands of commands included."""
    context = click.Context(main, info_name="rmm")
    found: dict[str, click.Command] = {"rmm": main}
    for verb in VERBS:
        command = main.get_command(context, verb)
        assert command is not None
        found[f"rmm {verb}"] = command
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                found[f"rmm {verb} {name}"] = inner
    return found


def examples(words: str) -> list[str]:
    """Lines of a help text behind "Example:"."""
    text = commands()[words].get_help(click.Context(commands()[words], info_name=words))
    found = re.search(r"Examples?:\n((?: {4,}\S.*\n)+)", text)
    assert found, f"the help of {words} has no example"
    return [line.strip() for line in re.sub(r"\\\n\s*", "", found[1]).splitlines()]


@pytest.mark.parametrize("words", commands())
def test_examples_run(words: str, desk: Path, converted: Path) -> None:
    shutil.copy(converted, desk / "skills.rmm")
    lines = examples(words)
    if any("base.onnx" in line for line in lines):
        pytest.importorskip("onnx")
        small_onnx.write(desk / "base.onnx")
    written: set[str] = {"skills.rmm"}
    for line in lines:
        assert line.startswith("rmm "), line
        # Two examples may write the same file, and each is a start of its own.
        for out in re.findall(r"(?:-o|--output|--html) (\S+)", line):
            if out in written:
                (desk / out).unlink()
            written.add(out)
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
