"""Adding, removing and compacting as people do it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import rmmformat as rmm
from rmmformat import grow
from rmmformat.cli.main import main
from rmmformat.errors import LossyConversionError, NotFoundError, OptionError, RmmError
from rmmformat.format.layout import alignment
from rmmformat.merge.error import relative_error
from rmmformat.methods import choose_method
from rmmformat.model import Factors
from rmmformat.pipeline import convert

from ..product.conftest import MemoryTask, make_tasks
from .conftest import content

METHODS = {
    "exact": choose_method(exact=True),
    "plain": choose_method(encoding="q4"),
    "max_error": choose_method(max_error=0.1),
    "size": choose_method(size=0.6),
    "rmm": choose_method(components=2),
    "rmm by row": choose_method(components=3, grouping="row", align="svd", encoding="f16"),
    "rmm by factor": choose_method(components=1, grouping="factor", align="procrustes"),
}


def family(n: int, rank: int = 4, seed: int = 0) -> list[MemoryTask]:
    """Tasks that are alike, so that a basis of some is of use to others."""
    rng = np.random.default_rng(seed)
    sides = {"a": (40, 24), "b": (17, 33)}
    common = {k: (rng.standard_normal((2, rank, i)), rng.standard_normal((2, o, rank)))
              for k, (i, o) in sides.items()}  # fmt: skip
    tasks = []
    for t in range(n):
        u, v = rng.standard_normal(2), rng.standard_normal(2)
        factors = {
            k: Factors(
                np.tensordot(u, a, 1).astype(np.float32),
                np.tensordot(v, b, 1).astype(np.float32),
                2.0,
            )
            for k, (a, b) in common.items()
        }
        tasks.append(MemoryTask(f"task{t}", factors, privates={"head": np.arange(3.0) + t}))
    return tasks


@pytest.mark.parametrize("name", ["exact", "plain", "max_error"])
def test_added_and_compacted_is_converted_anew(name: str, tmp_path: Path) -> None:
    tasks = make_tasks(4)  # with nothing in common, so that each is kept on its own
    convert(tasks, tmp_path / "anew.rmm", METHODS[name])
    path = tmp_path / "x.rmm"
    convert(tasks[1:3], path, METHODS[name])
    grow.add(path, [make_tasks(1, seed=5)[0]])  # a task0 that will be replaced
    grow.add(path, [tasks[3], tasks[0]], replace=True)
    grow.remove(path, ["task2"])
    grow.add(path, [tasks[2]])
    assert content(path) == content(tmp_path / "anew.rmm")
    grow.compact(path)
    assert path.read_bytes() == (tmp_path / "anew.rmm").read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_adds_as_it_made(name: str, tmp_path: Path) -> None:
    tasks = family(5)
    path = tmp_path / "x.rmm"
    convert(tasks[:4], path, METHODS[name])
    old = content(path)
    report = grow.add(path, tasks[4:])
    new = content(path)
    assert {task: new[task] for task in old} == old
    assert report.method == METHODS[name].describe()
    assert report.projected == name.startswith("rmm")
    assert (report.bytes_after, report.n_tasks) == (path.stat().st_size, 5)
    (told,) = report.tasks
    with rmm.open(path) as collection:
        recorded = collection.metadata["tasks"]["task4"]["error"]["max"]
        assert "method" not in collection.metadata["tasks"]["task4"]
        task = collection.load("task4")
        for target in task:
            want, got = tasks[4].factors(target), task[target]
            error = relative_error(want.A, want.B, want.scale, got.A, got.B, got.scale)
            assert error <= told.max_error * (1 + 1e-5) + 1e-12
    assert recorded == pytest.approx(told.max_error, rel=1e-5)


def test_a_task_of_the_family_is_kept_by_its_basis(tmp_path: Path) -> None:
    tasks = family(6)
    path = tmp_path / "x.rmm"
    convert(tasks[:5], path, choose_method(components=2, encoding="f32"))
    size = path.stat().st_size
    report = grow.add(path, tasks[5:])
    assert report.tasks[0].max_error < 1e-5
    own = 2 * 4 * (40 + 24 + 17 + 33)  # p coefficients a position
    with rmm.open(path) as collection:
        from rmmformat.inspect import file_info

        info = {task.name: task for task in file_info(collection).tasks}
        assert info["task5"].own_bytes == own
    assert report.bytes_after - size < 6000


def test_a_basis_is_not_used_where_it_does_not_fit(tmp_path: Path) -> None:
    tasks = family(3)
    path = tmp_path / "x.rmm"
    convert(tasks, path, choose_method(components=1, encoding="f32"))
    wide = MemoryTask("wide", {"a": make_tasks(1, rank=6, sides=((40, 24),))[0].factors("layer.0")})
    other = MemoryTask("other", {"new": make_tasks(1, seed=3)[0].factors("layer.0")})
    low = family(1, rank=4, seed=0)[0]
    low = MemoryTask("low", {k: Factors(low.factors(k).A[:2], low.factors(k).B[:, :2], 2.0)
                             for k in low.targets})  # fmt: skip
    report = grow.add(path, [wide, other, low])
    errors = {task.name: task.max_error for task in report.tasks}
    assert errors["wide"] < 1e-6
    assert errors["other"] < 1e-6
    assert 1e-3 < errors["low"] < 1.5
    content(path)
    # The frames that were theirs alone go with them.
    assert grow.remove(path, ["wide", "other"]).free_bytes > 0
    grow.compact(path)
    grow.remove(path, ["low"])
    grow.compact(path)
    convert(tasks, tmp_path / "anew.rmm", choose_method(components=1, encoding="f32"))
    assert path.read_bytes() == (tmp_path / "anew.rmm").read_bytes()


def test_another_method_for_what_is_new(tmp_path: Path) -> None:
    tasks = family(4)
    path = tmp_path / "x.rmm"
    convert(tasks[:3], path, METHODS["rmm"])
    report = grow.add(path, tasks[3:], METHODS["exact"])
    assert not report.projected
    assert report.tasks[0].max_error == 0
    with rmm.open(path) as collection:
        assert collection.metadata["method"]["name"] == "rmm"
        assert collection.metadata["tasks"]["task3"]["method"] == {"name": "exact"}
        assert collection.load("task3")["a"].A.tobytes() == tasks[3].factors("a").A.tobytes()


def test_removing_all_and_adding_again(tmp_path: Path) -> None:
    tasks = family(2)
    path = tmp_path / "x.rmm"
    convert(tasks, path, METHODS["rmm"])
    grow.remove(path, ["task0", "task1", "task0"])
    assert content(path) == {}
    grow.add(path, tasks)
    grow.compact(path)
    convert(tasks, tmp_path / "anew.rmm", METHODS["rmm"])
    assert path.read_bytes() == (tmp_path / "anew.rmm").read_bytes()


def test_equal_contents_are_shared_with_what_is_there(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal(5000)
    (one, two) = make_tasks(2, privates={"table": table})
    path = tmp_path / "x.rmm"
    convert([one], path, METHODS["exact"])
    report = grow.add(path, [two])
    assert report.bytes_after - report.bytes_before < table.nbytes / 2
    grow.remove(path, ["task0"])
    with rmm.open(path) as collection:
        assert np.array_equal(collection.privates("task1")["table"], table)
    content(path)


def test_a_hundred_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    convert(make_tasks(1, sides=((600, 300),)), path, METHODS["exact"])
    for number in range(1, 50):
        (task,) = make_tasks(1, sides=((600 - number, 300),), seed=number)
        task.name = f"t{number}"
        grow.add(path, [task])
        if number % 2:
            grow.remove(path, [f"t{number}"])
    names = set(content(path))
    assert names == {"task0", *(f"t{number}" for number in range(2, 50, 2))}
    with rmm.open(path) as collection:
        free = collection.index.table("free")
        assert len(free) <= 100
        assert all(int(o) % alignment(1) == 0 for o in free["offset"])
    report = grow.compact(path)
    assert report.bytes_after < 0.6 * report.bytes_before
    assert set(content(path)) == names


def test_names_and_bases_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    convert(make_tasks(2), path, METHODS["exact"])
    data = path.read_bytes()
    with pytest.raises(LossyConversionError, match=r"task 'task1' already.*--replace"):
        grow.add(path, make_tasks(2)[1:])
    (alien,) = make_tasks(1, base_model="other/base")
    alien.name = "alien"
    with pytest.raises(RmmError, match=r"other/base.*tiny/base.*--allow-base-mismatch"):
        grow.add(path, [alien])
    with pytest.raises(NotFoundError, match="There is task0"):
        grow.remove(path, ["task1", "taks0"])
    assert path.read_bytes() == data
    grow.add(path, [alien], allow_base_mismatch=True)
    with rmm.open(path) as collection:
        assert collection.metadata["base_model"]["id"] == "tiny/base"


def test_a_file_that_does_not_say_how_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    from rmmformat.format.writer import Writer

    with Writer(path) as writer:
        writer.finish({"producer": "x", "base_model": {}, "method": {"name": "magic"},
                       "configs": [], "tasks": {}, "note": "kept"})  # fmt: skip
    with pytest.raises(OptionError, match=r"magic.*--max-error"):
        grow.add(path, make_tasks(1))
    grow.add(path, make_tasks(1), METHODS["exact"])
    content(path)
    with rmm.open(path) as collection:
        assert collection.metadata["note"] == "kept"
        assert collection.metadata["base_model"] == {"id": "tiny/base"}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_line(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "skills.rmm"
    run("convert", demo_adapters / "bbc", demo_adapters / "spam", "-o", path, "--exact")
    text = run("add", path, demo_adapters / "yelp", f"other={demo_adapters / 'imdb'}")
    assert "4 tasks" in text
    report = json.loads(run("add", path, demo_adapters / "yelp", "--replace", "--json"))
    assert report["replaced"] == ["yelp"]
    assert report["tasks"][0]["max_error"] == 0
    assert "already" in run("add", path, demo_adapters / "yelp", code=5)
    data = path.read_bytes()
    assert "would remove yelp" in run("remove", path, "yelp", "--dry-run")
    assert "would become" in run("compact", path, "--dry-run")
    assert path.read_bytes() == data
    assert "There is yelp" in run("remove", path, "yelpp", code=1)
    assert json.loads(run("remove", path, "yelp", "other", "--json"))["n_tasks"] == 2
    sizes = json.loads(run("compact", path, "--json"))
    assert sizes["bytes_after"] == path.stat().st_size < sizes["bytes_before"]
    assert "valid" in run("validate", path)
    run("convert", demo_adapters / "bbc", demo_adapters / "spam", "-o", tmp_path / "y.rmm",
        "--exact")  # fmt: skip
    assert path.read_bytes() == (tmp_path / "y.rmm").read_bytes()
    for verb in ("add", "remove", "compact"):
        assert "Example:" in run(verb, "--help")
    run("remove", path, code=2)
    shutil.copyfile(demo_adapters / "README.md", path)
    assert "RMM-001" in run("compact", path, code=3)


def test_a_poor_basis_is_told(demo_adapters: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.rmm"
    run("convert", demo_adapters / "bbc", demo_adapters / "spam", demo_adapters / "imdb",
        "-o", path, "--components", 1)  # fmt: skip
    assert "was made without the new tasks" in run("add", path, demo_adapters / "yelp")
    assert "made without" not in run("add", path, demo_adapters / "yelp", "--replace", "--exact")
