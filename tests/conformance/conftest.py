"""Lets these tests import their own modules and those of ``spec/``, which are in no package."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
SPEC = HERE.parents[1] / "spec"
for folder in (HERE, SPEC, SPEC / "vectors"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
