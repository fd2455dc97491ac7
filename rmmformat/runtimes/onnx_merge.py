"""A model with the weights of one task merged in: for runtimes that take no adapters.

Each weight becomes ``W + scale * B @ A``, computed in float64 and rounded once to the dtype of the
weight.  Parameters that the task replaces take its values.  Values of external data are copied by
the file system and changed where they lie, a weight at a time.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmmformat.collection import Collection
from rmmformat.converters.files import atomic_file
from rmmformat.converters.onnx_names import METADATA_KEY
from rmmformat.errors import LossyConversionError, RmmError, SourceError, UnsupportedError
from rmmformat.model import Array, Factors
from rmmformat.runtimes.onnx_edit import unmatched_error
from rmmformat.runtimes.onnx_files import (
    external_files,
    external_tensors,
    load_model,
    write_checked,
)
from rmmformat.runtimes.onnx_graph import FLOAT_TYPES, Site, find_sites
from rmmformat.runtimes.onnx_heads import find_parameters, replace_parameter
from rmmformat.runtimes.onnx_match import Matching, match_targets

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

__all__ = ["MergeReport", "merge"]


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes
    ----------
    weights
        Target to the initialiser that its delta was added to.
    parameters
        Private tensor to the initialiser whose values it replaced.
    unmatched, left
        Targets without a place, and private tensors without one and why.
    """

    weights: Mapping[str, str]
    parameters: Mapping[str, str]
    unmatched: tuple[str, ...]
    left: Mapping[str, str]


def merge(
    base: str | os.PathLike[str],
    collection: Collection,
    task: str,
    out: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    allow_unmatched: bool = False,
    drop_private: bool = False,
    force: bool = False,
) -> MergeReport:
    """Write a copy of a model with one task's weights merged in.

    Parameters
    ----------
    base
        A model that is not prepared.
    names
        Target to the name of an initialiser or node, where the rule cannot tell.
    allow_unmatched, drop_private
        Leave out targets, or private tensors, that the model has no place for.

    Raises
    ------
    NotFoundError
        No such task; a target has no place in the model.
    LossyConversionError
        A private tensor has no place; a merged weight is too large for its dtype.
    UnsupportedError
        A weight is quantised, or several modules share it and not all are meant.
    SourceError
        The model cannot be read, a target may be several weights, or shapes differ.
    RmmError
        ``out`` exists, or cannot be written.
    """
    base, out = Path(base), Path(out)
    model = load_model(base)
    if any(item.key == METADATA_KEY for item in model.metadata_props):
        raise RmmError(
            "the model has inputs for factors", path=str(base), hint="Merge into its base model."
        )
    wanted = {target: info.shape for target, info in collection.targets(task).items()}
    sites = find_sites(model)
    matching = match_targets(sites, wanted, names or {}, path=str(base), beside=False)
    if matching.unmatched and not allow_unmatched:
        raise unmatched_error(matching.unmatched, sites, str(base))
    for target, found in matching.sites.items():
        _check(target, found, sites, str(base))
    _, places, left = find_parameters(model, [collection.source(task)], sites)
    if left and not drop_private:
        name, reason = next(iter(left.items()))
        raise LossyConversionError(
            f"task {task!r}: private tensor {name!r} has no place in the model: {reason}",
            path=str(base),
            hint="Leave it out with --drop-private, and apply it yourself.",
        )
    values = collection.privates(task)
    for name, place in places.items():
        replace_parameter(model, place, values[name])
    _write(model, collection, task, matching, base, out, force)
    weights = {target: found[0].weight.name for target, found in sorted(matching.sites.items())}
    return MergeReport(weights, places, matching.unmatched, left)


def _check(target: str, found: tuple[Site, ...], sites: list[Site], path: str) -> None:
    site = found[0]
    if not site.weight.plain or site.weight.tensor.data_type not in FLOAT_TYPES:
        raise UnsupportedError(
            f"target {target!r}: weight {site.weight.name!r} is quantised, and a merged "
            "one would have to be quantised anew",
            path=path,
            hint="Merge into the float model and quantise the result, or add the task beside it "
            "with `rmm onnx prepare`.",
        )
    others = [s for s in sites if s.weight.name == site.weight.name and s not in found]
    if others:
        raise UnsupportedError(
            f"target {target!r}: weight {site.weight.name!r} is also that of the "
            f"{others[0].label}, which would change, too",
            path=path,
            hint="Add the task beside it with `rmm onnx prepare`.",
        )


def _merged(values: Array, factors: Factors, site: Site, what: str) -> Array:
    """``W + scale * B @ A`` in the layout and dtype of ``values``."""
    delta: np.ndarray[Any, Any] = factors.scale * (
        factors.B.astype(np.float64) @ factors.A.astype(np.float64)
    )
    if site.in_first:
        delta = delta.T
    exact = values.astype(np.float64) + delta.reshape(values.shape)
    with np.errstate(over="ignore"):
        result: Array = exact.astype(values.dtype)
    if not np.isfinite(result).all() and np.isfinite(values).all():
        raise LossyConversionError(f"{what}: merged, it has values too large for {values.dtype}")
    return result


def _write(
    model: ModelProto,
    collection: Collection,
    task: str,
    matching: Matching,
    base: Path,
    out: Path,
    force: bool,
) -> None:
    from onnx import numpy_helper

    loaded = collection.load(task)
    outside: list[tuple[str, Site]] = []
    for target, found in matching.sites.items():
        tensor = found[0].weight.tensor
        if tensor.data_location == tensor.EXTERNAL:
            outside.append((target, found[0]))
            continue
        merged = _merged(numpy_helper.to_array(tensor), loaded[target], found[0], target)
        tensor.CopyFrom(numpy_helper.from_array(merged, tensor.name))
    files = external_files(model, base)
    copies = {
        location: f"{out.name}.data" + (f".{number}" if number else "")
        for number, location in enumerate(sorted(files))
    }
    made: list[Path] = []
    with atomic_file(out, force=force) as temporary:
        try:
            for location, name in copies.items():
                target_file = out.parent / name
                with atomic_file(target_file, force=force) as copy:
                    shutil.copyfile(files[location], copy)
                    for target, site in outside:
                        tensor = site.weight.tensor
                        if _entry(tensor, "location") == location:
                            _merge_outside(copy, tensor, loaded[target], site, target)
                made.append(target_file)
            _relocate(model, copies)
            write_checked(model, temporary)
        except BaseException:
            for target_file in made:
                target_file.unlink(missing_ok=True)
            raise


def _entry(tensor: TensorProto, key: str) -> str:
    return next((str(item.value) for item in tensor.external_data if item.key == key), "")


def _merge_outside(
    file: Path, tensor: TensorProto, factors: Factors, site: Site, target: str
) -> None:
    from onnx import helper

    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims))
    offset = int(_entry(tensor, "offset") or 0)
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as memory:
        if offset + count * dtype.itemsize > len(memory):
            raise SourceError(f"values of {tensor.name!r} lie beyond the end of their file")
        values = np.frombuffer(memory, dtype, count, offset).reshape(tuple(tensor.dims))
        merged = _merged(values, factors, site, target)
        del values  # a view keeps the mapping open
        memory[offset : offset + merged.nbytes] = merged.tobytes()


def _relocate(model: ModelProto, names: Mapping[str, str]) -> None:
    for tensor in external_tensors(model):
        # A checksum would be that of the base's values.
        kept = {item.key: item.value for item in tensor.external_data if item.key != "checksum"}
        kept["location"] = names[kept["location"]]
        del tensor.external_data[:]
        for key, value in kept.items():
            tensor.external_data.add(key=key, value=value)
