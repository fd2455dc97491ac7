"""The documents' blocks of code run as they stand, one after another, in a fresh folder.

The tutorial, the guides and the README always; another page where it says
``<!-- blocks: run by the tests -->``.  A comment before a block says otherwise:
``<!-- not run: REASON -->``, or ``<!-- needs: MODULE -->`` for one that runs where the modules are
installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, Block, blocks

ALWAYS = {ROOT / "README.md", ROOT / "docs" / "tutorial.md", *(ROOT / "docs/guides").glob("*.md")}
WITH_CODE = [
    page
    for page in PAGES
    if (page in ALWAYS or "<!-- blocks: run by the tests -->" in page.read_text(encoding="utf-8"))
    and any(block.not_run is None for block in blocks(page))
]
RUNNER = Path(__file__).with_name("run_page.py")


def runnable(block: Block) -> bool:
    return block.not_run is None and all(importlib.util.find_spec(name) for name in block.needs)


def environment() -> dict[str, str]:
    """That of the tests, with this interpreter's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(p.relative_to(ROOT)) for p in WITH_CODE])
def test_blocks_run(page: Path, desk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = str(page.relative_to(ROOT))
    chosen = [b for b in blocks(page) if runnable(b)]
    listed = tmp_path_factory.mktemp("page") / "blocks.json"
    listed.write_text(json.dumps([[b.language, b.text, f"{name}:{b.line}"] for b in chosen]))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(listed)],
        cwd=desk, env=environment(), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_tutorial_and_the_guides_are_among_them() -> None:
    names = {str(page.relative_to(ROOT)) for page in WITH_CODE}
    assert {"README.md", "docs/tutorial.md", "docs/guides/serving.md", "docs/guides/device.md",
            "docs/guides/hub.md", "docs/guides/reader.md"} <= names  # fmt: skip


def test_a_block_that_fails_fails_its_page(tmp_path: Path) -> None:
    for text, language in (("false\n", "shell"), ("true | false | true\n", "shell"),
                           ("1 / 0\n", "python")):  # fmt: skip
        listed = tmp_path / "blocks.json"
        listed.write_text(json.dumps([[language, text, "here:1"], ["shell", "touch x", "here:2"]]))
        done = subprocess.run(
            [sys.executable, str(RUNNER), str(listed)],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode != 0
        assert not (tmp_path / "x").exists()
