"""What extracting a fine-tune will do with each tensor, from names, shapes and configs alone.

Nothing is computed before this has been through, so what cannot be extracted is refused by name at
once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection as AnyCollection

from rmmformat.converters.checkpoint_layout import (
    base_names,
    in_layers,
    is_float,
    target_of,
    tied_output,
)
from rmmformat.converters.checkpoint_store import Checkpoint
from rmmformat.errors import SourceError
from rmmformat.model import Action, LedgerLine, TargetKind, TargetShape

__all__ = ["Item", "Plan", "plan_extraction"]

#: Last parts of names of float tensors that a model computes for itself.
_BUFFERS = frozenset({"inv_freq", "masked_bias"})


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor of the fine-tune.

    Attributes
    ----------
    name
        What it is called in the task: a tensor name.
    tensor
        The fine-tune's tensor that holds it.
    base
        The base's tensor that it was trained from; None for one to be kept whole whatever it holds.
    target, shape
        What it becomes if it has changed; None for tensors that are kept whole.
    why
        For the ledger, where it is kept whole though the base has no such tensor.
    """

    name: str
    tensor: str
    base: str | None = None
    target: str | None = None
    shape: TargetShape | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is to be done.

    Attributes
    ----------
    items
        In the order of the names.
    tied
        Tensors that stand for an output weight, too, whose module cannot be named: they must not
        have changed.  Pairs of the fine-tune's and the base's name.
    ledger
        Tensors that are not looked at, and why.
    """

    items: tuple[Item, ...]
    tied: tuple[tuple[str, str], ...]
    ledger: tuple[LedgerLine, ...]


def plan_extraction(tuned: Checkpoint, base: Checkpoint) -> Plan:
    """Lay a fine-tune beside its base.

    Raises
    ------
    SourceError
        It is no fine-tune of this base: tensors are missing, superfluous or of another shape.
    UnsupportedError
        A weight cannot be told from a transposed one.
    """
    names = base_names(tuned.metas, base.metas)
    if not any(is_float(tuned.metas[name].dtype) for name in names):
        raise SourceError(
            f"no tensor of it, as {next(iter(tuned.metas))!r}, is in the base {base.path}",
            path=str(tuned.path),
            hint="Name the model that it was trained from with --base.",
        )
    ledger = _prefix_lines(names)
    config = tuned.config or base.config
    embeddings, output = tied_output(tuned, config)
    base_embeddings, base_output = tied_output(base, base.config)
    if base_output is not None and f"{base_output}.weight" in tuned.metas:
        # The base stores its shared weight once, the fine-tune twice.
        names.setdefault(f"{base_output}.weight", base_embeddings[0])
    items: list[Item] = []
    for name in tuned.metas:
        item = _plan_one(name, names.get(name), tuned, base)
        if item is None:
            ledger.append(LedgerLine(f"tensor {name}", Action.IGNORED, "a buffer, not trained"))
            continue
        items.append(item)
        if name in embeddings and output is not None:
            items.append(_plan_output(item, output, tuned, base))
    used = {item.base for item in items}
    ledger.extend(_missing(tuned, base, used | set(names.values())))
    tied = tuple((n, names[n]) for n in embeddings if output is None and n in names)
    return Plan(tuple(items), tied, tuple(ledger))


def _prefix_lines(names: dict[str, str]) -> list[LedgerLine]:
    name, other = next(iter(names.items()))
    if len(name) > len(other):
        text = f"the base's names lack the prefix {name.removesuffix(other)!r}"
    elif len(name) < len(other):
        text = f"the base's names have the prefix {other.removesuffix(name)!r}"
    else:
        return []
    return [LedgerLine("names of tensors", Action.USED, text)]


def _plan_one(name: str, known: str | None, tuned: Checkpoint, base: Checkpoint) -> Item | None:
    """Plan one tensor; None for a buffer that the base does not have."""
    meta = tuned.metas[name]
    if known is None:
        if _is_buffer(name, tuned):
            return None
        if in_layers(name):
            raise SourceError(
                f"tensor {name!r} is in a layer, and the base {base.path} has no such tensor",
                path=str(tuned.path),
                hint="Name the model that it was trained from with --base.",
            )
        return Item(name, name, why="not in the base")
    shape, base_shape = meta.shape, base.metas[known].shape
    found = target_of(name, shape, meta.dtype, tuned.config or base.config)
    if shape != base_shape:
        what = f"of shape {shape}, {base_shape} in the base"
        if in_layers(name) or shape[1:] != base_shape[1:] or not shape:
            raise SourceError(
                f"tensor {name!r} is {what}",
                path=str(tuned.path),
                hint="Name the model that it was trained from with --base.",
            )
        resized = found is not None and found[1].kind is TargetKind.EMBEDDING
        more = "notice: the vocabulary was resized: " if resized else "notice: "
        return Item(name, name, why=more + what)
    if found is None or not is_float(base.metas[known].dtype):
        return Item(name, name, known)
    return Item(name, name, known, *found)


def _plan_output(item: Item, output: str, tuned: Checkpoint, base: Checkpoint) -> Item:
    """Plan the output weight that is stored as the input embedding alone."""
    name = f"{output}.weight"
    if item.base is None or item.shape is None:
        return Item(name, item.tensor, why=f"{item.why}; tied to {item.tensor}")
    rows, columns = tuned.metas[item.tensor].shape
    own = base.metas.get(name)
    known = name if own is not None and own.shape == (rows, columns) else item.base
    return Item(name, item.tensor, known, output, TargetShape(columns, rows))


def _missing(
    tuned: Checkpoint, base: Checkpoint, used: AnyCollection[str | None]
) -> list[LedgerLine]:
    """List what only the base has; in a layer that is an error."""
    lines = []
    for name in base.metas:
        if name in used or _is_buffer(name, base):
            continue
        if in_layers(name):
            raise SourceError(
                f"tensor {name!r} of the base {base.path} is missing",
                path=str(tuned.path),
                hint="Fetch the whole checkpoint again, or name the right base with --base.",
            )
        detail = "notice: the checkpoint does not have it"
        lines.append(LedgerLine(f"tensor {name} of the base", Action.IGNORED, detail))
    return lines


def _is_buffer(name: str, checkpoint: Checkpoint) -> bool:
    """Say whether a tensor is something that a model computes for itself."""
    meta, leaf = checkpoint.metas[name], name.rpartition(".")[2]
    causal_mask = leaf == "bias" and len(meta.shape) > 2
    return not is_float(meta.dtype) or leaf in _BUFFERS or causal_mask
