"""Laws of the set of vectors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import jsonschema
import make_vectors
import pytest
from vectors import ALL, BY_ID, MANIFEST, SPEC, VECTORS

RULES = json.loads((SPEC / "registry.json").read_text("utf-8"))["rules"]


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return make_vectors.make()


def test_manifest_satisfies_its_schema() -> None:
    schema = json.loads((VECTORS / "manifest.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(MANIFEST)


def test_ids_are_unique_and_name_rule_and_folder() -> None:
    assert len(BY_ID) == len(ALL)
    for vector in ALL:
        assert vector.file == f"{vector.verdict}/{vector.id}.rmm"
        assert vector.rule is None or vector.id.startswith(f"R{vector.rule[4:]}")


def test_every_rule_has_a_vector() -> None:
    covered = {vector.rule for vector in ALL}
    assert {rule["id"] for rule in RULES} - covered == set()


def test_vectors_agree_with_the_registry() -> None:
    known = {rule["id"]: rule for rule in RULES}
    for vector in ALL:
        if vector.rule is not None:
            assert vector.status in known[vector.rule]["status"], vector
            assert vector.when in known[vector.rule]["when"], vector


def test_every_broken_vector_has_a_valid_twin() -> None:
    for vector in ALL:
        if vector.twin is not None:
            assert BY_ID[vector.twin].verdict == "valid", vector


def test_files_are_those_of_the_manifest() -> None:
    for vector in ALL:
        assert hashlib.sha256(vector.data).hexdigest() == vector.sha256, vector
    named = {vector.file for vector in ALL} | {vector.expect for vector in ALL if vector.expect}
    folders = {vector.verdict for vector in ALL}
    found = {
        path.relative_to(VECTORS).as_posix()
        for folder in folders
        for path in (VECTORS / folder).iterdir()
    }
    assert found == named


def test_files_are_small() -> None:
    sizes = [path.stat().st_size for path in VECTORS.glob("*/*") if path.suffix != ".pyc"]
    assert max(sizes) <= 2**17
    assert sum(sizes) + (VECTORS / "manifest.json").stat().st_size <= 2 * 2**20


def test_no_file_is_there_twice() -> None:
    twice = [digest for digest, n in Counter(v.sha256 for v in ALL).items() if n > 1]
    assert [str(v) for v in ALL if v.sha256 in twice] == []


def test_generator_reproduces_the_set(made: dict[str, bytes]) -> None:
    for name, data in made.items():
        assert (VECTORS / name).read_bytes() == data, name
