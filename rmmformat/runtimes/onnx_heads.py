"""Parameters that tasks replace as a whole, such as classifier heads, as inputs of a graph.

A replaceable parameter keeps its initialiser, a constant, which ONNX Runtime packs; making it an
input would change bits of the base.  Beside it there is an input ``NAME.task``, empty by default,
and each node that uses the parameter becomes an If: with the task's value where there is one, as it
was where there is none.

A linear layer whose weight is quantised, transposed or anonymous is replaced as a whole: an If
behind it gives the result of the task's own layer, or that of the base's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from rmmformat.converters.onnx_names import (
    PARAMETER_ROLES,
    Replaceable,
    best_matches,
    parameter_input,
)
from rmmformat.model import Array, SourceTask, TargetKind
from rmmformat.runtimes.onnx_graph import FLOAT_TYPES, Scope, Site, after_bias, scopes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = [
    "Module",
    "find_modules",
    "find_parameters",
    "module_parameters",
    "open_parameters",
    "replace_parameter",
]

#: Operators whose outputs have the dtype of the parameter.
_OPERATORS = frozenset(
    {"Gemm", "MatMul", "Add", "Mul", "Gather", "Conv", "LayerNormalization",
     "SimplifiedLayerNormalization", "RMSNormalization"}
)  # fmt: skip
_CODES = {name: code for code, name in FLOAT_TYPES.items()}


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer that tasks replace, and whether they give it a bias."""

    site: Site
    biased: bool


def find_parameters(
    model: ModelProto, tasks: Iterable[SourceTask], sites: list[Site]
) -> tuple[dict[str, Replaceable], dict[str, str], dict[str, str]]:
    """Find the initialisers that tasks replace.

    Returns
    -------
    parameters
        By the name of the initialiser.
    places
        Private tensor to the name of its initialiser.
    left
        The private tensors that the graph cannot take, and why.
    """
    scopes = scopes_of(model)
    initialisers = {tensor.name: tensor for tensor in model.graph.initializer}
    flipped = {
        site.weight.name for site in sites if site.in_first and site.node.op_type != "Gather"
    }
    found: dict[str, Replaceable] = {}
    places: dict[str, str] = {}
    left: dict[str, str] = {}
    for task in tasks:
        for name, info in task.privates.items():
            if info.role not in PARAMETER_ROLES:
                left[name] = f"a {info.role.name.lower()} has no place in the graph"
                continue
            matches = best_matches(name, initialisers)
            if not matches and (made := _implied_bias(model, name, info.shape)) is not None:
                initialisers[made.name] = made
                matches = [made.name]
            if len(matches) != 1:
                left[name] = "no initialiser has its name" if not matches else "several match"
                continue
            tensor = initialisers[matches[0]]
            reason = _reason(tensor, scopes, info.shape, flipped)
            if reason:
                left[name] = f"initialiser {tensor.name!r} {reason}"
                continue
            places[name] = tensor.name
            shape = tuple(tensor.dims)
            if tensor.name in found:
                shape = (shape[0], *(side or 0 for side in found[tensor.name].shape[1:]))
            sides = zip(shape[1:], info.shape[1:], strict=True)
            # The first side is 0 where no task is given, so it is free.
            found[tensor.name] = Replaceable(
                (None, *(a if a == b else None for a, b in sides)), FLOAT_TYPES[tensor.data_type]
            )
    _keep_together(found, places, left)
    return found, places, left


def _keep_together(
    found: dict[str, Replaceable], places: dict[str, str], left: dict[str, str]
) -> None:
    """Leave a module's bias where its weight is left: half a head of a task is nobody's head."""
    broken = {name.rpartition(".")[0]: name for name in left}
    for name in [name for name in places if name.rpartition(".")[0] in broken]:
        left[name] = f"{broken[name.rpartition('.')[0]]!r} of the same module has no place"
        found.pop(places.pop(name), None)


def find_modules(
    tasks: Iterable[SourceTask], sites: list[Site], left: dict[str, str]
) -> dict[str, Module]:
    """Find linear layers that tasks replace whose weights have no initialiser of their own name.

    Quantised, transposed and anonymous weights are like that.  What a layer takes of the tasks is
    no longer ``left`` afterwards.

    Returns
    -------
    dict
        By the path of the module.
    """
    shapes: dict[str, list[dict[str, tuple[int, ...]]]] = {}
    for task in tasks:
        parts: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, info in task.privates.items():
            stem, _, part = name.rpartition(".")
            if name in left and info.role in PARAMETER_ROLES:
                parts.setdefault(stem, {})[part] = info.shape
        for stem, found in parts.items():
            shapes.setdefault(stem, []).append(found)
    modules = {}
    for stem, variants in shapes.items():
        site = _linear_site(stem, sites)
        if site is None:
            continue
        parts_of = {frozenset(found) for found in variants}
        biased = len(parts_of) == 1 and parts_of == {frozenset({"weight", "bias"})}
        bare = len(parts_of) == 1 and parts_of == {frozenset({"weight"})}
        fits = all(found.get("weight", ())[1:] == (site.n_in,) for found in variants)
        if fits and (biased or (bare and "bias" not in site.names)):
            modules[stem] = Module(site, biased)
            for part in parts_of.pop():
                del left[f"{stem}.{part}"]
    return modules


def _linear_site(stem: str, sites: list[Site]) -> Site | None:
    names = {name for site in sites for name in site.names.values()}
    matches = set(best_matches(stem, names))
    found = [site for site in sites if not matches.isdisjoint(site.names.values())]
    if len(found) != 1 or found[0].kind is not TargetKind.LINEAR:
        return None
    site = found[0]
    plain = site.scope.outer is None and not site.refusal and not site.data_transposed
    return site if plain and site.dtype in FLOAT_TYPES else None


def _reason(
    tensor: TensorProto, scopes: list[Scope], shape: tuple[int, ...], flipped: set[str]
) -> str:
    """Say why an initialiser cannot be replaced; empty if it can."""
    if tensor.data_type not in FLOAT_TYPES:
        return "is not of floats"
    if len(tensor.dims) != len(shape) or not shape:
        return f"has {len(tensor.dims)} sides"
    if len(shape) == 2 and tensor.name in flipped:
        return "is stored transposed"
    readers = scopes[0].consumers.get(tensor.name, [])
    if not readers and _without_bias(scopes[0].graph, tensor.name):
        return ""
    if any(tensor.name in scope.consumers for scope in scopes[1:]):
        return "is used in a nested graph"
    for node in readers:
        if isinstance(node, str) or node.op_type not in _OPERATORS:
            return f"is used by {node if isinstance(node, str) else node.op_type}"
    return "" if readers else "is not used"


def replace_parameter(model: ModelProto, name: str, values: Array) -> None:
    """Put values in the place of an initialiser, in its dtype and in any shape, in place."""
    from onnx import helper, numpy_helper

    graph = model.graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if tuple(tensor.dims) != values.shape:
        _forget_shapes(graph, {name})
    tensor.CopyFrom(numpy_helper.from_array(np.array(values, dtype, order="C"), name))
    for value in graph.input:  # before IR version 4 every initialiser is one
        if value.name == name:
            value.CopyFrom(helper.make_tensor_value_info(name, tensor.data_type, values.shape))
    for node in graph.node:
        if _lacks(node, name.removesuffix(".bias") + ".weight") and name.endswith(".bias"):
            node.input[:] = [*node.input[:2], name]


def _implied_bias(model: ModelProto, name: str, shape: tuple[int, ...]) -> TensorProto | None:
    """Give a Gemm without a bias one of zeros: exporters leave out the zeros of a fresh head."""
    from onnx import TensorProto, helper

    stem = name.removesuffix(".bias")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = best_matches(f"{stem}.weight", weights)
    if stem == name or len(shape) != 1 or len(found) != 1:
        return None
    weight = weights[found[0]]
    bias = found[0].removesuffix(".weight") + ".bias"
    if weight.data_type not in FLOAT_TYPES or not _without_bias(model.graph, bias):
        return None
    sides, code = [weight.dims[0]], weight.data_type
    n_bytes = sides[0] * helper.tensor_dtype_to_np_dtype(code).itemsize
    made = TensorProto(name=bias, data_type=code, dims=sides, raw_data=bytes(n_bytes))
    model.graph.initializer.append(made)
    return made


def _without_bias(graph: GraphProto, bias: str) -> bool:
    weight = bias.removesuffix(".bias") + ".weight"
    return any(_lacks(node, weight) for node in graph.node)


def _lacks(node: NodeProto, weight: str) -> bool:
    """Whether a node is a linear layer of that weight, (n_out, n_in), without a bias."""
    return (
        node.op_type == "Gemm"
        and [name for name in node.input if name][1:] == [weight]
        and any(a.name == "transB" and a.i == 1 for a in node.attribute)
    )


def module_parameters(modules: Mapping[str, Module]) -> dict[str, Replaceable]:
    """Give the replaceable parameters of whole modules."""
    found = {}
    for stem, module in modules.items():
        dtype = FLOAT_TYPES[module.site.dtype]
        found[f"{stem}.weight"] = Replaceable((None, module.site.n_in), dtype)
        if module.biased:
            found[f"{stem}.bias"] = Replaceable((None,), dtype)
    return found


def open_parameters(
    model: ModelProto, parameters: Mapping[str, Replaceable], modules: Mapping[str, Module]
) -> None:
    """Give a model the inputs for replaceable parameters, those of ``modules`` too, in place."""
    from onnx import TensorProto, helper

    graph = model.graph
    if not parameters:
        return
    for name, parameter in parameters.items():
        key = parameter_input(name)
        free = [f"{key}.{i}" if side is None else side for i, side in enumerate(parameter.shape)]
        code = _CODES[parameter.dtype]
        graph.input.append(helper.make_tensor_value_info(key, code, free))
        empty = [0, *(side or 0 for side in parameter.shape[1:])]
        graph.initializer.append(TensorProto(name=key, data_type=code, dims=empty, raw_data=b""))
    nodes: list[NodeProto] = [
        helper.make_node(
            "Constant", [], ["lora.zero"],
            value=helper.make_tensor("zero", TensorProto.INT64, [], [0]),
        )
    ]  # fmt: skip
    for name in parameters:
        key = parameter_input(name)
        nodes.append(helper.make_node("Size", [key], [f"{key}.size"]))
        nodes.append(helper.make_node("Greater", [f"{key}.size", "lora.zero"], [f"{key}.given"]))
    of_modules = module_parameters(modules)
    alone = {name: item for name, item in parameters.items() if name not in of_modules}
    results = {after_bias(module.site): stem for stem, module in modules.items()}
    for node in graph.node:
        inputs = list(node.input)
        for name in alone:
            if name.endswith(".bias") and _lacks(node, name.removesuffix(".bias") + ".weight"):
                inputs = [*inputs[:2], name]
        used = [name for name in dict.fromkeys(inputs) if name in alone]
        nodes += _either(node, inputs, used, alone) if used else [node]
        for position, name in enumerate(node.output):
            if name in results:
                base = f"{results[name]}.lora.base"
                nodes.append(_replaced(results[name], modules[results[name]], name, base))
                node.output[position] = base
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    _forget_shapes(graph, {parameter_input(name) for name in parameters})


def _either(
    node: NodeProto, inputs: list[str], used: list[str], parameters: Mapping[str, Replaceable]
) -> list[NodeProto]:
    """Make an If of a node: on ``inputs`` with the task's values, or as it was."""
    from onnx import helper

    key = node.name or node.output[0]
    code = _CODES[parameters[used[0]].dtype]
    nodes: list[NodeProto] = []
    given = f"{parameter_input(used[0])}.given"
    for name in used[1:]:
        either = f"{key}.lora.given.{len(nodes)}"
        nodes.append(helper.make_node("Or", [given, f"{parameter_input(name)}.given"], [either]))
        given = either

    def branch(tag: str, before: list[NodeProto], inputs: list[str]) -> GraphProto:
        copy = type(node).FromString(node.SerializeToString())
        copy.name = f"{key}.{tag}"
        copy.input[:] = inputs
        copy.output[:] = [f"{name}.{tag}" if name else "" for name in node.output]
        outputs = [helper.make_tensor_value_info(name, code, None) for name in copy.output if name]
        return helper.make_graph([*before, copy], f"{key}.{tag}", [], outputs)

    chosen = {name: f"{key}.{name}.chosen" for name in used}
    choices = [
        helper.make_node(
            "If", [f"{parameter_input(name)}.given"], [chosen[name]], name=f"{key}.{name}.choice",
            then_branch=_passing(parameter_input(name), f"{key}.{name}.theirs", code),
            else_branch=_passing(name, f"{key}.{name}.base", code),
        )
        for name in used
    ]  # fmt: skip
    nodes.append(
        helper.make_node(
            "If", [given], [name for name in node.output if name], name=f"{key}.lora",
            then_branch=branch("task", choices, [chosen.get(name, name) for name in inputs]),
            else_branch=branch("base", [], list(node.input)),
        )
    )  # fmt: skip
    return nodes


def _replaced(stem: str, module: Module, result: str, base: str) -> NodeProto:
    """Make the If that gives a task's own layer where there is one, else the base's result."""
    from onnx import helper

    code = module.site.dtype
    weight, bias = (parameter_input(f"{stem}.{part}") for part in ("weight", "bias"))
    turned, product, own = (f"{stem}.lora.{part}" for part in ("turned", "product", "own"))
    nodes = [
        helper.make_node("Transpose", [weight], [turned], perm=[1, 0]),
        helper.make_node("MatMul", [module.site.data, turned], [product if module.biased else own]),
    ]
    if module.biased:
        nodes.append(helper.make_node("Add", [product, bias], [own]))
    value = helper.make_tensor_value_info(own, code, None)
    return helper.make_node(
        "If", [f"{weight}.given"], [result], name=f"{stem}.lora",
        then_branch=helper.make_graph(nodes, own, [], [value]),
        else_branch=_passing(base, f"{stem}.lora.theirs", code),
    )  # fmt: skip


def _passing(source: str, output: str, code: int) -> GraphProto:
    from onnx import helper

    value = helper.make_tensor_value_info(output, code, None)
    return helper.make_graph(
        [helper.make_node("Identity", [source], [output])], output, [], [value]
    )


def _forget_shapes(graph: GraphProto, starts: set[str]) -> None:
    """Drop the recorded sides of all that depends on values whose sides may differ."""
    reached = set(starts)
    for node in graph.node:  # in topological order
        inner = (name for a in node.attribute for n in a.g.node for name in n.input)
        if not reached.isdisjoint(node.input) or not reached.isdisjoint(inner):
            reached.update(node.output)
    kept = [value for value in graph.value_info if value.name not in reached]
    copies = [type(value).FromString(value.SerializeToString()) for value in kept]
    del graph.value_info[:]
    graph.value_info.extend(copies)
    for output in graph.output:
        if output.name in reached and output.type.tensor_type.HasField("shape"):
            for dim in output.type.tensor_type.shape.dim:
                if dim.HasField("dim_value"):
                    dim.Clear()
