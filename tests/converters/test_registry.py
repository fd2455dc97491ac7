"""The list of formats, and that it costs nothing to look at."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rmmformat.converters import collect, detect, formats, get, get_exporter, get_importer
from rmmformat.converters.registry import BUILT_IN, ENTRY_POINT_GROUP, Format
from rmmformat.errors import NotFoundError, RmmError, SourceError, UnsupportedError


def test_every_format_loads_and_knows_its_name():
    for row in BUILT_IN:
        assert row.available, row.install
        for direction, load in (("importer", get_importer), ("exporter", get_exporter)):
            if getattr(row, direction):
                assert load(row.name).name == row.name


def test_looking_imports_no_foreign_library():
    code = (
        "import sys; from pathlib import Path; import rmmformat.converters as c;"
        "c.formats(); c.get_importer('peft').detect(Path('.'));"
        "bad = {'torch', 'peft', 'transformers', 'safetensors', 'gguf', 'onnx'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detection(kit):
    folder = kit.adapter(kit.pair("q"), name="far/all/a")
    assert detect(folder) == "peft"
    assert detect(folder.parent) == "peft"
    assert detect(folder / "adapter_model.safetensors") == "peft"
    with pytest.raises(SourceError, match="tried peft"):
        detect(kit.root)  # three folders above the adapter
    with pytest.raises(SourceError, match="no such file"):
        detect(kit.root / "absent")


def test_unknown_format_names_the_near_ones():
    with pytest.raises(NotFoundError, match="'pfet'") as caught:
        get("pfet")
    assert "peft" in str(caught.value)


def test_missing_direction_and_missing_library(monkeypatch):
    with pytest.raises(UnsupportedError, match="safetensors has no importer") as caught:
        get_importer("safetensors")
    assert "peft" in str(caught.value.hint)
    row = Format("far", "far away", "x:Y", needs=("no_such_library",), install="pip install it")
    monkeypatch.setattr("rmmformat.converters.registry.BUILT_IN", (*BUILT_IN, row))
    assert not get("far").available
    with pytest.raises(UnsupportedError, match="no_such_library") as caught:
        get_importer("far")
    assert caught.value.hint == "pip install it"
    with pytest.raises(SourceError, match=r"far \(pip install it\)"):
        detect(Path(__file__))


class Point:
    """An entry point, as a plug-in's package would declare it."""

    value = "plugin:FORMAT"

    def __init__(self, name, result):
        self.name = name
        self._result = result

    def load(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def test_plug_ins(monkeypatch):
    points = [
        Point("mine", Format("mine", "of mine", importer="json:JSONDecoder")),
        Point("peft", Format("peft", "an impostor")),
        Point("broken", ImportError("no module x")),
        Point("odd", 3),
    ]

    def entry_points(group):
        assert group == ENTRY_POINT_GROUP
        return points

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    rows = {row.name: row for row in formats()}
    assert list(rows) == [*(row.name for row in BUILT_IN), "broken", "mine", "odd"]
    assert rows["peft"] is BUILT_IN[0]
    assert "no module x" in rows["broken"].description
    assert "expected a Format" in rows["odd"].description
    assert type(get_importer("mine")).__name__ == "JSONDecoder"


def test_collecting_several_sources(kit, demo):
    folder = kit.adapter(kit.pair("q"))
    tasks = collect([("mine", folder), (None, demo)])
    assert [task.name for task in tasks][:3] == ["mine", "amazon", "bbc"]
    assert len(tasks) == 9
    with pytest.raises(RmmError, match="no sources"):
        collect([])
    with pytest.raises(SourceError, match="are the same"):
        collect([(None, demo / "bbc"), ("bbc", folder)], fmt="peft")
