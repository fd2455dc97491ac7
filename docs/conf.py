"""Sphinx reads the repository's own Markdown where it lies, so that a link works here and there.

Sphinx with MyST because it is kept, checks its cross-references (``-W -n`` in ``make docs``), reads
numpy docstrings and click commands, and leaves the pages plain Markdown.  The root of the source is
the repository: ``sphinx-build -W -c docs . build/docs``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmmformat import __version__

project = "rmm"
author = "the authors of rmmformat"
copyright = author  # noqa: A001  # Sphinx's name
release = version = __version__

root_doc = "docs/index"
include_patterns = ["docs/**.md", "spec/rmm-1.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "native",
    "tests",
    "benchmarks",
    "*.egg-info",
    "**/.venv*",
]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
myst_links_external_new_tab = False
myst_all_links_external = False

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["torch", "peft", "transformers", "onnxruntime", "onnx", "llama_cpp", "gguf"]
napoleon_google_docstring = False
napoleon_use_rtype = False

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

smartquotes = False  # two hyphens are an option

html_theme = "furo"
html_title = f"rmm {release}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False


def existing(_app: Any, name: str, source: list[str]) -> None:
    """Leave pages out of the navigation that this copy of the repository does not have."""
    if name == root_doc:
        folder = Path(__file__).parent
        source[0] = "".join(
            line
            for line in source[0].splitlines(keepends=True)
            if not line.strip().isalpha() or (folder / f"{line.strip()}.md").exists()
        )


def examples(_app: Any, _context: Any, lines: list[str]) -> None:
    """Show the end of a help text as what it is: commands to paste."""
    text = [line.replace("`", "``") for line in lines]
    starts = [number for number, line in enumerate(text) if line.strip() == "| Example:"]
    if starts:
        commands = [line.lstrip("| ") for line in lines[starts[0] + 1 :] if line.strip()]
        text[starts[0] :] = [".. code-block:: bash", "", *(f"    {line}" for line in commands), ""]
    lines[:] = text


def setup(app: Any) -> None:
    """Join Sphinx's events."""
    app.connect("source-read", existing)
    app.connect("sphinx-click-process-description", examples)
