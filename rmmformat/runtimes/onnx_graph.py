"""Where an ONNX graph uses its weights: every place that a delta could be added beside.

A *site* is one node that multiplies by a weight, looks rows up in it, or convolves with it.  The
weight is found through what exporters and quantisers put before it (Transpose, Cast, Identity,
DequantizeLinear, Constant), the module path of the site from what they leave of it:

``scope``
    the scopes that torch's exporter writes beside a node,
``weight``
    the name of the initialiser, without ``.weight`` and what quantisers append,
``path``
    the name of the node, ``/encoder/layer.0/query/MatMul``, which has the path where the
    initialiser is anonymous (``onnx::MatMul_123``),
``bias``
    the name of the bias that is added next,
``raw``
    the name of the initialiser as it is.

The first that there is names the site; any of them matches a target.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rmmformat.model import TargetKind

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["FLOAT_TYPES", "Scope", "Site", "Weight", "after_bias", "find_sites", "scopes_of"]

_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16  # onnx.TensorProto.DataType
FLOAT_TYPES = {_FLOAT: "f32", _FLOAT16: "f16", _BFLOAT16: "bf16"}
_GRAPH_OUTPUT = "(graph output)"


class Scope:
    """A graph, or one nested in a node of another, and how names are looked up in it."""

    def __init__(self, graph: GraphProto, outer: Scope | None) -> None:
        self.graph, self.outer = graph, outer
        self._tensors: dict[str, TensorProto] = {
            tensor.name: tensor for tensor in graph.initializer
        }
        self._producers: dict[str, NodeProto] = {
            name: node for node in graph.node for name in node.output if name
        }
        self.consumers: dict[str, list[NodeProto | str]] = {}
        for node in graph.node:
            for name in _reads(node):
                self.consumers.setdefault(name, []).append(node)
        for output in graph.output:
            self.consumers.setdefault(output.name, []).append(_GRAPH_OUTPUT)
        self._inputs = {value.name for value in graph.input}

    def tensor(self, name: str) -> TensorProto | None:
        """The initialiser or constant of a name, here or further out."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope._tensors:
                return scope._tensors[name]
            node = scope._producers.get(name)
            if node is not None:
                return _constant(node)
            if name in scope._inputs:
                return None
            scope = scope.outer
        return None

    def producer(self, name: str) -> NodeProto | None:
        """The node that makes a value, here or further out."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope._producers or name in scope._tensors or name in scope._inputs:
                return scope._producers.get(name)
            scope = scope.outer
        return None

    def only_consumer(self, name: str) -> NodeProto | None:
        """The one node of this graph that reads a value, if nothing else does."""
        found = self.consumers.get(name, [])
        if len(found) == 1 and not isinstance(found[0], str) and name in found[0].input:
            return found[0]
        return None


def _reads(node: NodeProto) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for graph in _graphs(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (output.name for output in graph.output)


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _constant(node: NodeProto) -> TensorProto | None:
    if node.op_type == "Constant":
        for attribute in node.attribute:
            if attribute.name == "value":
                tensor: TensorProto = attribute.t
                return tensor
    return None


def scopes_of(model: ModelProto) -> list[Scope]:
    """Give the graph of a model and every nested one, outer before inner."""
    found: list[Scope] = []
    waiting = [Scope(model.graph, None)]
    while waiting:
        scope = waiting.pop()
        found.append(scope)
        waiting += [Scope(graph, scope) for node in scope.graph.node for graph in _graphs(node)]
    return found


@dataclasses.dataclass(frozen=True)
class Weight:
    """An initialiser as a node sees it.

    Attributes
    ----------
    tensor
        The tensor in the model, whose values may lie in another file.
    transposed
        There is an odd number of transpositions between it and the node.
    plain
        Its values are the weight's, and not what a weight was quantised to.
    dtype
        Element type that the node sees (``onnx.TensorProto.DataType``).
    """

    tensor: TensorProto
    transposed: bool
    plain: bool
    dtype: int

    @property
    def name(self) -> str:
        """Name of the initialiser."""
        return str(self.tensor.name)

    @property
    def sides(self) -> tuple[int, ...]:
        """Its shape as the node sees it."""
        sides = tuple(self.tensor.dims)
        return sides[::-1] if self.transposed else sides


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One node that uses a weight; equal only to itself.

    Attributes
    ----------
    kind
        What sort of target this can be; None where the operator is not known.
    n_in, n_out
        As in :class:`~rmmformat.model.TargetShape`.
    data, result
        Names of the value that goes in (activations, or indices) and of the one that comes out,
        both unquantised.
    in_first
        The stored tensor has n_in before n_out.
    alpha, data_transposed
        What the node does besides: factor of the product, transposition of the data.
    dtype
        Element type of the result.
    names
        Module paths by where they come from (the module's docstring).
    refusal
        Why no delta can be added beside the node; empty where one can.
    kernel
        Of a convolution.
    """

    scope: Scope
    node: NodeProto
    weight: Weight
    kind: TargetKind | None
    n_in: int
    n_out: int
    data: str
    result: str
    in_first: bool
    dtype: int
    names: dict[str, str]
    alpha: float = 1.0
    data_transposed: bool = False
    refusal: str = ""
    kernel: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """What messages call the node."""
        return f"{self.node.op_type} node {self.node.name or self.node.output[0]!r}"

    @property
    def best_name(self) -> str:
        """The module path to call a target here by."""
        return next(iter(self.names.values()))


def find_sites(model: ModelProto) -> list[Site]:
    """Find every site of a model, nested graphs included, in the order of the nodes."""
    sites = []
    for scope in scopes_of(model):
        for node in scope.graph.node:
            known = node.domain in ("", "ai.onnx", "com.microsoft")
            reader = _READERS.get(node.op_type, _unknown) if known else _unknown
            site = reader(scope, node)
            if site is not None:
                sites.append(site)
    return sites


# --- weights and names ------------------------------------------------------------------------


def _weight(scope: Scope, name: str) -> Weight | None:
    """Find the initialiser behind an input; None if the input is computed."""
    transposed, plain, dtype = False, True, 0
    while True:
        tensor = scope.tensor(name)
        if tensor is not None:
            if not tensor.name:  # a Constant node need not name its tensor
                tensor.name = name
            return Weight(tensor, transposed, plain, dtype or tensor.data_type)
        node = scope.producer(name)
        if node is None or not node.input:
            return None
        if node.op_type == "Transpose":
            perm = _ints(node, "perm")
            if perm and tuple(perm) != (1, 0):
                return None
            transposed = not transposed
        elif node.op_type == "Cast":
            dtype = dtype or _int(node, "to", 0)
        elif node.op_type == "DequantizeLinear":
            scale = scope.tensor(node.input[1])
            plain, dtype = False, dtype or (scale.data_type if scale is not None else _FLOAT)
        elif node.op_type != "Identity":
            return None
        name = node.input[0]


_TAIL = re.compile(r"\.weight(?:$|[._](?:quantized|transposed|fp16|q\d\w*|t)$)", re.IGNORECASE)


def _names(node: NodeProto, weight: Weight, bias: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for item in node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":
            names["scope"] = _scope_path(item.value)
    name = weight.name.removesuffix("_quantized")
    if match := _TAIL.search(name):
        path = name[: match.start()]
        names["weight"] = re.sub(r"\.(?:MatMul|Gemm)$", "", path).replace("/", ".")
    if "/" in node.name:
        names["path"] = ".".join(node.name.strip("/").split("/")[:-1])
    if bias.removesuffix("_quantized").endswith(".bias"):
        names["bias"] = bias.removesuffix("_quantized").removesuffix(".bias")
    names["raw"] = weight.name
    return {origin: path for origin, path in names.items() if path}


def _scope_path(text: str) -> str:
    """Take the module's path out of a list of scopes, the last of which is the operation."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    if not isinstance(scopes, list) or len(scopes) < 2:
        return ""
    return str(scopes[-2])


def _added_bias(scope: Scope, value: str) -> tuple[NodeProto, str] | None:
    """Find an Add of a constant row that is all that reads a value."""
    node = scope.only_consumer(value)
    if node is None or node.op_type != "Add":
        return None
    other = node.input[1] if node.input[0] == value else node.input[0]
    weight = _weight(scope, other)
    return (node, weight.name) if weight is not None and len(weight.tensor.dims) == 1 else None


def after_bias(site: Site) -> str:
    """The result of a site with the bias that is added next, if there is one."""
    added = _added_bias(site.scope, site.result)
    return site.result if added is None else _settled(site.scope, added[0].output[0])


def _settled(scope: Scope, value: str) -> str:
    """Step over QuantizeLinear and DequantizeLinear, so that a quantised group stays whole."""
    quantize = scope.only_consumer(value)
    if quantize is not None and quantize.op_type == "QuantizeLinear":
        dequantize = scope.only_consumer(quantize.output[0])
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            return str(dequantize.output[0])
    return value


def _int(node: NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _float(node: NodeProto, name: str, default: float) -> float:
    return next((a.f for a in node.attribute if a.name == name), default)


def _ints(node: NodeProto, name: str) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == name), [])


# --- one reader an operator -------------------------------------------------------------------


def _matmul(scope: Scope, node: NodeProto) -> Site | None:
    left, right = node.input[0], node.input[1]
    weight, flip, refusal = _weight(scope, right), bool(_int(node, "transB", 0)), ""
    data, flip_data = left, bool(_int(node, "transA", 0))
    if weight is None or len(weight.tensor.dims) != 2:
        weight, flip, data, flip_data = _weight(scope, left), flip_data, right, flip
        refusal = "multiplies with the weight on the left"
        if weight is None or len(weight.tensor.dims) != 2:
            return None
    if _int(node, "transBatchA", 0) or _int(node, "transBatchB", 0):
        refusal = "transposes batches"
    n_in, n_out = weight.sides[::-1] if flip else weight.sides
    in_first = weight.transposed == flip
    if data == right:
        n_in, n_out, in_first = n_out, n_in, not in_first
    gemm = node.op_type == "Gemm"
    bias = node.input[2] if gemm and len(node.input) > 2 else ""
    added = None if gemm else _added_bias(scope, node.output[0])
    if added is not None:
        bias = added[1]
    return Site(
        scope, node, weight, TargetKind.LINEAR, n_in, n_out, data,
        _settled(scope, node.output[0]), in_first, weight.dtype,
        _names(node, weight, bias),
        alpha=_float(node, "alpha", 1.0) if node.op_type != "MatMul" else 1.0,
        data_transposed=flip_data, refusal=refusal,
    )  # fmt: skip


def _matmul_nbits(scope: Scope, node: NodeProto) -> Site | None:
    weight = _weight(scope, node.input[1])
    scales = scope.tensor(node.input[2])
    if weight is None or scales is None:
        return None
    weight = dataclasses.replace(weight, plain=False)
    dtype = scales.data_type if scales.data_type in FLOAT_TYPES else _FLOAT
    added = _added_bias(scope, node.output[0])
    bias = node.input[5] if len(node.input) > 5 else added[1] if added is not None else ""
    return Site(
        scope, node, weight, TargetKind.LINEAR, _int(node, "K", 0), _int(node, "N", 0),
        node.input[0], node.output[0], False, dtype, _names(node, weight, bias),
    )  # fmt: skip


def _matmul_integer(scope: Scope, node: NodeProto) -> Site | None:
    """MatMulInteger of data quantised on the way: DynamicQuantizeLinear, ..., Cast, Mul."""
    weight = _weight(scope, node.input[1])
    if weight is None or len(weight.tensor.dims) != 2:
        return None
    weight = dataclasses.replace(weight, plain=False)
    n_in, n_out = weight.sides
    quantize = scope.producer(node.input[0])
    cast = scope.only_consumer(node.output[0])
    scaled = None if cast is None else scope.only_consumer(cast.output[0])
    good = (
        quantize is not None
        and quantize.op_type == "DynamicQuantizeLinear"
        and cast is not None
        and cast.op_type == "Cast"
        and scaled is not None
        and scaled.op_type == "Mul"
    )
    data = quantize.input[0] if good and quantize is not None else node.input[0]
    result = scaled.output[0] if good and scaled is not None else node.output[0]
    added = _added_bias(scope, result)
    return Site(
        scope, node, weight, TargetKind.LINEAR, n_in, n_out, data, result, True, _FLOAT,
        _names(node, weight, added[1] if added is not None else ""),
        refusal="" if good else "multiplies integers whose scales are not beside it",
    )  # fmt: skip


def _dynamic_quantize_matmul(scope: Scope, node: NodeProto) -> Site | None:
    weight = _weight(scope, node.input[1])
    if weight is None or len(weight.tensor.dims) != 2:
        return None
    weight = dataclasses.replace(weight, plain=False)
    n_in, n_out = weight.sides
    added = _added_bias(scope, node.output[0])
    bias = node.input[4] if len(node.input) > 4 else added[1] if added is not None else ""
    return Site(
        scope, node, weight, TargetKind.LINEAR, n_in, n_out, node.input[0], node.output[0], True,
        _FLOAT, _names(node, weight, bias),
    )  # fmt: skip


def _gather(scope: Scope, node: NodeProto) -> Site | None:
    weight = _weight(scope, node.input[0])
    if weight is None or len(weight.tensor.dims) != 2 or weight.dtype not in FLOAT_TYPES:
        return None
    n_in, n_out = weight.sides
    return Site(
        scope, node, weight, TargetKind.EMBEDDING, n_in, n_out, node.input[1],
        _settled(scope, node.output[0]), not weight.transposed, weight.dtype,
        _names(node, weight, ""),
        refusal="" if _int(node, "axis", 0) == 0 else "looks up columns",
    )  # fmt: skip


def _conv(scope: Scope, node: NodeProto) -> Site | None:
    weight = _weight(scope, node.input[1])
    if weight is None or len(weight.tensor.dims) < 3:
        return None
    n_out, *rest = weight.tensor.dims
    kernel = tuple(rest[1:])
    n_in = rest[0]
    for side in kernel:
        n_in *= side
    refusal = ""
    if _int(node, "group", 1) != 1:
        refusal = "convolves in groups"
    elif any(side != 1 for side in kernel):
        refusal = f"has kernel {' x '.join(map(str, kernel))}, and only 1 x 1 is a product"
    elif any(step != 1 for step in _ints(node, "strides")) or any(_ints(node, "pads")):
        refusal = "has strides or padding"
    bias = node.input[2] if len(node.input) > 2 else ""
    return Site(
        scope, node, weight, TargetKind.CONV, n_in, n_out, node.input[0], node.output[0], False,
        weight.dtype, _names(node, weight, bias), refusal=refusal, kernel=kernel,
    )  # fmt: skip


#: What stands between a weight and the node that uses it, or only looks at its shape.
_PASSIVE = frozenset({"Transpose", "Cast", "Identity", "DequantizeLinear", "Constant", "Shape"})


def _unknown(scope: Scope, node: NodeProto) -> Site | None:
    if node.op_type in _PASSIVE:
        return None
    for name in node.input:
        weight = _weight(scope, name) if name else None
        if weight is not None and len(weight.tensor.dims) >= 2:
            kind = TargetKind.EMBEDDING if "Gather" in node.op_type else None
            return Site(
                scope, node, weight, kind, 0, 0, node.input[0], node.output[0], False, 0,
                _names(node, weight, ""),
                refusal="is of an operator that no delta can be added beside",
            )  # fmt: skip
    return None


_READERS: dict[str, Callable[[Scope, NodeProto], Site | None]] = {
    "MatMul": _matmul,
    "Gemm": _matmul,
    "FusedMatMul": _matmul,
    "MatMulNBits": _matmul_nbits,
    "MatMulInteger": _matmul_integer,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "Gather": _gather,
    "Conv": _conv,
}
