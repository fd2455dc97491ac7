"""The first table of the page: what a user asks first, ours beside the nearest other way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from report import Column, Table


@dataclasses.dataclass(frozen=True)
class Question:
    """Two rows of one table to put side by side; `more` where larger figures are better."""

    text: str
    table: str
    key: str
    ours: str
    theirs: str
    unit: str
    form: str = ".2f"
    more: bool = False


PEFT = "PEFT load_adapter + delete"
COPY = "safetensors load + copy_"
GGUF = "llama_adapter_lora_init (GGUF file)"
MANY = "llama_set_adapters_lora, all in memory"
LORA = "LoraAdapter.Load (mapped file)"
SUBSPACE = "vlora SharedSubspace.from_adapters"
FILES = "a safetensors file a task, each opened"
EXACT = "rmm exact, from file"
QUESTIONS = (
    Question("open 1,000 tasks, every target known", "open", "cpu", "rmm", FILES, "ms"),
    Question("load an exact task and read its values", "load", "used_cpu", "rmm exact: load",
             "safetensors.numpy.load_file", "ms"),
    Question("load an RMM task (p = 3) and read its values", "load", "used_cpu",
             "rmm p = 3, f32: load", "vlora k = 3: reconstruct", "ms"),
    Question("switch to an exact task in torch", "switch-peft", "cpu", EXACT, PEFT, "ms"),
    Question("the same, beside copying by hand", "switch-peft", "cpu", EXACT, COPY, "ms"),
    Question("switch to one in ONNX Runtime, and a run", "switch-onnx", "cpu", EXACT, LORA, "ms"),
    Question("switch to one in llama.cpp", "switch-llamacpp", "cpu", EXACT, GGUF, "ms"),
    Question("the same, a task that was kept", "switch-llamacpp", "cpu", "rmm, kept", MANY, "ms"),
    Question("merge by position, one thread", "merge", "one", "rmm, by position",
             "numpy.linalg.eigh of the Gram matrices", "thousand/s", ".0f", more=True),
    Question("merge by vlora's model, one thread", "merge", "one",
             "rmm, one group a factor (vlora's model)", SUBSPACE, "thousand/s", ".0f", more=True),
    Question("convert eight adapters, to 5 % error", "convert", "seconds",
             "rmm planned, 5 % error (default)", "vlora compress, k = 7, NF4", "s"),
    Question("extract adapters (PT-SVD)", "extract", "work", "rmm, factors in f32",
             "mergekit-extract-lora", "s"),
    Question("bytes of the demo adapters, 5 % error", "size", "bytes",
             "rmm --max-error 5% (default)", "vlora compress, k = 7, NF4", "kB", ".0f"),
    Question("the same, bit for bit", "size", "bytes", "rmm --exact",
             "a tar of them, zstd level 19", "kB", ".0f"),
)  # fmt: skip


def summary(tables: Iterable[Table]) -> Table:
    """Rows whose two figures were measured in this run."""
    by_name = {table.name: table for table in tables}
    found = Table(
        "summary",
        "In short",
        "what",
        (
            Column("ours", "rmm"),
            Column("theirs", "the other"),
            Column("who", "which is"),
            Column("times", "times better"),
        ),
    )
    for question in QUESTIONS:
        rows = by_name[question.table].rows if question.table in by_name else {}
        ours, theirs = (
            rows.get(name, {}).get(question.key) for name in (question.ours, question.theirs)
        )
        if not isinstance(ours, (int, float)) or not isinstance(theirs, (int, float)):
            continue
        times = ours / theirs if question.more else theirs / ours
        found.put(
            question.text,
            ours=f"{ours:{question.form}} {question.unit}",
            theirs=f"{theirs:{question.form}} {question.unit}",
            who=f"`{question.theirs}`",
            times=times,
        )
    return found
