"""Every link of every document leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from .pages import PAGES, ROOT, links, slugs

IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def test_there_are_pages() -> None:
    assert {"README.md", "docs/index.md", "docs/tutorial.md", "spec/rmm-1.md"} <= set(IDS)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            if parts.scheme not in ("https", "mailto"):
                dead.append(f"{link}: not https")
            continue
        start = ROOT if parts.path.startswith("/") else page.parent
        goal = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else page
        if not goal.exists():
            dead.append(f"{link}: nothing there")
        elif not goal.is_relative_to(ROOT):
            dead.append(f"{link}: outside the repository")
        elif parts.fragment and goal.suffix == ".md" and parts.fragment not in slugs(goal):
            dead.append(f"{link}: no such heading")
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_in_text_are_there(page: Path) -> None:
    """Paths of the repository in code spans: `native/src/load.cpp`, `benchmarks/demo.py`."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = re.findall(
        r"`((?:rmmformat|converters|native|spec|tests|benchmarks|docs)/[\w./-]+)`", text
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed: set[str] = set()
    for toctree in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL):
        listed |= {line.strip() for line in toctree.splitlines() if line and line[0] != ":"}
    for page in PAGES:
        name = str(page.relative_to(ROOT / "docs").with_suffix("")) if (
            page.is_relative_to(ROOT / "docs")) else None  # fmt: skip
        if name not in (None, "index"):
            assert name in listed or f"{Path(name).parent}/*" in listed, name
