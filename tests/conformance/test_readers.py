"""Every reader on every vector: the values bit for bit, refusals by rule and place."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import numpy as np
import pytest
from readers import ADAPTERS, WITHOUT_METADATA, Reader, Refusal, TaskValues
from vectors import ALL, Vector


@pytest.fixture(scope="module", params=ADAPTERS, ids=lambda adapter: adapter.name)
def reader(request: pytest.FixtureRequest) -> Reader:
    try:
        adapter: Reader = request.param()
    except ImportError as error:
        pytest.skip(f"{request.param.name} reader: {error}")
    return adapter


def cases(*whens: str | None) -> Any:
    chosen = [v for v in ALL if v.when in whens and v.verdict != "free"]
    return pytest.mark.parametrize("vector", chosen, ids=str)


def check_place(reader: Reader, vector: Vector, offset: int | None) -> None:
    if vector.offset is None:
        return
    assert offset is not None
    if reader.exact:
        assert offset == vector.offset
    ranges = [range(start, start + max(length, 1)) for start, length in vector.within]
    assert any(offset in allowed for allowed in ranges), (offset, vector.within)


def check_values(values: TaskValues, expected: dict[str, Any]) -> None:
    got = [
        {
            "target": e.target, "n_in": e.n_in, "n_out": e.n_out, "kind": e.kind,
            "transposed": e.transposed, "kernel": list(e.kernel), "rank": e.rank,
            "scale": float(e.scale).hex(), "dtypes": list(e.dtypes),
            "A": described(e.A), "B": described(e.B),
        }
        for e in values.entries
    ]  # fmt: skip
    assert got == expected["entries"]
    privates = [
        {
            "name": p.name, "dtype": p.dtype, "role": p.role, "shape": list(p.shape),
            "sha256": hashlib.sha256(p.content).hexdigest(),
        }
        for p in values.privates
    ]  # fmt: skip
    assert privates == expected["privates"]


def described(factor: Any) -> dict[str, Any]:
    assert factor.dtype == np.float32
    whole = np.ascontiguousarray(factor, dtype="<f4")
    first = [float(x).hex() for x in whole.reshape(-1)[:4]]
    digest = hashlib.sha256(whole.tobytes()).hexdigest()
    return {"shape": list(factor.shape), "sha256": digest, "first": first}


@cases(None, "validate", "load")
def test_opens_with_the_recorded_values(reader: Reader, vector: Vector) -> None:
    opened = reader.open(vector.data)
    expected = vector.expected
    if expected is None:
        return
    names = list(expected["tasks"])
    if vector.when != "load":
        assert reader.tasks(opened) == names
    for name in names:
        check_values(reader.load(opened, name), expected["tasks"][name])
    metadata = reader.metadata(opened)
    if metadata is not ...:
        assert metadata == expected["metadata"]


@cases("open")
def test_refuses_for_the_recorded_rule(reader: Reader, vector: Vector) -> None:
    with pytest.raises(Refusal) as caught:
        reader.open(vector.data)
    refusal = caught.value
    assert (refusal.rule, refusal.status) == (vector.rule, vector.status)
    check_place(reader, vector, refusal.offset)


@cases("load")
def test_refuses_to_load_for_the_recorded_rule(reader: Reader, vector: Vector) -> None:
    opened = reader.open(vector.data)
    with pytest.raises(Refusal) as caught:
        reader.load(opened, vector.task)
    refusal = caught.value
    assert (refusal.rule, refusal.status) == (vector.rule, vector.status)
    check_place(reader, vector, refusal.offset)


@cases(None)
def test_validates(reader: Reader, vector: Vector) -> None:
    assert reader.validate(vector.data) == []


@cases("open", "validate", "load")
def test_validator_lists_the_recorded_rule(reader: Reader, vector: Vector) -> None:
    if reader.name in WITHOUT_METADATA and vector.rule in ("RMM-090", "RMM-091"):
        pytest.skip("needs a JSON parser")
    found = reader.validate(vector.data)
    places = [offset for rule, offset in found if rule == vector.rule]
    assert places, found
    check_place(reader, vector, places[0])
    if reader.exact:  # others may list what follows from the fault, too
        assert {rule for rule, _ in found} == {vector.rule}


@pytest.mark.parametrize("vector", [v for v in ALL if v.verdict == "free"], ids=str)
def test_free_vectors_do_no_harm(reader: Reader, vector: Vector) -> None:
    reader.validate(vector.data)
    with contextlib.suppress(Refusal):
        opened = reader.open(vector.data)
        for name in reader.tasks(opened):
            reader.load(opened, name)
