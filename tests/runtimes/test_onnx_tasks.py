"""Tasks of every make in one session: scales, ranks, heads, and what is caught in time."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import rmmformat as rmm
from rmmformat.converters.registry import get_exporter
from rmmformat.errors import (
    InternalError,
    LossyConversionError,
    NotFoundError,
    OptionError,
    RmmError,
    SourceError,
    UnsupportedError,
)
from rmmformat.model import Role
from rmmformat.runtimes import onnx as runtime

from .onnx_models import (
    BIAS,
    N_IN,
    N_OUT,
    W2,
    X2,
    Task,
    W,
    collection_of,
    delta,
    expected,
    factors,
    head_task,
    network,
    node,
    run,
    second,
    with_adapter,
)


def test_ranks_scales_and_targets_that_differ_from_task_to_task(base: Path, tmp_path: Path) -> None:
    tasks = {
        "a": {"first": factors(1, 4, 2.0), "second": second(2, 2, 0.5)},
        "b": {"first": factors(3, 16, 0.125), "second": second(4, 8, -3.0)},
        "only_first": {"first": factors(5, 1)},
        "only_second": {"second": second(6, 3)},
        "scale_zero": {"first": factors(7, 4, 0.0)},
    }
    collection = collection_of(tmp_path, *(Task(name, made) for name, made in tasks.items()))
    session = runtime.Session(base, collection)
    plain = run(base, {"x": X2})
    for name in (*tasks, "only_first", "a", "only_second", "b"):
        want = expected(**{target: delta(f) for target, f in tasks[name].items()})
        assert np.abs(session.run(name, {"x": X2})[0] - want).max() < 1e-5, name
    assert session.run(None, {"x": X2})[0].tobytes() == plain.tobytes()
    assert session.run("scale_zero", {"x": X2})[0].tobytes() == plain.tobytes()
    assert session.cache.stats.loads == len(tasks)


def test_rslora_and_patterns_come_out_as_in_peft(tmp_path: Path) -> None:
    """Per module: rank 16 alpha 16 with rsLoRA (scale 4), and alpha and rank patterns."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(N_IN, N_OUT)
            self.first = torch.nn.Linear(N_OUT, N_OUT)
            self.second = torch.nn.Linear(N_OUT, N_OUT)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.second(torch.tanh(self.first(self.embed(ids))))
            return result

    torch.manual_seed(0)
    net = Net().eval()
    ids = torch.tensor([[3, 1, 4], [1, 5, 31]])
    path = tmp_path / "base.onnx"
    torch.onnx.export(net, (ids,), path, dynamo=False, input_names=["ids"], output_names=["y"])
    config = LoraConfig(
        r=16, lora_alpha=16, use_rslora=True, target_modules=["embed", "first", "second"],
        alpha_pattern={"first": 5}, rank_pattern={"second": 3},
    )  # fmt: skip
    model = get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        want = model.eval()(ids).numpy()
    rmm.convert({"t": tmp_path / "adapter"}, tmp_path / "t.rmm", exact=True)
    with rmm.open(tmp_path / "t.rmm") as collection:
        scales = {name: info.scale for name, info in collection.targets("t").items()}
        assert scales == pytest.approx({"embed": 4.0, "first": 5 / 4, "second": 16 / 3**0.5})
        feeds = {"ids": ids.numpy()}
        session = runtime.Session(path, collection)
        assert np.abs(session.run("t", feeds)[0] - want).max() < 1e-4
        assert np.abs(session.run(None, feeds)[0] - want).max() > 0.1
        runtime.merge(path, collection, "t", tmp_path / "merged.onnx")
        assert np.abs(run(tmp_path / "merged.onnx", feeds) - want).max() < 1e-4
        runtime.prepare(path, tmp_path / "prepared.onnx", collection=collection)
        with runtime.adapter_file(collection, "t", tmp_path / "prepared.onnx") as file:
            got = with_adapter(tmp_path / "prepared.onnx", file, feeds)
        assert np.abs(got - want).max() < 1e-4


# --- heads --------------------------------------------------------------------------------------


def test_heads_of_different_sizes_are_run_with_their_tasks(headed: Path, tmp_path: Path) -> None:
    made = [head_task("two", 2), head_task("five", 5), head_task("part", 3, bias=False)]
    collection = collection_of(tmp_path, *(task for task, _ in made))
    before = run(headed, {"x": X2})
    session = runtime.Session(headed, collection)
    for task, want in made + made[::-1]:
        (got,) = session.run(task.name, {"x": X2})
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-4
        assert session.run(None, {"x": X2})[0].tobytes() == before.tobytes()
        assert not session.privates(task.name)
    for task, want in made:
        runtime.merge(headed, collection, task.name, tmp_path / "merged.onnx", force=True)
        assert np.abs(run(tmp_path / "merged.onnx", {"x": X2}) - want).max() < 1e-4


def test_a_head_that_the_model_lacks_is_offered_and_never_dropped_in_silence(
    base: Path, tmp_path: Path
) -> None:
    task, want = head_task("five", 5)
    collection = collection_of(tmp_path, task)
    session = runtime.Session(base, collection)
    with pytest.raises(LossyConversionError, match=r"'head\.(bias|weight)', which the model"):
        session.run("five", {"x": X2})
    with pytest.raises(LossyConversionError, match="has no place"):
        runtime.merge(base, collection, "five", tmp_path / "merged.onnx")
    session = runtime.Session(base, collection, drop_private=True)
    (hidden,) = session.run("five", {"x": X2})
    head = session.privates("five")
    logits = hidden @ head["head.weight"].astype(np.float32).T + head["head.bias"]
    assert np.abs(logits - want).max() < 1e-4


def anonymous_head(bias: str) -> onnx.ModelProto:
    """A head whose weight is turned and has no name of its own."""
    model = network(head=True)
    del model.graph.node[-1]
    turned = np.ascontiguousarray(W2[:3].T)
    model.graph.initializer.append(onnx.numpy_helper.from_array(turned, "onnx::MatMul_9"))
    model.graph.node.append(node("MatMul", "h onnx::MatMul_9", "m", "/head/MatMul"))
    model.graph.node.append(node("Add", f"m {bias}", "y"))
    for item in model.graph.initializer:
        item.name = {"head.bias": bias, "head.weight": "unused"}.get(item.name, item.name)
    return model


def test_a_head_without_a_weight_of_its_name_is_replaced_as_a_whole(tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    onnx.save(anonymous_head("head.bias"), base)
    made = [head_task("two", 2), head_task("five", 5)]
    collection = collection_of(tmp_path, *(task for task, _ in made))
    report = runtime.prepare(base, tmp_path / "p.onnx", collection=collection)
    assert set(report.parameters) == {"head.weight", "head.bias"}
    assert not report.left
    onnx.checker.check_model(str(tmp_path / "p.onnx"))
    session = runtime.Session(tmp_path / "p.onnx", collection)
    before = run(base, {"x": X2})
    for task, want in made + made:
        (got,) = session.run(task.name, {"x": X2})
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-4
        assert session.run(None, {"x": X2})[0].tobytes() == before.tobytes()
    with pytest.raises(LossyConversionError, match="has no place"):
        runtime.merge(base, collection, "five", tmp_path / "merged.onnx")


def test_half_a_head_is_left_whole(tmp_path: Path) -> None:
    """Where a task gives no bias, and the model has one, nothing is replaced."""
    base = tmp_path / "base.onnx"
    onnx.save(anonymous_head("head.bias"), base)
    task, _ = head_task("three", 3, bias=False)
    collection = collection_of(tmp_path, task)
    report = runtime.prepare(base, tmp_path / "p.onnx", collection=collection)
    assert report.parameters == ()
    assert report.left == {"head.weight": "no initialiser has its name"}
    session = runtime.Session(base, collection, drop_private=True)
    assert set(session.privates("three")) == {"head.weight"}
    (got,) = session.run("three", {"x": X2})
    want = expected(delta(factors(3))) @ W2[:3].T + BIAS[:3]  # the base's own head
    assert np.abs(got - want).max() < 1e-5
    # And where only the bias has a place, it is not replaced alone.
    model = anonymous_head("head.bias")
    model.graph.node[-2].name = "somewhere"
    model.graph.node[-1].CopyFrom(node("Sub", "m head.bias", "y"))
    onnx.save(model, base)
    collection = collection_of(tmp_path, head_task("three", 3)[0])
    report = runtime.prepare(base, tmp_path / "q.onnx", collection=collection)
    assert set(report.left) == {"head.weight", "head.bias"}
    assert report.parameters == ()


def test_magnitudes_have_no_place_in_a_graph(base: Path, tmp_path: Path) -> None:
    values = {"first.magnitude": (Role.MAGNITUDE, np.ones(N_OUT, np.float32))}
    collection = collection_of(tmp_path, Task("dora", {"first": factors()}, privates=values))
    report = runtime.prepare(base, tmp_path / "p.onnx", collection=collection)
    assert report.left == {"first.magnitude": "a magnitude has no place in the graph"}
    with pytest.raises(LossyConversionError, match="magnitude"):
        runtime.Session(tmp_path / "p.onnx", collection).run("dora", {"x": X2})
    with pytest.raises(LossyConversionError, match="takes no magnitude"):
        get_exporter("onnx").export(collection.source("dora"), tmp_path / "d.onnx_adapter")


# --- what a caller may get wrong ------------------------------------------------------------------


def test_feeds_are_checked(base: Path, tmp_path: Path) -> None:
    collection = collection_of(tmp_path, Task("t", {"first": factors()}))
    session = runtime.Session(base, collection)
    cases: list[tuple[Any, dict[str, Any], Any, type[RmmError], str]] = [
        ("t", {}, None, OptionError, "input 'x' of the model is not fed"),
        ("t", {"x": X2, "z": X2}, None, NotFoundError, "no input 'z'"),
        ("t", {"x": X2, "first.lora_A": X2}, None, OptionError, "belongs to the task"),
        ("t", {"x": X2}, ["z"], NotFoundError, "no output 'z'"),
        ("u", {"x": X2}, None, NotFoundError, "no task is called 'u'"),
        ("t", {"x": X2.astype(np.float64)}, None, RmmError, "cannot run task 't'"),
        (None, {"x": X2[:, :5]}, None, RmmError, "cannot run the base model"),
    ]
    for task, feeds, outputs, error, message in cases:
        with pytest.raises(error, match=message):
            session.run(task, feeds, outputs)
        assert np.abs(session.run("t", {"x": X2})[0] - expected(delta(factors()))).max() < 1e-5


def test_memory_of_tasks_goes_when_the_session_does(base: Path, tmp_path: Path) -> None:
    import weakref

    collection = collection_of(tmp_path, *(Task(f"t{i}", {"first": factors(i)}) for i in range(3)))
    session = runtime.Session(base, collection, budget_bytes=0)
    results = [session.run(f"t{i}", {"x": X2})[0] for i in range(3)]
    assert not session._bounds  # none fits, none is kept
    for i, got in enumerate(results):
        assert np.abs(got - expected(delta(factors(i)))).max() < 1e-5
    session = runtime.Session(base, collection)
    session.run("t0", {"x": X2})
    kept = weakref.ref(session.cache.get("t0"))
    del session
    gc.collect()
    assert kept() is None


def test_without_a_budget_one_place_is_written_over(base: Path, tmp_path: Path) -> None:
    import threading

    tasks = [Task(f"t{i}", {"first": factors(i)}) for i in range(3)]
    strange = Task("strange", {"elsewhere": factors(9)})
    collection = collection_of(tmp_path, *tasks, strange)
    prepared = tmp_path / "prepared.onnx"
    runtime.prepare(base, prepared, targets=["first"])
    session = runtime.Session(prepared, collection, budget_bytes=0)
    kept = runtime.Session(prepared, collection)
    want = {f"t{i}": kept.run(f"t{i}", {"x": X2})[0].tobytes() for i in range(3)}
    assert session.run("t0", {"x": X2})[0].tobytes() == want["t0"]
    bound, arena = session._live._bound, session._live._loaded.arena
    for task in ("t1", "t1", "t2", "t0"):
        assert session.run(task, {"x": X2})[0].tobytes() == want[task]
        assert session._live._bound is bound
        assert session._live._loaded.arena is arena
    assert session.run(None, {"x": X2})[0].tobytes() == kept.run(None, {"x": X2})[0].tobytes()
    for _ in range(2):  # a task that is refused leaves no half of it behind
        with pytest.raises(NotFoundError, match="elsewhere"):
            session.run("strange", {"x": X2})
        assert session.run("t2", {"x": X2})[0].tobytes() == want["t2"]
    wrong: list[str] = []

    def work(start: int) -> None:
        for step in range(20):
            task = f"t{(start + step) % 3}"
            if session.run(task, {"x": X2})[0].tobytes() != want[task]:
                wrong.append(task)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_ort_value_can_be_fed(base: Path, tmp_path: Path) -> None:
    collection = collection_of(tmp_path, Task("t", {"first": factors()}))
    session = runtime.Session(base, collection)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(X2)
    (got,) = session.run("t", {"x": value}, ["y"])
    assert got.tobytes() == session.run("t", {"x": X2})[0].tobytes()


def test_inputs_of_another_dtype_than_the_activations(base: Path, tmp_path: Path) -> None:
    f = factors()
    collection = collection_of(tmp_path, Task("t", {"first": f}))
    for dtype, tolerance in (("f16", 2e-3), ("bf16", 2e-2)):
        path = tmp_path / f"{dtype}.onnx"
        report = runtime.prepare(base, path, collection=collection, dtype=dtype)
        assert report.dtype == dtype
        assert run(path, {"x": X2}).tobytes() == run(base, {"x": X2}).tobytes()
        (got,) = runtime.Session(path, collection).run("t", {"x": X2})
        assert 0 < np.abs(got - expected(delta(f))).max() < tolerance
        with runtime.adapter_file(collection, "t", path) as file:
            assert with_adapter(path, file, {"x": X2}).tobytes() == got.tobytes()
    with pytest.raises(OptionError, match="'f64' is not one of"):
        runtime.prepare(base, tmp_path / "x.onnx", collection=collection, dtype="f64")


def test_a_prepared_model_needs_no_onnx(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = factors()
    collection = collection_of(tmp_path, Task("t", {"first": f}))
    runtime.prepare(base, tmp_path / "p.onnx", collection=collection)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnx" else NotImplemented
    )
    (got,) = runtime.Session(tmp_path / "p.onnx", collection).run("t", {"x": X2})
    assert np.abs(got - expected(delta(f))).max() < 1e-5
    for act in (
        lambda: runtime.Session(base, collection),
        lambda: runtime.prepare(base, tmp_path / "q.onnx", collection=collection),
    ):
        with pytest.raises(UnsupportedError, match="onnx, which is not installed"):
            act()


def test_targets_of_a_prepared_model_match_by_prefix_and_by_name(tmp_path: Path) -> None:
    model = network()
    for item in model.graph.initializer:
        old, item.name = item.name, f"net.{item.name}"
        for user in model.graph.node:
            user.input[:] = [item.name if name == old else name for name in user.input]
    onnx.save(model, tmp_path / "base.onnx")
    runtime.prepare(tmp_path / "base.onnx", tmp_path / "p.onnx", targets=["first", "second"])
    f = factors()
    collection = collection_of(tmp_path, Task("t", {"first": f}), Task("u", {"other": f}))
    session = runtime.Session(tmp_path / "p.onnx", collection)
    assert np.abs(session.run("t", {"x": X2})[0] - expected(delta(f))).max() < 1e-5
    with pytest.raises(NotFoundError, match="no inputs for target 'other'"):
        session.run("u", {"x": X2})
    session = runtime.Session(tmp_path / "p.onnx", collection, names={"other": "net.first"})
    assert np.abs(session.run("u", {"x": X2})[0] - expected(delta(f))).max() < 1e-5
    session = runtime.Session(tmp_path / "p.onnx", collection, names={"other": "net.second"})
    with pytest.raises(SourceError, match="32 inputs and 16 outputs, the model has 16 and 16"):
        session.run("u", {"x": X2})


def test_values_too_large_for_the_model_s_dtype_are_no_infinities(
    base: Path, tmp_path: Path
) -> None:
    f = factors()
    f.A[0, 0] = 1e6
    collection = collection_of(tmp_path, Task("t", {"first": f}))
    runtime.prepare(base, tmp_path / "p.onnx", collection=collection, dtype="f16")
    with pytest.raises(LossyConversionError, match="too large for f16"):
        runtime.Session(tmp_path / "p.onnx", collection).run("t", {"x": X2})
    lent = runtime.adapter_file(collection, "t", tmp_path / "p.onnx")
    with pytest.raises(LossyConversionError, match="too large"), lent:
        pass


def test_a_task_is_reconstructed_and_bound_ahead(base: Path, tmp_path: Path) -> None:
    made = {"a": factors(1, 4, 2.0), "b": factors(2, 4, 0.5)}
    collection = collection_of(tmp_path, *(Task(t, {"first": f}) for t, f in made.items()))
    session = runtime.Session(base, collection)
    session.prefetch("b")
    session.prefetch("b")
    deadline = time.monotonic() + 30
    while not session._bounds and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(session._bounds) == 1
    assert session.cache.stats.loads == 1
    (got,) = session.run("b", {"x": X2})
    assert np.abs(got - expected(first=delta(made["b"]))).max() < 1e-5
    assert (session.cache.stats.loads, len(session._bounds)) == (1, 1)
    session.prefetch("c")
    with pytest.raises(NotFoundError, match="'c'"):
        session.run("c", {"x": X2})
    with pytest.raises(OptionError, match="budget_bytes=0"):
        runtime.Session(base, collection, budget_bytes=0).prefetch("a")


def test_damaged_models_are_one_error_each(headed: Path, tmp_path: Path) -> None:
    """Bytes of a model changed at random: an error of ours, or a model that is still one."""
    task, _ = head_task("five", 5)
    collection = collection_of(tmp_path, task)
    whole = headed.read_bytes()
    start = whole.find(W.tobytes()[:64])
    places = [*range(start), *range(start + W.nbytes, len(whole))]  # its values may be anything
    rng = np.random.default_rng(0)
    path, out = tmp_path / "bad.onnx", tmp_path / "out.onnx"
    errors: list[RmmError] = []
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.choice(places, rng.integers(1, 4)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        with suppressed(errors):
            runtime.prepare(path, out, collection=collection, force=True)
        with suppressed(errors):
            runtime.merge(path, collection, "five", out, force=True)
    assert len(errors) > 200
    assert not [error for error in errors if isinstance(error, InternalError)]


@contextlib.contextmanager
def suppressed(errors: list[RmmError]) -> Iterator[None]:
    try:
        yield
    except RmmError as error:
        errors.append(error)
