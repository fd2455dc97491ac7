"""Train one LoRA adapter and one full fine-tune a task; both end as PEFT adapter folders.

    python benchmarks/tasks/train.py --out build/tasks

`OUT/lora/TASK` is a rank-16 LoRA adapter of every linear weight.  `OUT/ptsvd/TASK` is the rank-16
truncated SVD of what a full fine-tune changed (post-training SVD, arXiv 2510.14163): all linear
weights of the encoder and the head are trained, the rest stays as it is, so that the deltas are all
that the two models differ in.  Each task has its own seed unless --one-seed is given.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import zlib
from pathlib import Path
from typing import Any

import data
import model as encoder
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

RANK, ALPHA = 16, 32


def fit(
    model: Any, task: str, rows: list[tuple[str, int]], steps: int, rate: float, seed: int
) -> None:
    """Train in place: AdamW, the rate falling linearly to zero."""
    rng = random.Random(seed)  # noqa: S311  # a reproducible order, no secret
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1.0 - step / steps)
    )
    model.train()
    order: list[int] = []
    for _ in range(steps):
        if len(order) < encoder.BATCH:
            order = list(range(len(rows)))
            rng.shuffle(order)
        batch = [rows[order.pop()] for _ in range(min(encoder.BATCH, len(order)))]
        labels = torch.tensor([label for _, label in batch])
        loss = model(**encoder.tokens(task, [text for text, _ in batch]), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def lora(task: str, split: data.Split, out: Path, steps: int, seed: int) -> float:
    """Train and save a LoRA adapter."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(encoder.LINEAR), task_type="SEQ_CLS"
    )
    model = get_peft_model(encoder.fresh(split.classes), config)
    fit(model, task, split.train, steps, 1e-3, seed)
    model.save_pretrained(str(out))
    config_path = out / "adapter_config.json"  # the model's name, not the folder it was read from
    fields = json.loads(config_path.read_text())
    fields["base_model_name_or_path"] = "sentence-transformers/all-MiniLM-L6-v2"
    config_path.write_text(json.dumps(fields, indent=2))
    return encoder.accuracy(model, task, split.test)


def full(task: str, split: data.Split, out: Path, steps: int, seed: int) -> tuple[float, float]:
    """Train a full fine-tune and save its post-training SVD; accuracy before and after the SVD."""
    torch.manual_seed(seed)
    model = encoder.fresh(split.classes)
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
    fit(model, task, split.train, steps, 1e-4, seed)
    whole = encoder.accuracy(model, task, split.test)
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
    return whole, encoder.accuracy(model, task, split.test)


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/tasks"))
    parser.add_argument("--tasks", default=",".join(data.TASKS))
    parser.add_argument("--kinds", default="lora,ptsvd")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train", type=int, default=1600, help="training rows a task, at most")
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--one-seed", action="store_true", help="the same seed for every task")
    options = parser.parse_args()
    for task in options.tasks.split(","):
        seed = 0 if options.one_seed else zlib.crc32(task.encode()) % 10_000
        split = data.load(task, options.train, options.test)
        for kind in options.kinds.split(","):
            out = options.out / kind / task
            if (out / "adapter_config.json").exists():
                continue
            start = time.monotonic()
            run = lora if kind == "lora" else full
            result = run(task, split, out, options.steps, seed)
            shown = result if isinstance(result, tuple) else (result,)
            print(
                f"{task} {kind}: held-out accuracy {', then '.join(f'{x:.1f}' for x in shown)} "
                f"({len(split.train)} + {len(split.test)} rows, {time.monotonic() - start:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
