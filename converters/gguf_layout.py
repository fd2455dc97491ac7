"""What a task looks like as a GGUF LoRA adapter: names, orders, types, alpha, places.

The exporter writes it to a file, the llama.cpp runtime into memory; both lay it out here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmmformat.converters.base import Options
from rmmformat.converters.casting import FLOATS
from rmmformat.converters.gguf_base import HOW_TO_GIVE_BASE, Base, base_of_text, open_base
from rmmformat.converters.gguf_names import NameMap, Place
from rmmformat.converters.gguf_scales import choose_alpha, fold_for, is_exact
from rmmformat.converters.gguf_scan import NAME_LIMIT
from rmmformat.errors import LossyConversionError, OptionError, UnsupportedError
from rmmformat.model import Action, LedgerLine, Role, SourceTask, TargetInfo, TargetKind

__all__ = ["BLOCK_BYTES", "DTYPES", "Layout", "Plan", "Slot", "base_for", "padded", "plan"]

#: Numpy's type of each type of tensor; Q8_0 comes in blocks of bytes.
DTYPES: dict[str, np.dtype[Any]] = {**FLOATS, "q8_0": np.dtype(np.uint8)}
BLOCK_BYTES = 34  # of a Q8_0 block
_BLOCK = 32  # its values


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of the file.

    Parameters
    ----------
    name
        ``blk.0.attn_q.weight.lora_b``.
    target, factor
        Which factor it holds: ``"A"`` or ``"B"``.
    shape
        In numpy's order: (rank, n_in) for A, (n_out, rank) for B; (n_in, rank) for A of the token
        embeddings.
    dtype
        A key of :data:`DTYPES`.
    heads
        For B of a query or key in rotary order, the number of heads; else 0.
    offset, n_bytes
        Its place in the data section.
    """

    name: str
    target: str
    factor: str
    shape: tuple[int, int]
    dtype: str
    heads: int
    offset: int
    n_bytes: int

    @property
    def turned(self) -> bool:
        """Whether it holds factor A transposed."""
        return self.factor == "A" and self.name == "token_embd.weight.lora_a"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A file without its values: tasks that share one differ in nothing else.

    Parameters
    ----------
    architecture
        llama.cpp's name for it.
    heads
        Metadata key and value of the head counts.
    alpha
        As llama.cpp reads it, exactly a float32.
    alignment
        Bytes that every tensor's offset is a multiple of.
    slots
        In the order of the file.
    """

    architecture: str
    heads: tuple[tuple[str, int | tuple[int, ...]], ...]
    alpha: float
    alignment: int
    slots: tuple[Slot, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the data section."""
        return padded(self.slots[-1].offset + self.slots[-1].n_bytes, self.alignment)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A task's layout, and what else is to be done to its values.

    Parameters
    ----------
    folds
        Target to the factor that its B is multiplied with; 1 for most.
    ledger
        What a person should know.
    """

    layout: Layout
    folds: Mapping[str, float]
    ledger: tuple[LedgerLine, ...]


def padded(n: int, alignment: int) -> int:
    """Round up to a multiple."""
    return -(-n // alignment) * alignment


def base_for(task: SourceTask, base: Path | None) -> Base:
    """Find out about the base model: as it was given, or as the task's configuration records.

    Raises
    ------
    UnsupportedError
        Neither says.
    SourceError
        What was given is broken.
    """
    if base is not None:
        return open_base(base)
    recorded = base_of_text(task.config_text, task.path)
    if recorded is None:
        raise UnsupportedError(
            f"task {task.name!r} does not say which of llama.cpp's architectures its base model is",
            path=task.path or None,
            hint=HOW_TO_GIVE_BASE,
        )
    return recorded


def plan(
    task: SourceTask,
    base: Base,
    *,
    options: Options,
    alignment: int = 32,
    uniform: bool = False,
) -> Plan:
    """Lay a task out.

    Parameters
    ----------
    task
        Only what is known without its values is looked at.
    base
        The model that it adapts.
    options
        ``dtype``, ``names`` and ``drop_private`` are read.
    alignment
        A power of two.
    uniform
        One type for all tensors: where the task's own differ, or a scale cannot be folded exactly,
        float32.

    Raises
    ------
    LossyConversionError
        A private tensor, which the format cannot hold.
    UnsupportedError
        A target that llama.cpp has not, ignores, or would take for another; the message names it.
    OptionError
        No such dtype.
    """
    if options.dtype is not None and options.dtype not in DTYPES:
        raise OptionError(f"dtype {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    ledger = _private_lines(task, options)
    names = NameMap(base.architecture, options.names, task.path)
    places: dict[str, Place] = {}
    taken: dict[str, str] = {}
    for target, info in task.targets.items():
        place = places[target] = names.place(target)
        _check_target(target, info, place, base, names, task.path)
        if place.tensor in taken:
            raise UnsupportedError(
                f"targets {taken[place.tensor]!r} and {target!r} are both {place.tensor!r} in "
                "llama.cpp",
                path=task.path or None,
            )
        taken[place.tensor] = target
    if not places:
        raise UnsupportedError(f"task {task.name!r} adapts nothing", path=task.path or None)
    if "token_embd" in {place.local for place in places.values()}:
        _note_embedding(base, names, ledger)
    alpha = choose_alpha(task.targets)
    folds = {target: fold_for(alpha, info) for target, info in task.targets.items()}
    ledger.append(
        LedgerLine(
            "field adapter.lora.alpha",
            Action.USED,
            f"{alpha:.9g}: gives {sum(f == 1 for f in folds.values())} of {len(folds)} targets "
            "their scale",
        )
    )
    common = _common_dtype(task, folds) if uniform and options.dtype is None else options.dtype
    slots: list[Slot] = []
    for target, info in task.targets.items():
        _add_slots(slots, target, info, places[target], base, common, folds[target], alignment)
        ledger.extend(_slot_lines(slots[-2:], folds[target], info, options.dtype))
    layout = Layout(base.architecture, base.head_fields(), alpha, alignment, tuple(slots))
    return Plan(layout, folds, tuple(ledger))


def _private_lines(task: SourceTask, options: Options) -> list[LedgerLine]:
    lines = []
    for name, info in task.privates.items():
        if not options.drop_private:
            raise LossyConversionError(
                f"private tensor {name!r} ({info.role.name.lower()}) of task {task.name!r}: "
                "llama.cpp's adapters hold low-rank pairs only",
                path=task.path or None,
                hint="--drop-private leaves it out.",
            )
        more = ", without which the deltas mean something else" * (info.role is Role.MAGNITUDE)
        lines.append(
            LedgerLine(f"tensor {name}", Action.IGNORED, f"notice: dropped on request{more}")
        )
    return lines


def _check_target(
    target: str, info: TargetInfo, place: Place, base: Base, names: NameMap, path: str
) -> None:
    where = path or None
    shape = info.shape
    if shape.kind is TargetKind.CONV:
        raise UnsupportedError(
            f"target {target!r} is a convolution: llama.cpp applies no low-rank pair there",
            path=where,
        )
    if shape.transposed:
        raise UnsupportedError(
            f"target {target!r} is a transposed weight (Conv1D): whether llama.cpp's model has it "
            "the other way round is not known",
            path=where,
            hint="Merge the adapter into the base.",
        )
    if (shape.kind is TargetKind.EMBEDDING) != (place.local == "token_embd"):
        raise UnsupportedError(
            f"target {target!r} is of kind {shape.kind.name.lower()}, and {place.tensor!r} is not",
            path=where,
        )
    longest = f"{place.tensor}.lora_a"
    if len(longest.encode()) > NAME_LIMIT:
        raise UnsupportedError(
            f"target {target!r}: the name {longest!r} is longer than ggml's {NAME_LIMIT} bytes",
            path=where,
        )
    embedded = shape.kind is TargetKind.EMBEDDING
    if embedded and not names.facts.encoder and (base.tied or not names.has_output):
        raise UnsupportedError(
            f"target {target!r}: in this base the head is the embedding table, and llama.cpp would "
            "take the pair for the head's, too, and abort",
            path=where,
            hint="Leave the target out, or merge the adapter into the base.",
        )
    if place.local == "output" and base.tied:
        raise UnsupportedError(
            f"target {target!r}: in this base the head is the embedding table, and llama.cpp has "
            "no tensor for it alone",
            path=where,
            hint="Leave the target out, or merge the adapter into the base.",
        )
    base.check_shape(target, place, shape)


def _note_embedding(base: Base, names: NameMap, ledger: list[LedgerLine]) -> None:
    if base.tied is None and not names.facts.encoder:
        ledger.append(
            LedgerLine(
                "tensor token_embd.weight",
                Action.USED,
                "notice: right only if the base has a head of its own, which was not checked",
            )
        )


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _common_dtype(task: SourceTask, folds: Mapping[str, float]) -> str:
    kinds = {_dtype_name(dtype) for i in task.targets.values() for dtype in (i.dtype_a, i.dtype_b)}
    return kinds.pop() if len(kinds) == 1 and all(map(is_exact, folds.values())) else "f32"


def _add_slots(
    slots: list[Slot],
    target: str,
    info: TargetInfo,
    place: Place,
    base: Base,
    dtype: str | None,
    fold: float,
    alignment: int,
) -> None:
    heads = base.heads_in_order(target, place, info.shape.n_out)
    turned = place.local == "token_embd"
    shapes = {
        "A": (info.shape.n_in, info.rank) if turned else (info.rank, info.shape.n_in),
        "B": (info.shape.n_out, info.rank),
    }
    own = {"A": info.dtype_a, "B": info.dtype_b}
    for factor, shape in shapes.items():
        kind = dtype
        if kind is None:
            inexact = factor == "B" and not is_exact(fold)
            kind = "f32" if inexact else _dtype_name(own[factor])
        if kind == "q8_0" and shape[1] % _BLOCK:
            kind = "f16"  # llama.cpp's converter does the same
        n = shape[0] * shape[1]
        n_bytes = n // _BLOCK * BLOCK_BYTES if kind == "q8_0" else n * DTYPES[kind].itemsize
        offset = padded(slots[-1].offset + slots[-1].n_bytes, alignment) if slots else 0
        slots.append(
            Slot(
                f"{place.tensor}.lora_{factor.lower()}",
                target,
                factor,
                shape,
                kind,
                heads if factor == "B" else 0,
                offset,
                n_bytes,
            )
        )


def _slot_lines(
    slots: list[Slot], fold: float, info: TargetInfo, wanted: str | None
) -> list[LedgerLine]:
    lines = []
    for slot in slots:
        own = _dtype_name(info.dtype_a if slot.factor == "A" else info.dtype_b)
        notes = [f"factor {slot.factor} of {slot.target}"]
        worth_seeing = False
        if slot.turned:
            notes.append("transposed")
        if slot.heads:
            notes.append(f"rows in rotary order of {slot.heads} heads")
        if slot.factor == "B" and fold == 0:
            notes.append("zeros, for a scale of 0")
        elif slot.factor == "B" and fold != 1:
            notes.append(f"times {fold:.9g}" + ("" if is_exact(fold) else ", which rounds"))
            worth_seeing = not is_exact(fold)
        if slot.dtype != own:
            notes.append(f"as {slot.dtype}, from {own}")
        if wanted is not None and slot.dtype != wanted:
            notes.append(f"rows of {slot.shape[1]} values make no {wanted} blocks")
            worth_seeing = True
        before = "notice: " if worth_seeing else ""
        lines.append(LedgerLine(f"tensor {slot.name}", Action.USED, before + "; ".join(notes)))
    return lines
