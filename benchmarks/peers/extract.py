"""Adapters out of full fine-tunes (PT-SVD): beside mergekit-extract-lora, at equal rank.

The model is a Llama of four layers, bfloat16, made here; the fine-tune changes all weights of its
linear layers as benchmarks/ptsvd.py does.  mergekit decomposes each difference whole
(`torch.linalg.svd`), here a random subspace is iterated where that pays.  Both are whole programs,
with both processors; what is left out is measured on what they wrote, against the difference of the
two stored models.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from measure import available, cpus, run_program
from ptsvd import change, shapes
from report import Column, Table
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from setting import Setting

import rmmformat as rmm

RANK = 16
SIZES = {"width": 1024, "inner": 2816, "layers": 4}
QUICK = {"width": 128, "inner": 256, "layers": 1}
RMM = "rmmformat.cli.main:main"
MERGEKIT = "mergekit.scripts.extract_lora:main"


def tables(setting: Setting) -> list[Table]:
    sizes = QUICK if setting.quick else SIZES
    root = setting.folder("extract")
    write_models(root, **sizes)
    table = Table(
        "extract",
        f"PT-SVD of rank {RANK}: {7 * sizes['layers']} matrices of a model {sizes['width']} wide, "
        f"bfloat16, {len(cpus())} threads",
        "program",
        (
            Column("seconds", "seconds"),
            Column("work", "without imports"),
            Column("cpu", "CPU, s"),
            Column("ratio", "CPU, times ours"),
            Column("peak", "peak MiB", ".0f"),
            Column("bytes", "MB written"),
            Column("error", "left out, %", ".3f"),
        ),
    )
    ours = ("convert", f"{root}/tuned", "--base", f"{root}/base", "--rank", RANK, "--force")
    ways = {
        "rmm, factors in f32": ("--exact",),
        "rmm, factors in bf16": ("--encoding", "bf16"),
        "rmm, planned to 5 %": ("--max-error", "5%"),
        "rmm, f32, whole decompositions": ("--exact", "--svd", "exact"),
    }
    for name, how in ways.items():
        out = root / "x.rmm"
        program = run_program(RMM, [*ours, *how, "-o", out], len(cpus()))
        with rmm.open(out) as collection:
            task = collection.load(collection.tasks[0])
            found = {name: (task[name].A, task[name].scale * task[name].B) for name in task}
            error = left_out(root, found)
        table.put(
            name,
            seconds=program.seconds,
            work=program.seconds - program.importing,
            cpu=program.cpu,
            peak=program.peak / 2**20,
            bytes=out.stat().st_size / 1e6,
            error=error,
        )
    if available("mergekit"):
        words = ["--model", root / "tuned" / "task0", "--base-model", root / "base"]
        # Only what ours looks at, too: the linear layers.
        words += ["--max-rank", RANK, "--out-path", root / "theirs", "--skip-undecomposable"]
        words += ["--exclude-regex", "embed_tokens", "--exclude-regex", "lm_head"]
        program = run_program(MERGEKIT, words, len(cpus()))
        file = root / "theirs" / "adapter_model.safetensors"
        tensors = {key: value.astype(np.float32) for key, value in load_file(file).items()}
        names = {key.split(".lora_")[0] for key in tensors}
        found = {
            name.removeprefix("base_model.model."): (
                tensors[f"{name}.lora_A.weight"],
                tensors[f"{name}.lora_B.weight"],
            )
            for name in names
        }
        table.put(
            "mergekit-extract-lora",
            seconds=program.seconds,
            work=program.seconds - program.importing,
            cpu=program.cpu,
            peak=program.peak / 2**20,
            bytes=file.stat().st_size / 1e6,
            error=left_out(root, found),
        )
    else:
        table.notes.append("mergekit is not installed.")
    table.compare("rmm, factors in f32", "cpu")
    return [table]


def write_models(root: Path, width: int, inner: int, layers: int) -> None:
    """Write a base and one fine-tune, as transformers saves them."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    random = np.random.default_rng(0)
    words = 512
    base: dict[str, np.ndarray] = {}
    changed: list[str] = []
    for layer in range(layers):
        for name, shape in shapes(width, inner).items():
            name = name.replace("layers.0", f"layers.{layer}")
            base[name] = 0.02 * random.standard_normal(shape, dtype=np.float32)
            changed.append(name)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = np.ones(width, np.float32)
    base["model.norm.weight"] = np.ones(width, np.float32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = 0.02 * random.standard_normal((words, width), dtype=np.float32)
    base = {name: value.astype(bfloat16) for name, value in base.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": words,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    tuned = dict(base)
    for number, name in enumerate(changed):
        new = base[name].astype(np.float32) + change(base[name].shape, number)
        tuned[name] = new.astype(bfloat16)
    for folder, tensors in ((root / "base", base), (root / "tuned" / "task0", tuned)):
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))


def left_out(root: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Root of the squares left out, over those of all changes, in per cent."""
    rest = whole = 0.0
    files = (root / "base", root / "tuned" / "task0")
    paths = [folder / "model.safetensors" for folder in files]
    with safe_open(paths[0], "numpy") as base, safe_open(paths[1], "numpy") as tuned:
        names = [n for n in base.keys() if ".layers." in n and "norm" not in n]  # noqa: SIM118
        assert {n.removesuffix(".weight") for n in names} == set(factors)
        for name in names:
            delta = tuned.get_tensor(name).astype(np.float64) - base.get_tensor(name).astype(
                np.float64
            )
            A, B = factors[name.removesuffix(".weight")]
            rest += float(np.sum((delta - B.astype(np.float64) @ A.astype(np.float64)) ** 2))
            whole += float(np.sum(delta**2))
    return 100 * (rest / whole) ** 0.5
