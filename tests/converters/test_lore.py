"""Fine-tunes of an unknown base: the estimate, the deltas, and what becomes of everything else."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import rmmformat as rmm
from rmmformat.cli.main import main
from rmmformat.converters import Options, collect, detect, get_importer
from rmmformat.converters import lore_run as module
from rmmformat.converters.checkpoint_store import open_checkpoint
from rmmformat.converters.lore_base import write_model
from rmmformat.errors import NonFiniteError, OptionError, RmmError, SourceError
from rmmformat.model import Role

QUERY, KEY, EMBED = "layers.0.query", "layers.0.key", "embed_tokens"
NORM, BIAS, HEAD = "norm.weight", "layers.0.query.bias", "classifier.weight"


def values(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = {
    f"{QUERY}.weight": values(1, 16, 24),
    f"{KEY}.weight": values(2, 16, 24),
    f"{EMBED}.weight": values(3, 30, 16),
    NORM: values(4, 16),
    BIAS: values(5, 16),
}


def fine_tune(seed, *, dtype=np.float32, **more):
    """Two matrices changed by rank 2, a norm and a bias; the key matrix as it was."""
    tensors = dict(BASE)
    for n, name in enumerate((f"{QUERY}.weight", f"{EMBED}.weight")):
        rows, columns = BASE[name].shape
        tensors[name] = BASE[name] + 0.2 * values(seed + n, rows, 2) @ values(
            seed + n + 50, 2, columns
        )
    tensors[NORM] = BASE[NORM] + 0.1 * seed
    tensors[BIAS] = BASE[BIAS] - 0.1 * seed
    tensors.update(more)
    return {name: array.astype(dtype) for name, array in tensors.items()}


def write(folder, tensors, config=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "bert"}))
    save_file(
        {name: np.ascontiguousarray(a) for name, a in tensors.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture
def models(tmp_path):
    for n, name in enumerate(("cooking", "law", "poems"), 1):
        write(tmp_path / "models" / name, fine_tune(10 * n))
    return tmp_path / "models"


def opened(path, base, **options):
    return get_importer("lore").open(path, options=Options(write_base=base, **options))


def delta(task, target):
    factors = task.factors(target)
    return factors.scale * factors.B.astype(np.float64) @ factors.A.astype(np.float64)


# --- the mathematics, through files -----------------------------------------------------------


def test_base_and_delta_give_every_model_back(models, tmp_path):
    tasks = opened(models, tmp_path / "base", mu=1e-4)
    tasks[0].prepare()
    base = load_file(tmp_path / "base" / "model.safetensors")
    for task in tasks:
        tuned = load_file(models / task.name / "model.safetensors")
        off = total = distance = 0.0
        for target in task.targets:
            weight = tuned[f"{target}.weight"].astype(np.float64)
            change = delta(task, target)
            change = change.T if target == EMBED else change
            left = weight - base[f"{target}.weight"] - change
            off += np.linalg.norm(left) ** 2
            total += np.linalg.norm(weight) ** 2
            distance += np.linalg.norm(weight - base[f"{target}.weight"]) ** 2
        error = np.sqrt(off / total)
        assert error < 1e-4
        said = task.extraction()
        assert said["model_error"] == pytest.approx(error, rel=1e-3)
        assert said["error"] == pytest.approx(np.sqrt(off / distance), rel=1e-3)
        assert said["error"] <= said["max"]


@pytest.mark.parametrize("mu", [0.01, 0.3])
def test_objective_falls_at_every_step_and_is_what_it_says(models, tmp_path, mu):
    tasks = opened(models, tmp_path / "base", mu=mu, steps=12)
    tasks[0].prepare()
    objective = tasks[0]._run.objective
    assert len(objective) > 3
    assert all(later <= earlier for earlier, later in itertools.pairwise(objective))
    assert objective[-1] < objective[0]
    base = load_file(tmp_path / "base" / "model.safetensors")
    value = 0.0
    for task in tasks:
        tuned = load_file(models / task.name / "model.safetensors")
        for target in (QUERY, EMBED):
            change = delta(task, target) if target in task.targets else np.zeros((1, 1))
            change = change.T if target == EMBED else change
            gap = base[f"{target}.weight"].astype(np.float64) + change - tuned[f"{target}.weight"]
            value += 0.5 * np.linalg.norm(gap) ** 2 + mu * np.linalg.norm(change, "nuc")
    assert value == pytest.approx(objective[-1], rel=1e-5)
    assert tasks[0].extraction()["objective"] == pytest.approx(
        [objective[0], objective[-1]], rel=1e-5
    )
    (line,) = [line for line in tasks[0].ledger if line.item == "base model"]
    assert f"objective {objective[0]:.6g} to {objective[-1]:.6g}" in line.detail
    assert line.detail.startswith("notice:")


def test_rank_mu_steps_and_weight_do_what_they_say(models, tmp_path):
    ranks = {}
    for mu in (0.01, 0.5, 1e6):
        task = opened(models, tmp_path / "base", mu=mu)[0]
        ranks[mu] = task.targets[QUERY].rank if QUERY in task.targets else 0
    assert ranks[0.01] > ranks[0.5] > ranks[1e6] == 0
    cut = opened(models, tmp_path / "base", rank=1)[0]
    full = opened(models, tmp_path / "base")[0]
    assert cut.targets[QUERY].rank == 1
    u, s, v = np.linalg.svd(delta(full, QUERY))
    np.testing.assert_allclose(delta(cut, QUERY), s[0] * np.outer(u[:, 0], v[0]), atol=1e-5)
    half = opened(models, tmp_path / "base", weight=0.5)[0]
    assert half.targets[QUERY].scale == 0.5
    np.testing.assert_allclose(delta(half, QUERY), 0.5 * delta(full, QUERY))
    short = opened(models, tmp_path / "base", steps=1)[0]
    short.prepare()
    assert len(short._run.objective) == 2


# --- what becomes of which tensor -------------------------------------------------------------


def test_every_tensor_has_its_place(models, tmp_path):
    write(tmp_path / "models" / "wide", fine_tune(40, **{HEAD: values(9, 5, 16)}))
    tasks = {task.name: task for task in opened(models, tmp_path / "base")}
    base = load_file(tmp_path / "base" / "model.safetensors") if tasks["law"].targets else {}
    sources = {name: load_file(models / name / "model.safetensors") for name in tasks}
    np.testing.assert_array_equal(base[f"{KEY}.weight"], BASE[f"{KEY}.weight"])
    for name in (NORM, BIAS):
        mean = np.mean([s[name].astype(np.float64) for s in sources.values()], axis=0)
        np.testing.assert_allclose(base[name], mean, rtol=1e-6)
    assert HEAD not in base
    for name, task in tasks.items():
        assert set(task.targets) == {QUERY, EMBED}
        roles = {private: info.role for private, info in task.privates.items()}
        assert roles == {
            NORM: Role.MODULE,
            BIAS: Role.BIAS,
            **({HEAD: Role.MODULE} if name == "wide" else {}),
        }
        for private in roles:
            np.testing.assert_array_equal(task.private_tensor(private), sources[name][private])
    text = (tmp_path / "base" / "config.json").read_text()
    assert text == (models / "cooking" / "config.json").read_text()


def test_heads_of_other_sizes_are_kept_by_their_tasks(models, tmp_path):
    for n, name in enumerate(("a", "b")):
        write(tmp_path / "heads" / name, fine_tune(10 * n, **{HEAD: values(n, 2 + n, 16)}))
    tasks = opened(tmp_path / "heads", tmp_path / "base")
    assert [task.privates[HEAD].shape for task in tasks] == [(2, 16), (3, 16)]
    assert HEAD not in load_file(tmp_path / "base" / "model.safetensors")


def test_embedding_that_is_the_output_weight_is_kept_whole(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    for n, name in enumerate(("a", "b")):
        write(tmp_path / "tied" / name, fine_tune(10 * n + 1), config)
    task = opened(tmp_path / "tied", tmp_path / "base")[0]
    assert set(task.targets) == {QUERY}
    assert f"{EMBED}.weight" in task.privates
    (line,) = [line for line in task.ledger if line.item == f"tensor {EMBED}.weight"]
    assert "tied to the output weight" in line.detail


def test_private_tensors_dropped_on_request_are_said(models, tmp_path):
    task = opened(models, tmp_path / "base", drop_private=True)[0]
    assert not task.privates
    dropped = {line.item for line in task.ledger if "left out on request" in line.detail}
    assert dropped == {f"tensor {NORM}", f"tensor {BIAS}"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_base_has_the_models_dtype(tmp_path, dtype):
    for n, name in enumerate(("a", "b")):
        write(tmp_path / "models" / name, fine_tune(10 * n + 1, dtype=dtype))
    tasks = opened(tmp_path / "models", tmp_path / "base")
    tasks[0].prepare()
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert {array.dtype for array in base.values()} == {np.dtype(dtype)}
    # What the base loses by rounding, no delta makes up for: the error says so.
    bound = 2.0 ** (-8 if dtype is ml_dtypes.bfloat16 else -11)
    assert tasks[0].extraction()["model_error"] < 3 * bound


# --- the file of the base ---------------------------------------------------------------------


def test_large_bases_are_written_in_shards(models, tmp_path, monkeypatch):
    opened(models, tmp_path / "one")[0].prepare()
    monkeypatch.setattr(module, "write_model", lambda *given: write_model(*given, shard_bytes=2000))
    opened(models, tmp_path / "many")[0].prepare()
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert names[0] == "config.json"
    assert "model-00001-of-00003.safetensors" in names
    assert "model.safetensors.index.json" in names
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert many.metas.keys() == one.metas.keys()
    for name in one.metas:
        np.testing.assert_array_equal(many.read(name), one.read(name))


def test_an_estimate_is_replaced_and_a_model_is_not(models, tmp_path):
    opened(models, tmp_path / "base")[0].prepare()
    first = (tmp_path / "base" / "model.safetensors").read_bytes()
    opened(models, tmp_path / "base")[0].prepare()
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == first
    kept = write(tmp_path / "mine", fine_tune(1))
    before = (kept / "model.safetensors").read_bytes()
    with pytest.raises(RmmError, match="holds a model that is no estimate"):
        opened(models, kept)[0].prepare()
    assert (kept / "model.safetensors").read_bytes() == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(RmmError, match=r"thesis\.tex"):
        opened(models, tmp_path / "home")[0].prepare()


def test_error_half_way_leaves_no_base_and_can_be_tried_again(models, tmp_path, monkeypatch):
    calls = []
    real = module.lore

    def failing(*given, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*given, **options)

    monkeypatch.setattr(module, "lore", failing)
    task = opened(models, tmp_path / "base")[0]
    with pytest.raises(RmmError, match="No space left"):
        task.prepare()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    task.prepare()
    assert set(task.targets) == {QUERY, EMBED}


def test_memory_is_that_of_a_few_tensors(tmp_path):
    sides, count = 192, 24
    for n in range(3):
        tensors = {f"layers.{i}.q.weight": values(100 * n + i, sides, sides) for i in range(count)}
        write(tmp_path / "models" / str(n), tensors)
    tasks = opened(tmp_path / "models", tmp_path / "base", steps=2, mu=5.0)
    tracemalloc.start()
    try:
        tasks[0].prepare()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    one = sides * sides * 8
    # Factors of one weight, three models' of nearly full rank, are the most of it.
    assert peak < 20 * one < count * one
    assert len(tasks[0].targets) == count


# --- through the product ----------------------------------------------------------------------


def test_convert_and_put_together_again(models, tmp_path):
    base, out = tmp_path / "base", tmp_path / "skills.rmm"
    arguments = [
        *("convert", str(models / "cooking"), str(models / "law"), f"verse={models / 'poems'}"),
        *("--from", "lore", "--write-base", str(base), "-o", str(out), "--exact"),
        *("--mu", "0.001", "--steps", "30"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert rmm.validate(out).ok
    estimate = load_file(base / "model.safetensors")
    with rmm.open(out) as collection:
        assert collection.tasks == ("cooking", "law", "verse")
        assert collection.metadata["base_model"]["id"].startswith("lore:")
        about = collection.metadata["tasks"]["verse"]["extraction"]
        assert (about["method"], about["mu"], about["steps"]) == ("lore", 0.001, 30)
        assert about["objective"][1] < about["objective"][0]
        factors = collection.load("verse")[QUERY]
        weight = estimate[f"{QUERY}.weight"] + factors.scale * factors.B @ factors.A
        tuned = load_file(models / "poems" / "model.safetensors")[f"{QUERY}.weight"]
        assert np.linalg.norm(weight - tuned) < 2e-3 * np.linalg.norm(tuned)
        np.testing.assert_array_equal(
            collection.privates("verse")[NORM],
            load_file(models / "poems" / "model.safetensors")[NORM],
        )


def test_a_later_fine_tune_joins_beside_the_estimate(models, tmp_path):
    base, out = tmp_path / "base", tmp_path / "skills.rmm"
    estimated = Options(write_base=base)
    rmm.convert(models, out, exact=True, kind="lore", options=estimated)
    late = write(tmp_path / "late", fine_tune(70))
    rmm.add(out, late, exact=True, options=Options(base=base, rank=16))
    with rmm.open(out) as collection:
        assert collection.tasks == ("cooking", "late", "law", "poems")
        assert collection.metadata["base_model"]["fingerprint"]
        factors = collection.load("late")[QUERY]
        weight = load_file(base / "model.safetensors")[f"{QUERY}.weight"]
        np.testing.assert_allclose(
            weight + factors.scale * factors.B @ factors.A,
            load_file(late / "model.safetensors")[f"{QUERY}.weight"],
            atol=1e-4,
        )
    # Another estimate is another base.
    write(tmp_path / "others" / "a", fine_tune(80))
    write(tmp_path / "others" / "b", fine_tune(90))
    other = Options(write_base=tmp_path / "other-base")
    with pytest.raises(RmmError, match="base with other weights"):
        rmm.add(out, tmp_path / "others", exact=True, kind="lore", options=other)


def test_it_is_never_detected(models, tmp_path):
    assert not get_importer("lore").detect(models)
    assert detect(models) == "checkpoint"


def test_what_cannot_be_read_together(models, tmp_path):
    with pytest.raises(OptionError, match="--write-base"):
        get_importer("lore").open(models)
    with pytest.raises(SourceError, match=r"two or more.*--base"):
        opened(models / "law", tmp_path / "base")
    with pytest.raises(SourceError, match="can name only one"):
        collect([("x", models)], fmt="lore", options=Options(write_base=tmp_path / "base"))
    for wrong in ({"mu": -1.0}, {"mu": float("nan")}, {"steps": 0}, {"weight": float("inf")}):
        with pytest.raises(OptionError, match="out of range"):
            opened(models, tmp_path / "base", **wrong)
    with pytest.raises(SourceError, match="no model weights"):
        opened(tmp_path / "absent", tmp_path / "base")
    other = {"layers.7.query.weight": values(1, 4, 4)}
    write(models / "other", other)
    with pytest.raises(SourceError, match=r"layers\.\d\.\w+\.\w+' is in a layer"):
        opened(models, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_layers_of_another_shape_are_named(models, tmp_path):
    write(models / "wider", {**fine_tune(1), f"{QUERY}.weight": values(1, 16, 32)})
    with pytest.raises(SourceError, match=rf"{QUERY}\.weight' has shape"):
        opened(models, tmp_path / "base")


def test_nan_is_refused(models, tmp_path):
    broken = fine_tune(1)
    broken[f"{QUERY}.weight"][0, 0] = np.nan
    write(models / "broken", broken)
    with pytest.raises(NonFiniteError, match=rf"{QUERY}\.weight.*1 of 384"):
        opened(models, tmp_path / "base")[0].prepare()
    assert not (tmp_path / "base").exists()
