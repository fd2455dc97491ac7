"""What a prepared ONNX graph and the parameters of one task are called, and how names are matched.

A prepared graph takes, for every target, the factors and the scale of a task as inputs::

    TARGET.lora_A       (rank, n_in)
    TARGET.lora_B       (n_out, rank)
    TARGET.lora_scale   (1,)          not folded into a factor; LoraAdapter refuses scalars

Each has a default (rank 0, scale 1), so that a graph that is given none says what its base says.
Beside parameters that tasks replace as a whole (heads) there are inputs ``NAME.task``, empty by
default; NAME is that of the initialiser.
What there is, is written as one JSON object under :data:`METADATA_KEY` of the model's metadata.

Matching
--------
A target is matched to a place in a graph by the module paths that the place is known by.  An equal
path wins.  Otherwise one may be the other with a prefix (``bert.encoder.layer.0`` and
``encoder.layer.0``), at a dot; a graph's path that is shorter than the target needs two parts, so
that ``dense`` is not taken for ``encoder.layer.0.output.dense``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmmformat.errors import SourceError, UnsupportedError
from rmmformat.model import Role, TargetKind

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "METADATA_KEY",
    "PARAMETER_ROLES",
    "Interface",
    "Replaceable",
    "Slot",
    "best_matches",
    "interface_of",
    "parameter_input",
    "parameter_names",
    "parse_model",
    "read_interface",
]

METADATA_KEY = "rmmformat.lora"
#: Roles of private tensors that are a parameter of the model, changed as a whole.
PARAMETER_ROLES = (Role.MODULE, Role.BIAS)
_VERSION = 1


def parameter_names(target: str) -> tuple[str, str, str]:
    """Name the inputs of a target: factor A, factor B, scale."""
    return f"{target}.lora_A", f"{target}.lora_B", f"{target}.lora_scale"


def parameter_input(name: str) -> str:
    """Name the input that replaces a parameter."""
    return f"{name}.task"


def best_matches(name: str, known: Iterable[str]) -> list[str]:
    """Give the paths of ``known`` that ``name`` may mean (rule: the module's docstring)."""
    known = list(known)
    if name in known:
        return [name]
    return [
        path
        for path in known
        if path.endswith(f".{name}") or ("." in path and name.endswith(f".{path}"))
    ]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One target of a prepared graph.

    Attributes
    ----------
    kind, n_in, n_out
        As in :class:`~rmmformat.model.TargetShape`.
    nodes
        Names of the nodes that the delta is added beside.
    """

    kind: TargetKind
    n_in: int
    n_out: int
    nodes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Replaceable:
    """A parameter of a prepared graph that a task may replace as a whole.

    Attributes
    ----------
    shape
        None for sides that differ from task to task.
    dtype
        ``"f32"``, ``"f16"`` or ``"bf16"``.
    """

    shape: tuple[int | None, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Interface:
    """What a prepared graph takes of a task.

    Attributes
    ----------
    dtype
        Of all factors and scales: ``"f32"``, ``"f16"`` or ``"bf16"``.
    targets, parameters
        By name; a parameter's is that of its initialiser.
    """

    dtype: str
    targets: Mapping[str, Slot]
    parameters: Mapping[str, Replaceable]

    def to_json(self) -> str:
        """Write as the text that goes into a model's metadata."""
        value = {
            "version": _VERSION,
            "dtype": self.dtype,
            "targets": {
                name: {
                    "kind": slot.kind.name.lower(),
                    "n_in": slot.n_in,
                    "n_out": slot.n_out,
                    "nodes": list(slot.nodes),
                }
                for name, slot in self.targets.items()
            },
            "parameters": {
                name: {"shape": list(item.shape), "dtype": item.dtype}
                for name, item in self.parameters.items()
            },
        }
        return json.dumps(value, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, path: str | None = None) -> Interface:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        SourceError
            The text is something else.
        """
        try:
            value: dict[str, Any] = json.loads(text)
            if value["version"] != _VERSION:
                raise ValueError(f"version {value['version']}, expected {_VERSION}")
            return cls(
                str(value["dtype"]),
                {
                    str(name): Slot(
                        TargetKind[str(item["kind"]).upper()],
                        int(item["n_in"]),
                        int(item["n_out"]),
                        tuple(map(str, item["nodes"])),
                    )
                    for name, item in value["targets"].items()
                },
                {
                    str(name): Replaceable(
                        tuple(None if side is None else int(side) for side in item["shape"]),
                        str(item["dtype"]),
                    )
                    for name, item in value["parameters"].items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SourceError(
                f"metadata {METADATA_KEY} of the model cannot be read: {error}",
                path=path,
                hint="Prepare the model anew with `rmm onnx prepare`.",
            ) from error

    def find(self, target: str, names: Mapping[str, str]) -> str | None:
        """Tell which target of the graph a task's target is; None if there is no single one.

        Parameters
        ----------
        names
            Names that the caller gives, which win.
        """
        if target in names:
            return names[target] if names[target] in self.targets else None
        found = best_matches(target, self.targets)
        return found[0] if len(found) == 1 else None

    def find_parameter(self, name: str) -> str | None:
        """Tell which replaceable parameter a private tensor is; None if there is no single one."""
        found = best_matches(name, self.parameters)
        return found[0] if len(found) == 1 else None


def parse_model(path: Path) -> ModelProto:
    """Read a model file without the values that lie in other files, and without checking it.

    Raises
    ------
    SourceError
        Not readable, or not an ONNX model.
    UnsupportedError
        onnx is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise UnsupportedError(
            "reading ONNX models needs onnx, which is not installed",
            hint='pip install "rmmformat[onnx]"',
        ) from error
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise SourceError(f"cannot read the file: {error.strerror}", path=str(path)) from error
    except DecodeError as error:
        raise SourceError("not an ONNX model", path=str(path)) from error
    if not model.graph.node:
        raise SourceError("not an ONNX model, or one without nodes", path=str(path))
    return model


def interface_of(model: ModelProto, path: Path) -> Interface | None:
    """Tell what a model takes of a task; None if it was not prepared.

    Raises
    ------
    SourceError
        Its metadata cannot be read.
    """
    for item in model.metadata_props:
        if item.key == METADATA_KEY:
            return Interface.from_json(item.value, str(path))
    return None


def read_interface(path: Path) -> Interface | None:
    """As :func:`interface_of`, for a file; raises as :func:`parse_model` does, too."""
    return interface_of(parse_model(path), path)
