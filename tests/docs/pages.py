"""Pages of the documentation taken apart: links, headings, and blocks of code with their marks."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "spec/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
LANGUAGES = {"bash": "shell", "sh": "shell", "shell": "shell", "console": "shell", "": "shell?",
             "python": "python"}  # fmt: skip

_MARK = re.compile(r"<!--\s*(not run|needs):\s*(.+?)\s*-->")


@dataclasses.dataclass(frozen=True)
class Block:
    """Code of a page: its language, text, line, and what stands in the comment before it."""

    language: str
    text: str
    line: int
    not_run: str | None
    needs: tuple[str, ...]


def markdown() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table")


def blocks(page: Path) -> list[Block]:
    """Blocks that a person would paste, in order."""
    found = []
    mark: tuple[str, str] | None = None
    for token in markdown().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            match = _MARK.search(token.content)
            mark = (match[1], match[2]) if match else None
            continue
        language = token.info.split()[0] if token.info.strip() else ""
        if token.type == "fence" and LANGUAGES.get(language) in ("shell", "python"):
            assert token.map is not None
            kind, value = mark or ("", "")
            found.append(
                Block(
                    LANGUAGES[language],
                    typed(token.content) if language == "console" else token.content,
                    token.map[0] + 1,
                    value if kind == "not run" else None,
                    tuple(word.strip() for word in value.split(",")) if kind == "needs" else (),
                )
            )
        if token.level == 0:
            mark = None
    return found


def typed(text: str) -> str:
    """What a person typed in a block that shows prompts; output is left out."""
    lines, going_on = [], False
    for line in text.splitlines():
        if line.startswith("$ ") or going_on:
            lines.append(line.removeprefix("$ "))
            going_on = line.endswith("\\")
    return "\n".join(lines) + "\n" if lines else text


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    seen: set[str] = set()
    tokens = markdown().parse(page.read_text(encoding="utf-8"))
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(child.content for child in inline.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            number, name = 0, slug
            while name in seen:
                number += 1
                name = f"{slug}-{number}"
            seen.add(name)
    return seen


def links(page: Path) -> list[str]:
    """Where a page's links and pictures go."""
    found = []
    for token in markdown().parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            where = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
            if where is not None:
                found.append(str(where))
    return found
