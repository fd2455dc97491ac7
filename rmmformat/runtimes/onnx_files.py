"""ONNX model files: read without the values that lie outside, written whole or not at all.

Weights of large models lie in files beside the model (external data).  Those are never read as a
whole here: a model that is written beside its base goes on using them, one that is written
elsewhere gets copies, made by the file system.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rmmformat.converters.files import atomic_file
from rmmformat.converters.onnx_names import parse_model
from rmmformat.errors import InternalError, RmmError, SourceError
from rmmformat.runtimes.onnx_graph import scopes_of

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

__all__ = [
    "external_files",
    "external_tensors",
    "load_model",
    "location_of",
    "save_model",
    "write_checked",
]


def load_model(path: Path) -> ModelProto:
    """Read a model file and check it; values of external data stay where they are.

    Functions that a model defines for itself are inlined, so that every weight is in a graph.

    Raises
    ------
    SourceError
        Not readable, or not a valid ONNX model.
    UnsupportedError
        onnx is not installed.
    """
    model = parse_model(path)
    import onnx
    from onnx import inliner

    for tensor in external_tensors(model):
        location_of(tensor, path)
    try:
        # After this nodes are in order, names are unique, and operators have their inputs.
        onnx.checker.check_model(os.fspath(path))
        return inliner.inline_local_functions(model) if model.functions else model
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        text = str(error).strip().partition("\n")[0]
        raise SourceError(f"not a valid model: {text}", path=str(path)) from error


def external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Give every initialiser whose values lie in another file."""
    for scope in scopes_of(model):
        yield from (t for t in scope.graph.initializer if t.data_location == t.EXTERNAL)


def location_of(tensor: TensorProto, path: Path) -> Path:
    """Find the file of a tensor's values.

    Raises
    ------
    SourceError
        It names none, one outside of the model's folder, or one that is not there.
    """
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    folder = path.parent.resolve()
    found = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not found.is_relative_to(folder):
        raise SourceError(
            f"values of {tensor.name!r} are in {location!r}, which is not in the model's folder",
            path=str(path),
        )
    if not found.is_file():
        raise SourceError(
            f"values of {tensor.name!r} are in {location!r}, which is not there", path=str(path)
        )
    return found


def external_files(model: ModelProto, path: Path) -> dict[str, Path]:
    """Give the files of external data, by location."""
    return {
        next(e.value for e in tensor.external_data if e.key == "location"): location_of(
            tensor, path
        )
        for tensor in external_tensors(model)
    }


def save_model(model: ModelProto, base: Path, out: Path, *, force: bool) -> None:
    """Check a model and write it; its external data is that of ``base``.

    Raises
    ------
    RmmError
        ``out`` or a file of external data exists and ``force`` is not set, or cannot be written.
    """
    files = external_files(model, base)
    made: list[Path] = []
    # The model appears last: whoever sees it has its data.
    with atomic_file(out, force=force) as temporary:
        try:
            for location, source in files.items():
                target = out.parent / location
                if target.exists() and target.resolve() == source:
                    continue
                with atomic_file(target, force=force) as copy:
                    shutil.copyfile(source, copy)
                made.append(target)
            write_checked(model, temporary)
        except BaseException:
            for target in made:
                target.unlink(missing_ok=True)
            raise


def write_checked(model: ModelProto, path: Path) -> None:
    """Serialise a model to a file beside its external data, and let onnx's own checker pass it.

    Raises
    ------
    RmmError
        It is too large for one file.
    InternalError
        The checker refuses it.
    """
    import onnx
    from google.protobuf.message import EncodeError

    try:
        path.write_bytes(model.SerializeToString(deterministic=True))
    except (EncodeError, ValueError) as error:
        raise RmmError(
            f"the model is too large for one file: {error}",
            path=str(path),
            hint="Save the base with external data first (onnx.save_model).",
        ) from error
    try:
        onnx.checker.check_model(os.fspath(path))
    except onnx.checker.ValidationError as error:
        raise InternalError(f"the model that was made is not valid: {error}") from error
