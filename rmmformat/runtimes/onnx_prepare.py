"""Inputs for the factors of a task, added to a graph beside the nodes of its targets.

For a product ``y = x @ W`` with x (..., n_in) the graph then computes::

    y - ((x @ A.T) * -scale) @ B.T

The two signs matter: with factors of rank 0 the product is +0.0, and ``y - 0.0`` is y in every bit,
which ``y + 0.0`` is not where y is -0.0.  A and B come as a collection reconstructs them, (rank,
n_in) and (n_out, rank); ONNX Runtime turns the two transpositions and the products into its
FusedMatMul, so they cost little (benchmarks/onnx_graph.py).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rmmformat.converters.onnx_names import (
    METADATA_KEY,
    Interface,
    Replaceable,
    Slot,
    parameter_names,
)
from rmmformat.errors import OptionError, RmmError, UnsupportedError
from rmmformat.model import TargetKind, TargetShape
from rmmformat.runtimes.onnx_graph import FLOAT_TYPES, Site, after_bias
from rmmformat.runtimes.onnx_heads import Module, open_parameters

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["check_unprepared", "insert_inputs"]

#: Operators before this opset do not broadcast as these nodes need it.
_OLDEST_OPSET = 7
#: Tensors up to this many elements may hold shapes, and are kept while ranks are inferred.
_SMALL = 64

_CODES = {name: code for code, name in FLOAT_TYPES.items()}


def check_unprepared(model: ModelProto, path: str | None) -> None:
    """Refuse a model that has such inputs already, or is too old to get them.

    Raises
    ------
    RmmError, UnsupportedError
        As said.
    """
    if any(item.key == METADATA_KEY for item in model.metadata_props):
        raise RmmError(
            "the model has inputs for factors already", path=path, hint="Take its base model."
        )
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST_OPSET:
        raise UnsupportedError(
            f"the model uses opset {opset}, expected {_OLDEST_OPSET} or newer",
            path=path,
            hint="Convert it with onnx.version_converter.",
        )


def insert_inputs(
    model: ModelProto,
    targets: Mapping[str, TargetShape],
    sites: Mapping[str, Sequence[Site]],
    parameters: Mapping[str, Replaceable],
    modules: Mapping[str, Module],
    dtype: str | None,
    path: str | None = None,
) -> Interface:
    """Add the inputs to a model in place.

    Parameters
    ----------
    sites
        Of every target that gets inputs.
    parameters
        Initialisers that get inputs beside them (:mod:`rmmformat.runtimes.onnx_heads`).
    modules
        Linear layers, whose parameters are among them, that are replaced as a whole.
    dtype
        Of factors and scales; by default that of the sites' results, f32 where they differ.

    Raises
    ------
    OptionError
        There is no such dtype.
    RmmError
        A name is taken.
    """
    dtype = _common_dtype(sites) if dtype is None else dtype
    if dtype not in _CODES:
        raise OptionError(f"dtype {dtype!r} is not one of {', '.join(sorted(_CODES))}")
    interface = Interface(
        dtype,
        {
            target: Slot(
                targets[target].kind,
                targets[target].n_in,
                targets[target].n_out,
                tuple(site.node.name or site.node.output[0] for site in found),
            )
            for target, found in sorted(sites.items())
        },
        dict(sorted(parameters.items())),
    )
    _close_inputs(model)
    ranks = _ranks(model)
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    taken |= {value.name for value in model.graph.input}
    editors: dict[int, tuple[GraphProto, _Editor]] = {}
    for target, slot in interface.targets.items():
        names = parameter_names(target)
        if clash := taken.intersection(names):
            raise RmmError(f"the graph has a value {min(clash)!r} already", path=path)
        _add_inputs(model.graph, target, slot, _CODES[dtype])
        for number, site in enumerate(sites[target]):
            _, editor = editors.setdefault(
                id(site.scope), (site.scope.graph, _Editor(_CODES[dtype]))
            )
            editor.begin(f"{target}.lora" if number == 0 else f"{target}.lora.{number}")
            editor.put_delta(site, _place(site, ranks), names)
    for graph, editor in editors.values():
        editor.apply(graph)
    open_parameters(model, interface.parameters, modules)
    item = model.metadata_props.add()
    item.key, item.value = METADATA_KEY, interface.to_json()
    return interface


def _close_inputs(model: ModelProto) -> None:
    """Take a model to IR version 4, the first in which an input can have a default.

    Before it every initialiser is listed as an input, and is a constant nevertheless.
    """
    if model.ir_version >= 4:
        return
    model.ir_version = 4
    constant = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constant]
    copies = [type(value).FromString(value.SerializeToString()) for value in kept]
    del model.graph.input[:]
    model.graph.input.extend(copies)


def _common_dtype(sites: Mapping[str, Sequence[Site]]) -> str:
    found = {site.dtype for group in sites.values() for site in group}
    return FLOAT_TYPES.get(found.pop(), "f32") if len(found) == 1 else "f32"


def _place(site: Site, ranks: Mapping[str, int]) -> str:
    """Choose the value that a delta is subtracted from, so that the base's fusions survive.

    ONNX Runtime fuses a bias into products of matrices, and of integers; after products of more
    sides it fuses the bias with what comes next (BiasGelu, SkipLayerNormalization).
    """
    integers = site.node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul")
    return after_bias(site) if integers or ranks.get(site.data) == 2 else site.result


def _add_inputs(graph: GraphProto, target: str, slot: Slot, dtype: int) -> None:
    from onnx import TensorProto, helper

    a, b, scale = parameter_names(target)
    rank = f"{target}.rank"
    shapes: dict[str, list[str | int]] = {a: [rank, slot.n_in], b: [slot.n_out, rank], scale: [1]}
    defaults = {a: (0, slot.n_in), b: (slot.n_out, 0), scale: (1,)}
    one = {1: b"\0\0\x80\x3f", 10: b"\0\x3c", 16: b"\x80\x3f"}[dtype]
    for name, shape in shapes.items():
        graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
        raw = one if name == scale else b""
        graph.initializer.append(
            TensorProto(name=name, data_type=dtype, dims=defaults[name], raw_data=raw)
        )


class _Editor:
    """Collects the nodes that one graph gets, and puts each group behind what it follows."""

    def __init__(self, dtype: int) -> None:
        self._dtype = dtype
        self._groups: dict[str, tuple[str, list[NodeProto]]] = {}
        self._nodes: list[NodeProto] = []
        self._prefix = ""

    def begin(self, prefix: str) -> None:
        self._prefix, self._nodes = prefix, []

    def put(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        name = output if output.startswith("=") else f"{self._prefix}.{output}"
        name = name.removeprefix("=")
        node = helper.make_node(
            op, list(inputs), [name], name=f"{self._prefix}.{op}.{len(self._nodes)}", **attributes
        )
        self._nodes.append(node)
        return name

    def constant(self, values: Sequence[int], output: str) -> str:
        from onnx import TensorProto, helper

        tensor = helper.make_tensor(output, TensorProto.INT64, [len(values)], values)
        return self.put("Constant", [], output, value=tensor)

    def put_delta(self, site: Site, place: str, names: tuple[str, str, str]) -> None:
        """Add the nodes of one site; ``place`` is the value that they correct."""
        dtype = site.dtype if site.dtype in FLOAT_TYPES else self._dtype
        a, b, scale = names
        if dtype != self._dtype:
            a, b, scale = (
                self.put("Cast", [name], f"cast_{part}", to=dtype)
                for name, part in zip(names, ("A", "B", "scale"), strict=True)
            )
        base = f"{self._prefix}.base"
        minus = self._minus(scale, site.alpha, dtype)
        delta = {
            TargetKind.LINEAR: self._linear,
            TargetKind.EMBEDDING: self._embedding,
            TargetKind.CONV: self._convolution,
        }[site.kind or TargetKind.LINEAR](site, a, b, minus, base)
        self.put("Sub", [base, delta], f"={place}")
        self._groups[place] = (base, self._nodes)

    def _minus(self, scale: str, alpha: float, dtype: int) -> str:
        if alpha == 1.0:
            return self.put("Neg", [scale], "minus_scale")
        from onnx import helper

        tensor = helper.make_tensor("alpha", dtype, [], [-alpha])
        factor = self.put("Constant", [], "minus_alpha", value=tensor)
        return self.put("Mul", [scale, factor], "minus_scale")

    def _linear(self, site: Site, a: str, b: str, minus: str, _base: str) -> str:
        data = site.data
        if site.data_transposed:
            data = self.put("Transpose", [data], "data", perm=[1, 0])
        a = self.put("Transpose", [a], "A_transposed", perm=[1, 0])
        narrow = self.put("MatMul", [data, a], "narrow")
        scaled = self.put("Mul", [narrow, minus], "scaled")
        b = self.put("Transpose", [b], "B_transposed", perm=[1, 0])
        return self.put("MatMul", [scaled, b], "minus_delta")

    def _embedding(self, site: Site, a: str, b: str, minus: str, base: str) -> str:
        # Columns of A are looked up as they lie: transposing A would touch the whole vocabulary.
        flat = self.put("Reshape", [site.data, self.constant([-1], "all")], "rows")
        narrow = self.put("Gather", [a, flat], "columns", axis=1)
        narrow = self.put("Transpose", [narrow], "narrow", perm=[1, 0])
        scaled = self.put("Mul", [narrow, minus], "scaled")
        b = self.put("Transpose", [b], "B_transposed", perm=[1, 0])
        delta = self.put("MatMul", [scaled, b], "flat_delta")
        return self._shaped(delta, base)

    def _convolution(self, site: Site, a: str, b: str, minus: str, base: str) -> str:
        flat = self.put("Reshape", [site.data, self.constant([0, 0, -1], "pixels")], "flat")
        narrow = self.put("MatMul", [a, flat], "narrow")
        scaled = self.put("Mul", [narrow, minus], "scaled")
        return self._shaped(self.put("MatMul", [b, scaled], "flat_delta"), base)

    def _shaped(self, delta: str, base: str) -> str:
        shape = self.put("Shape", [base], "shape")
        return self.put("Reshape", [delta, shape], "minus_delta")

    def apply(self, graph: GraphProto) -> None:
        """Put all groups into the graph they were made for."""
        result: list[NodeProto] = []
        for node in graph.node:
            result.append(node)
            for position, name in enumerate(node.output):
                if name in self._groups:
                    node.output[position], group = self._groups[name]
                    result += group
        copies = [type(node).FromString(node.SerializeToString()) for node in result]
        del graph.node[:]
        graph.node.extend(copies)


# --- ranks ------------------------------------------------------------------------------------


def _ranks(model: ModelProto) -> dict[str, int]:
    """Infer how many sides the values of the outermost graph have, where that can be told."""
    import onnx
    from onnx import helper

    graph = model.graph
    inputs = {value.name for value in graph.input}
    outline = onnx.ModelProto(ir_version=model.ir_version)
    outline.opset_import.extend(model.opset_import)
    outline.graph.name = "outline"
    outline.graph.input.extend(graph.input)
    outline.graph.node.extend(graph.node)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location == onnx.TensorProto.DEFAULT:
            outline.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            outline.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    try:
        inferred = onnx.shape_inference.infer_shapes(outline).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        inferred = graph  # ranks only decide where a delta goes, not what comes out
    found: dict[str, int] = collections.defaultdict(int)
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            found[value.name] = len(value.type.tensor_type.shape.dim)
    return dict(found)
