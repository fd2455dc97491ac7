"""The worked example is that of the generator."""

from __future__ import annotations

import make_example
from vectors import SPEC


def test_example_is_up_to_date() -> None:
    assert (SPEC / "example.md").read_text("utf-8") == make_example.make()
