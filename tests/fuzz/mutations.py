"""How inputs are changed: by what their bytes mean, and byte by byte."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

HOSTILE: list[Any] = [
    0, -1, 1, 2, 3, 7, 2**20 + 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63, 2**64, -(2**63),
    0.5, -0.0, 1e308, 1e-320, True, False, None, "", "x", "..", "../x", "/x", "CON", "a\x00b",
    "\u202e", "\ud800", "F32", "F16", "BF16", "I64", "F8_E4M3", "BOOL", "lora_A", "LORA",
    "all-linear", "x" * 1100, [], [0], [1, 1], [2**40, 2**40], [0, 2**63],
    {}, {"x": {}}, [[[[[[[[]]]]]]]],
]  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    waiting = [value]
    while waiting:
        here = waiting.pop()
        members = here.items() if isinstance(here, dict) else enumerate(here)
        for key, member in members:
            found.append((here, key))
            if isinstance(member, (dict, list)) and member:
                waiting.append(member)


def mutate_json(data: bytes, source: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    """Change a value, a key or the text of JSON."""
    try:
        value = json.loads(data)
        places: list[tuple[Any, Any]] = []
        if isinstance(value, (dict, list)):
            _places(value, places)
    except (ValueError, RecursionError):
        places = []
    if not places or source.random() < 0.2:
        return change(data)
    for _ in range(source.choice((1, 1, 2, 4))):
        parent, key = source.choice(places)
        other_parent, other_key = source.choice(places)
        try:
            what = source.randrange(6)
            if what == 0 and isinstance(parent, dict):
                name = source.choice(HOSTILE[26:40])
                parent[str(name) + source.choice(("", str(key)))] = parent.pop(key)
            elif what == 1:
                del parent[key]
            elif what == 2:
                parent[key] = other_parent[other_key]
            elif what == 3 and isinstance(parent[key], int):
                parent[key] += source.choice((-1, 1, 4, -4, 8, 256))
            elif what == 4 and isinstance(parent[key], str):
                parent[key] = change(parent[key].encode("utf-8", "replace")).decode(
                    "utf-8", "replace"
                )
            else:
                parent[key] = source.choice(HOSTILE)
        except (KeyError, IndexError, TypeError):
            continue
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return data


def mutate(
    shape: str, data: bytes, max_size: int, seed: int, bytewise: Callable[[bytes, int], bytes]
) -> bytes:
    """Change an input by what is known of its bytes.

    Parameters
    ----------
    shape
        "json", "safetensors" (length, JSON, data) or nothing.
    bytewise
        Changes bytes, of which there may be as many as the second argument says.
    """

    def change(part: bytes) -> bytes:
        return bytes(bytewise(part, min(max_size, len(part) + 64)))

    source = random.Random(seed)  # noqa: S311
    if shape == "json":
        changed = mutate_json(data, source, change)
    elif shape == "safetensors" and len(data) >= 8 and source.random() < 0.8:
        n = int.from_bytes(data[:8], "little")
        head, rest = data[8 : 8 + n], data[8 + n :]
        if source.random() < 0.2 and rest:
            rest = change(rest)
        else:
            head = mutate_json(head, source, change)
        length = len(head) if source.random() < 0.95 else source.getrandbits(64)
        changed = length.to_bytes(8, "little") + head + rest
    else:
        changed = change(data)
    return changed if len(changed) <= max_size else bytes(bytewise(data, max_size))


def random_bytewise(source: random.Random) -> Callable[[bytes, int], bytes]:
    """Change bytes at random: for runs without a fuzzer's own mutations."""

    def change(data: bytes, max_size: int) -> bytes:
        changed = bytearray(data)
        for _ in range(source.choice((1, 1, 2, 8))):
            at = source.randrange(len(changed) + 1)
            what = source.randrange(4)
            if what == 0:
                del changed[at : at + source.choice((1, 4, 64, 4096))]
            elif what == 1:
                changed[at:at] = source.randbytes(source.choice((1, 4, 8)))
            elif changed:
                at %= len(changed)
                if what == 2:
                    changed[at] ^= 1 << source.randrange(8)
                else:
                    changed[at : at + 4] = source.choice((b"\0" * 4, b"\xff" * 4, b"\0\0\0\x80"))
        return bytes(changed[:max_size])

    return change
