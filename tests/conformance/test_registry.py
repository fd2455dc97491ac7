"""The registries in the text, in ``registry.json`` and in the reference reader are the same."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import reference
from vectors import SPEC

TEXT = (SPEC / "rmm-1.md").read_text("utf-8")
REGISTRY: dict[str, Any] = json.loads((SPEC / "registry.json").read_text("utf-8"))
METADATA = json.loads((SPEC / "metadata.schema.json").read_text("utf-8"))


def table(*columns: str) -> list[list[str]]:
    """Return the cells of the table that has these columns."""
    head = "| " + " | ".join(columns) + " |"
    lines = TEXT.splitlines()
    start = lines.index(head) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def paragraph(start: str) -> str:
    """Return the paragraph that starts so, on one line, without its full stop."""
    found = re.search(rf"^{re.escape(start)}(.*?)\n\n", TEXT, re.M | re.S)
    assert found is not None
    return " ".join(found[1].split()).rstrip(".")


def test_rules() -> None:
    rows = [{"id": a, "text": b, "when": c} for a, b, c in table("id", "MUST", "when")]
    assert rows == [
        {key: rule[key] for key in ("id", "text", "when")} for rule in REGISTRY["rules"]
    ]
    ids = [row["id"] for row in rows]
    assert ids == sorted(set(ids))


def test_statuses() -> None:
    sentence = re.search(r"^RMM-002(.*?) are answered as \*unsupported\*", TEXT, re.M | re.S)
    assert sentence is not None
    named = {f"RMM-{n}" for n in re.findall(r"\b\d{3}\b", "002" + sentence[1])}
    assert named == {rule["id"] for rule in REGISTRY["rules"] if "unsupported" in rule["status"]}


def test_text_cites_no_unknown_rule() -> None:
    cited = set(re.findall(r"RMM-\d{3}", TEXT))
    assert cited == {rule["id"] for rule in REGISTRY["rules"]}


def test_sections() -> None:
    rows = [
        {"type": a.strip("`"), "record_size": int(b), "content": c}
        for a, b, c in table("type", "record", "content")
    ]
    assert rows == REGISTRY["sections"]
    sizes = {row["type"]: row["record_size"] for row in rows}
    assert sizes == reference.SIZES


def test_encodings() -> None:
    rows = [
        {"code": int(a, 16), "name": b, "row_bytes": c}
        for a, b, c, _ in table("code", "name", "row_bytes(n)", "value")
    ]
    assert rows == REGISTRY["encodings"]
    for row in rows:
        if row["code"] not in reference.FIXED_SIZE:
            assert row["row_bytes"].startswith("by its own length")
            continue
        in_python = re.sub(r"ceil\(n/32\)", "-(-n // 32)", row["row_bytes"].replace("·", "*"))
        in_python = re.sub(r"^(\d)n$", r"\1 * n", in_python)
        for n in (1, 31, 32, 33, 1000):
            n_bytes = reference.row_bytes(row["code"], n)
            assert n_bytes == eval(in_python, {"n": n}), row  # noqa: S307


def test_dtypes() -> None:
    items = [item.split() for item in paragraph("Dtypes (code, name, bytes): ").split(" · ")]
    assert REGISTRY["dtypes"] == [
        {"code": int(code), "name": name, "n_bytes": int(size)} for code, name, size in items
    ]


@pytest.mark.parametrize(
    ("start", "key"), [("Kinds of target: ", "kinds"), ("Roles of private tensors: ", "roles")]
)
def test_kinds_and_roles(start: str, key: str) -> None:
    text = re.sub(r"\([^()]*\)", "", paragraph(start)).partition(". ")[0]
    items = [item.split(maxsplit=1) for item in text.split(",")]
    got = [{"code": int(code), "name": name.strip()} for code, name in items]
    assert got == REGISTRY[key]


def test_metadata_schema_names_the_keys_of_the_text() -> None:
    keys = [row[0].strip("`") for row in table("key", "content")]
    assert sorted(keys) == sorted(METADATA["properties"])


def test_metadata_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(METADATA)
