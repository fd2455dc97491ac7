"""Metadata, as strictly as section 9 has it."""

from __future__ import annotations

import json
import math
import re
from typing import Any


def parse_metadata(raw: bytes) -> dict[str, Any]:
    """9: "one JSON object in UTF-8 without a byte order mark, without duplicate keys [...]"."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a key twice")
        return dict(items)

    def number(text: str) -> float:
        value = int(text) if re.fullmatch(r"-?\d{1,18}", text) else float(text)
        if not math.isfinite(value):
            raise ValueError("not finite")
        return value

    text = raw.decode("utf-8")
    depth = 0  # before parsing, so that nothing recurses deeper
    for mark in re.findall(r"[\[{]|[\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.S)):
        depth += 1 if mark in "[{" else -1
        if depth > 16:
            raise ValueError("nested more than 16 deep")
    value = json.loads(
        text, object_pairs_hook=pairs, parse_constant=number, parse_float=number, parse_int=number
    )
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
