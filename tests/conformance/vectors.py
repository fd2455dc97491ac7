"""The set of vectors as the tests see it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPEC = Path(__file__).parents[2] / "spec"
VECTORS = SPEC / "vectors"


@dataclass(frozen=True)
class Vector:
    """An entry of the manifest."""

    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.fields.get(name)

    def __str__(self) -> str:
        return str(self.fields["id"])

    @property
    def data(self) -> bytes:
        """Bytes of the file; a missing file fails the test."""
        return (VECTORS / self.file).read_bytes()

    @property
    def expected(self) -> dict[str, Any] | None:
        """The values that must come out, where the manifest names them."""
        if self.expect is None:
            return None
        loaded: dict[str, Any] = json.loads((VECTORS / self.expect).read_text("utf-8"))
        return loaded


MANIFEST: dict[str, Any] = json.loads((VECTORS / "manifest.json").read_text("utf-8"))
ALL = [Vector(entry) for entry in MANIFEST["vectors"]]
BY_ID = {vector.id: vector for vector in ALL}
