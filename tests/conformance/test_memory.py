"""The most that a small file can ask for: values at the limits of the format, in every reader."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from readers import ADAPTERS, Reader
from vectors import BY_ID

#: Bytes for each byte of the file.  What comes out may be 4,096 (RMM-062); numpy needs some of that
#: again while it computes.
PER_BYTE = {"native": 5_000, "python": 28_000, "reference": 32_000}


@pytest.mark.parametrize("name", ["v-limits", "v-work-many", "v-frame-tall", "v-values-many"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_memory_is_in_proportion_to_the_file(adapter: Any, name: str) -> None:
    try:
        reader: Reader = adapter()
    except ImportError as error:
        pytest.skip(f"{adapter.name} reader: {error}")
    data = BY_ID[name].data
    assert len(data) < 2048
    tracemalloc.start()
    try:
        assert reader.validate(data) == []
        opened = reader.open(data)
        for task in reader.tasks(opened):
            reader.load(opened, task)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= PER_BYTE[reader.name] * len(data)
