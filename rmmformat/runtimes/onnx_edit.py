"""Preparing a base model: from files, a collection or patterns, to a model with inputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rmmformat.collection import Collection
from rmmformat.converters.onnx_names import Interface
from rmmformat.errors import NotFoundError, OptionError, SourceError, UnsupportedError
from rmmformat.model import TargetShape
from rmmformat.runtimes.onnx_files import load_model, save_model
from rmmformat.runtimes.onnx_graph import Site, find_sites
from rmmformat.runtimes.onnx_heads import find_modules, find_parameters, module_parameters
from rmmformat.runtimes.onnx_match import match_patterns, match_targets
from rmmformat.runtimes.onnx_prepare import check_unprepared, insert_inputs

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["PrepareReport", "PreparedTarget", "collection_targets", "prepare", "prepare_model"]


@dataclasses.dataclass(frozen=True)
class PreparedTarget:
    """Where one target is in the graph.

    Attributes
    ----------
    weight
        Name of the initialiser.
    nodes
        Names of the nodes that the delta is added beside.
    operator
        Their operator.
    """

    weight: str
    nodes: tuple[str, ...]
    operator: str
    n_in: int
    n_out: int


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What preparing a model did.

    Attributes
    ----------
    dtype
        Of the new inputs.
    targets
        Targets that have inputs now.
    unmatched
        Targets of the collection that the model has no place for.
    parameters
        Parameters (heads) that tasks can replace.
    left
        Private tensors of the collection that the graph cannot take, and why.
    """

    dtype: str
    targets: Mapping[str, PreparedTarget]
    unmatched: tuple[str, ...]
    parameters: tuple[str, ...]
    left: Mapping[str, str]


def prepare(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    collection: Collection | None = None,
    targets: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
    dtype: str | None = None,
    allow_unmatched: bool = False,
    force: bool = False,
) -> PrepareReport:
    """Write a copy of a model that takes the factors of a task as inputs.

    Without them it gives the base's outputs.  Its external data is shared with the base where both
    are in one folder, and copied otherwise.

    Parameters
    ----------
    base, out
        The model, and the file to write.
    collection
        The targets, and the heads, are those of its tasks.
    targets
        Without a collection: module paths, their last parts (``query``), or globs.
    names
        Target to the name of an initialiser or node, where the rule cannot tell
        (:mod:`rmmformat.runtimes.onnx_match`).
    dtype
        Of the inputs; by default that of the model's activations at the targets.
    allow_unmatched
        Leave out targets that the model has no place for, and list them.
    force
        Replace ``out``.

    Raises
    ------
    OptionError
        Neither a collection nor targets, or both, or an unknown dtype.
    NotFoundError
        A target has no place in the model, or a given name is not in it.
    SourceError
        The model cannot be read, a target may be several weights, or shapes differ.
    UnsupportedError
        A target is in a node beside which no delta can be added; onnx is missing.
    RmmError
        ``out`` exists, or cannot be written.
    """
    base, out = Path(base), Path(out)
    model = load_model(base)
    report, _ = prepare_model(
        model,
        collection=collection,
        targets=targets,
        names=names or {},
        dtype=dtype,
        allow_unmatched=allow_unmatched,
        path=str(base),
    )
    save_model(model, base, out, force=force)
    return report


def prepare_model(
    model: ModelProto,
    *,
    collection: Collection | None,
    targets: Iterable[str] = (),
    names: Mapping[str, str],
    dtype: str | None = None,
    allow_unmatched: bool = False,
    path: str | None = None,
) -> tuple[PrepareReport, Interface]:
    """As :func:`prepare`, in place and in memory."""
    targets = tuple(targets)
    if (collection is None) == (not targets):
        raise OptionError("name targets, or a collection whose targets are meant: one of the two")
    check_unprepared(model, path)
    sites = find_sites(model)
    if collection is None:
        wanted = match_patterns(sites, targets, path=path)
    else:
        wanted = collection_targets(collection)
    matching = match_targets(sites, wanted, names, path=path)
    if matching.unmatched and not allow_unmatched:
        raise unmatched_error(matching.unmatched, sites, path)
    tasks = [] if collection is None else list(map(collection.source, collection.tasks))
    parameters, _, left = find_parameters(model, tasks, sites)
    modules = find_modules(tasks, sites, left)
    parameters |= module_parameters(modules)
    interface = insert_inputs(model, wanted, matching.sites, parameters, modules, dtype, path)
    prepared = {
        target: PreparedTarget(
            found[0].weight.name,
            tuple(site.node.name or site.node.output[0] for site in found),
            found[0].node.op_type,
            wanted[target].n_in,
            wanted[target].n_out,
        )
        for target, found in sorted(matching.sites.items())
    }
    report = PrepareReport(
        interface.dtype, prepared, matching.unmatched, tuple(interface.parameters), left
    )
    return report, interface


def unmatched_error(
    unmatched: tuple[str, ...], sites: list[Site], path: str | None
) -> NotFoundError | UnsupportedError:
    """Say which targets have no place, and what may be the reason."""
    listed = ", ".join(map(repr, unmatched[:5])) + (" and more" if len(unmatched) > 5 else "")
    text = f"{len(unmatched)} targets have no place in the model: {listed}"
    fused = next((s for s in sites if s.kind is None and "Attention" in s.node.op_type), None)
    if fused is not None:
        return UnsupportedError(
            f"{text}; its {fused.label} holds several weights in one, beside which no delta can "
            "be added",
            path=path,
            hint="Export the model without fusing attention.",
        )
    known = sorted({site.best_name for site in sites if not site.refusal})
    return NotFoundError(
        text,
        path=path,
        hint=f"The model has {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}. Map them "
        "with --map TARGET=INITIALISER, or leave them out with --allow-unmatched.",
    )


def collection_targets(collection: Collection) -> dict[str, TargetShape]:
    """Give every target of a collection.

    Raises
    ------
    SourceError
        Two tasks have it in different shapes, which one graph cannot take.
    """
    found: dict[str, TargetShape] = {}
    for task in collection.tasks:
        for target, info in collection.targets(task).items():
            shape = found.setdefault(target, info.shape)
            if (shape.n_in, shape.n_out, shape.kind) != (
                info.shape.n_in,
                info.shape.n_out,
                info.shape.kind,
            ):
                raise SourceError(
                    f"target {target!r} is {shape.n_out} x {shape.n_in} in one task and "
                    f"{info.shape.n_out} x {info.shape.n_in} in {task!r}",
                    path=collection.path or None,
                )
    return found
