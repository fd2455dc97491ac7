"""Train one LoRA adapter and one full fine-tune a task; both end as PEFT adapter folders.

    python benchmarks/tasks/train.py --out build/tasks

`OUT/lora/TASK` is a rank-16 LoRA adapter of every linear weight.  `OUT/ptsvd/TASK` is the rank-16
truncated SVD of what a full fine-tune changed (post-training SVD, arXiv 2510.14163): all linear
weights of the encoder and the head are trained, the rest stays as it is, so that the deltas are all
that the two models differ in.  Each task has its own seed unless --one-seed is given.

A folder appears when its training is done, and what is there is not trained again;
OUT/training.jsonl has a line for each, with its options and its held-out accuracy.  Several are
trained at a time, each on one thread, so the result does not depend on how many.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import data
import evaluate
import model as encoder
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

RANK, ALPHA = 16, 32
#: Batches whose texts are sorted together by length.
POOL = 10
#: Steps of tasks that need fewer than --steps.
EASY = {"bbc": 0.5, "spam": 0.5}


def batches(lengths: list[int], rng: random.Random) -> Iterator[list[int]]:
    """Rows for each step, without end: shuffled, then of alike length within a pool of batches."""
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        size = POOL * encoder.BATCH
        found = []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=lengths.__getitem__)
            found += [pool[at : at + encoder.BATCH] for at in range(0, len(pool), encoder.BATCH)]
        rng.shuffle(found)
        yield from found


def fit(model: Any, rows: data.Rows, steps: int, rate: float, seed: int) -> None:
    """Train in place: AdamW, the rate falling linearly to zero."""
    rng = random.Random(seed)  # noqa: S311  # a reproducible order, no secret
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1.0 - step / steps)
    )
    model.train()
    ids = encoder.tokens(rows)
    source = batches([len(row) for row in ids], rng)
    for _ in range(steps):
        batch = next(source)
        labels = torch.tensor([rows[row][1] for row in batch])
        loss = model(**encoder.pad([ids[row] for row in batch]), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def lora(task: str, classes: int, rows: data.Rows, out: Path, steps: int, seed: int) -> list[float]:
    """Train and save a LoRA adapter; its accuracy."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(encoder.LINEAR), task_type="SEQ_CLS"
    )
    model = get_peft_model(encoder.fresh(classes), config)
    fit(model, rows, steps, 1e-3, seed)
    model.save_pretrained(str(out))
    config_path = out / "adapter_config.json"  # the model's name, not the folder it was read from
    fields = json.loads(config_path.read_text())
    fields["base_model_name_or_path"] = "sentence-transformers/all-MiniLM-L6-v2"
    config_path.write_text(json.dumps(fields, indent=2))
    return [evaluate.accuracy(model, task)]


def full(task: str, classes: int, rows: data.Rows, out: Path, steps: int, seed: int) -> list[float]:
    """Train a full fine-tune and save its post-training SVD; accuracy before and after the SVD."""
    torch.manual_seed(seed)
    model = encoder.fresh(classes)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".encoder.layer." in name
    }
    model.requires_grad_(False)
    for module in [*linear.values(), model.classifier]:
        module.weight.requires_grad_(True)
    model.classifier.bias.requires_grad_(True)
    before = {name: module.weight.detach().clone() for name, module in linear.items()}
    fit(model, rows, steps, 1e-4, seed)
    whole = evaluate.accuracy(model, task)
    tensors = {
        f"base_model.model.classifier.{part}": getattr(model.classifier, part).detach().clone()
        for part in ("weight", "bias")
    }
    for name, module in linear.items():
        u, s, vt = torch.linalg.svd(module.weight.detach() - before[name], full_matrices=False)
        root = s[:RANK].sqrt()
        A, B = root[:, None] * vt[:RANK], u[:, :RANK] * root
        module.weight.data = before[name] + B @ A
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(encoder.LINEAR), task_type="SEQ_CLS",
        modules_to_save=["classifier", "score"], inference_mode=True,
        base_model_name_or_path="sentence-transformers/all-MiniLM-L6-v2",
    )  # fmt: skip
    config.save_pretrained(str(out))
    return [whole, evaluate.accuracy(model, task)]


def train(task: str, kind: str, out: Path, steps: int, most: int, seed: int) -> dict[str, Any]:
    """Train one adapter; what is written of it into training.jsonl."""
    start, busy = time.monotonic(), time.process_time()
    split = data.load(task)
    rows = split.train[:most]
    steps = round(steps * EASY.get(task, 1.0))
    folder = out / f"{kind}.part" / task  # becomes the adapter's folder when all of it is there
    shutil.rmtree(folder, ignore_errors=True)
    run = lora if kind == "lora" else full
    accuracies = run(task, split.classes, rows, folder, steps, seed)
    (out / kind).mkdir(parents=True, exist_ok=True)
    folder.rename(out / kind / task)
    return {
        "task": task,
        "kind": kind,
        "steps": steps,
        "seed": seed,
        "rows": len(rows),
        "held_out": len(evaluate.rows(task)),
        "accuracy": accuracies,
        "seconds": round(time.monotonic() - start),
        "processor_seconds": round(time.process_time() - busy),
    }


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/tasks"))
    parser.add_argument("--tasks", default=",".join(data.TASKS))
    parser.add_argument("--kinds", default="lora,ptsvd")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train", type=int, default=data.MOST_TRAIN, help="rows a task, at most")
    parser.add_argument("--one-seed", action="store_true", help="the same seed for every task")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trained at a time")
    options = parser.parse_args()
    wanted = [
        (task, kind)
        for kind in options.kinds.split(",")
        for task in options.tasks.split(",")
        if not (options.out / kind / task / "adapter_config.json").exists()
    ]
    if not wanted:
        return
    data.load(wanted[0][0])  # a failing download says so here, once
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        running = []
        for task, kind in wanted:
            seed = 0 if options.one_seed else zlib.crc32(task.encode()) % 10_000
            running.append(
                pool.submit(train, task, kind, options.out, options.steps, options.train, seed)
            )
        for number, done in enumerate(as_completed(running), 1):
            found = done.result()
            with (options.out / "training.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
            shown = ", then ".join(f"{accuracy:.1f}" for accuracy in found["accuracy"])
            print(
                f"{number}/{len(wanted)} {found['task']} {found['kind']}: held-out accuracy "
                f"{shown} ({found['rows']} + {found['held_out']} rows, {found['seconds']} s)",
                flush=True,
            )
    for kind in options.kinds.split(","):
        shutil.rmtree(options.out / f"{kind}.part", ignore_errors=True)


if __name__ == "__main__":
    main()
