"""Small ONNX models, one a way of multiplying by a weight, and tasks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from rmmformat.collection import Collection, open_collection
from rmmformat.methods import choose_method
from rmmformat.model import Factors, PrivateInfo, Role, TargetInfo, TargetKind, TargetShape
from rmmformat.pipeline import convert

N_IN, N_OUT, RANK = 32, 16, 4
RNG = np.random.default_rng(7)
W = (RNG.standard_normal((N_IN, N_OUT)) / 6).astype(np.float32)
BIAS = RNG.standard_normal(N_OUT).astype(np.float32)
X2 = RNG.standard_normal((3, N_IN)).astype(np.float32)
X3 = RNG.standard_normal((2, 5, N_IN)).astype(np.float32)
IDS = np.array([[1, 0, 31], [7, 7, 2]])


class Task:
    """A task in memory that obeys the contract of importers."""

    def __init__(
        self,
        name: str,
        factors: Mapping[str, Factors],
        shapes: Mapping[str, TargetShape] | None = None,
        privates: Mapping[str, tuple[Role, np.ndarray]] | None = None,
    ) -> None:
        self.name, self.path, self.base_model, self.config_text = name, f"memory:{name}", "", ""
        self._factors, self._privates = dict(factors), dict(privates or {})
        self.targets = {
            target: TargetInfo(
                (shapes or {}).get(target, TargetShape(f.A.shape[1], f.B.shape[0])),
                f.rank, f.scale, f.A.dtype, f.B.dtype,
            )
            for target, f in self._factors.items()
        }  # fmt: skip
        self.privates = {
            key: PrivateInfo(role, value.dtype, value.shape)
            for key, (role, value) in self._privates.items()
        }
        self.ledger: tuple[Any, ...] = ()
        self.files: tuple[Any, ...] = ()

    def factors(self, target: str) -> Factors:
        return self._factors[target]

    def private_tensor(self, name: str) -> np.ndarray:
        return self._privates[name][1]


def factors(seed: int = 0, rank: int = RANK, scale: float = 1.5, n_in: int = N_IN,
            n_out: int = N_OUT) -> Factors:  # fmt: skip
    rng = np.random.default_rng(seed)
    return Factors(
        (rng.standard_normal((rank, n_in)) / 6).astype(np.float32),
        (rng.standard_normal((n_out, rank)) / 2).astype(np.float32),
        scale,
    )


def delta(f: Factors) -> np.ndarray:
    """(n_in, n_out), as it is added to W."""
    result: np.ndarray = (f.scale * f.B @ f.A).T
    return result


def collection_of(folder: Path, *tasks: Task) -> Collection:
    path = folder / "tasks.rmm"
    path.unlink(missing_ok=True)
    convert(list(tasks), path, choose_method(exact=True))  # type: ignore[arg-type]
    return open_collection(path, copy=True)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    *,
    x: tuple[int, Sequence[Any]] = (TensorProto.FLOAT, ["batch", N_IN]),
    y: int = TensorProto.FLOAT,
    opset: int = 17,
    ir: int = 8,
    **graph: Any,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    inputs = [helper.make_tensor_value_info("x", *x)]
    if ir < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    n_sides = len(x[1]) + (x[0] == TensorProto.INT64)  # a lookup adds one
    outputs = [helper.make_tensor_value_info("y", y, [f"y{i}" for i in range(n_sides)])]
    made = helper.make_graph(list(nodes), "g", inputs, outputs, tensors, **graph)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=ir)


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    names = [item if item != "-" else "" for item in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=name, **attributes)


def run(
    model: onnx.ModelProto | Path, feeds: Mapping[str, np.ndarray], *, fuse: bool = True
) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not fuse:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, dict(feeds))[0]
    return result


@dataclasses.dataclass(frozen=True)
class Form:
    """A way of multiplying by a weight.

    ``build`` makes the model of a weight (n_in, n_out); ``target`` is what its module is called.
    """

    build: Callable[[np.ndarray], onnx.ModelProto]
    x: np.ndarray
    target: str = "layer.fc"
    kind: TargetKind = TargetKind.LINEAR
    merges: bool = True
    tolerance: float = 1e-5
    kernel: tuple[int, ...] = ()

    @property
    def shape(self) -> TargetShape:
        return TargetShape(N_IN, N_OUT, self.kind, False, self.kernel)


def _three(w: np.ndarray, **options: Any) -> onnx.ModelProto:
    return model_of([node("MatMul", "x layer.fc.weight", "y")], {"layer.fc.weight": w},
                    x=(TensorProto.FLOAT, ["batch", "words", N_IN]), **options)  # fmt: skip


def _bias(w: np.ndarray) -> onnx.ModelProto:
    nodes = [node("MatMul", "x onnx::MatMul_7", "m"), node("Add", "m layer.fc.bias", "y")]
    return model_of(nodes, {"onnx::MatMul_7": w, "layer.fc.bias": BIAS})


def _transpose(w: np.ndarray) -> onnx.ModelProto:
    nodes = [
        node("Transpose", "layer.fc.weight", "t", perm=[1, 0]),
        node("MatMul", "x t", "y", "/layer/fc/MatMul"),
    ]
    return model_of(nodes, {"layer.fc.weight": np.ascontiguousarray(w.T)})


def _gemm(w: np.ndarray) -> onnx.ModelProto:
    made = node("Gemm", "x layer.fc.weight layer.fc.bias", "y", transB=1, alpha=0.5, beta=2.0)
    return model_of([made], {"layer.fc.weight": np.ascontiguousarray(w.T), "layer.fc.bias": BIAS})


def _gemm_transposed_data(w: np.ndarray) -> onnx.ModelProto:
    nodes = [node("Transpose", "x", "t"), node("Gemm", "t onnx::Gemm_1", "y", "/layer/fc/Gemm",
                                               transA=1)]  # fmt: skip
    return model_of(nodes, {"onnx::Gemm_1": w})


def _constant(w: np.ndarray) -> onnx.ModelProto:
    value = numpy_helper.from_array(w)
    nodes = [
        node("Constant", "", "c", value=value),
        node("Identity", "c", "i"),
        node("MatMul", "x i", "y", "/layer/fc/MatMul"),
    ]
    return model_of(nodes, {})


def _fused(w: np.ndarray) -> onnx.ModelProto:
    made = node("FusedMatMul", "x layer.fc.weight", "y", domain="com.microsoft", alpha=0.25,
                transB=1)  # fmt: skip
    return model_of([made], {"layer.fc.weight": np.ascontiguousarray(w.T)})


def _half(w: np.ndarray) -> onnx.ModelProto:
    half = TensorProto.FLOAT16
    return model_of([node("MatMul", "x layer.fc.weight", "y")],
                    {"layer.fc.weight": w.astype(np.float16)}, x=(half, ["batch", N_IN]),
                    y=half)  # fmt: skip


def _cast(w: np.ndarray) -> onnx.ModelProto:
    nodes = [node("Cast", "layer.fc.weight", "c", to=TensorProto.FLOAT),
             node("MatMul", "x c", "y")]  # fmt: skip
    return model_of(nodes, {"layer.fc.weight": w.astype(np.float16)})


def _twice(w: np.ndarray) -> onnx.ModelProto:
    """One module that is called twice, with a non-linearity in between."""
    nodes = [
        node("MatMul", "x layer.fc.weight", "m1"),
        node("Tanh", "m1", "t"),
        node("Concat", "t t", "c", axis=1),
        node("MatMul", "c layer.fc.weight", "y"),
    ]
    return model_of(nodes, {"layer.fc.weight": w})


def _branch(w: np.ndarray) -> onnx.ModelProto:
    """A product in a nested graph, by a weight of the outer one."""
    out = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    inner = helper.make_graph([node("MatMul", "x layer.fc.weight", "b")], "then", [], out)
    other = [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)]
    outer = helper.make_graph([node("Identity", "x", "e")], "else", [], other)
    nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=outer)]
    return model_of(nodes, {"layer.fc.weight": w, "yes": np.array(True)})


def _function(w: np.ndarray) -> onnx.ModelProto:
    """A product in a function that the model defines for itself."""
    model = model_of([helper.make_node("Linear", ["x", "layer.fc.weight"], ["y"], domain="mine")],
                     {"layer.fc.weight": w})  # fmt: skip
    model.opset_import.append(helper.make_opsetid("mine", 1))
    body = [node("MatMul", "a b", "c")]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("mine", "Linear", ["a", "b"], ["c"], body, opsets))
    return model


def _steps(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = (np.abs(w).max(axis=0) / 127).astype(np.float32)
    return np.rint(w / scale).astype(np.int8), scale


def _dequantized(w: np.ndarray) -> onnx.ModelProto:
    quantised, scale = _steps(w)
    nodes = [
        node("DequantizeLinear", "layer.fc.weight_quantized scale zero", "d", axis=1),
        node("MatMul", "x d", "y"),
    ]
    zero = np.zeros(N_OUT, np.int8)
    return model_of(nodes, {"layer.fc.weight_quantized": quantised, "scale": scale, "zero": zero})


def _quantized_group(w: np.ndarray) -> onnx.ModelProto:
    """All that ONNX Runtime makes one product of integers from, with its result dequantised."""
    quantised, scale = _steps(w)
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"),
        node("DequantizeLinear", "xq xs xz", "xd"),
        node("DequantizeLinear", "layer.fc.weight_quantized scale zero", "d"),
        node("MatMul", "xd d", "m", "/layer/fc/MatMul"),
        node("QuantizeLinear", "m ys yz", "yq"),
        node("DequantizeLinear", "yq ys yz", "y"),
    ]
    constants = {
        "layer.fc.weight_quantized": quantised, "scale": scale.max(), "zero": np.array(0, np.int8),
        "xs": np.array(0.03, np.float32), "xz": np.array(128, np.uint8),
        "ys": np.array(0.05, np.float32), "yz": np.array(128, np.uint8),
    }  # fmt: skip
    return model_of(nodes, constants)


def _dynamic(w: np.ndarray) -> onnx.ModelProto:
    """As onnxruntime's quantize_dynamic writes it."""
    quantised, scale = _steps(w)
    nodes = [
        node("DynamicQuantizeLinear", "x", "xq xs xz"),
        node("MatMulInteger", "xq layer.fc.weight_quantized xz zero", "i", "/layer/fc/MatMul_q"),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Mul", "xs scale", "s"),
        node("Mul", "f s", "m"),
        node("Add", "m layer.fc.bias", "y"),
    ]
    constants = {"layer.fc.weight_quantized": quantised, "scale": scale.max(),
                 "zero": np.array(0, np.int8), "layer.fc.bias": BIAS}  # fmt: skip
    return model_of(nodes, constants)


def _dynamic_fused(w: np.ndarray) -> onnx.ModelProto:
    quantised, scale = _steps(w)
    made = node("DynamicQuantizeMatMul", "x layer.fc.weight_quantized scale zero layer.fc.bias",
                "y", domain="com.microsoft")  # fmt: skip
    constants = {"layer.fc.weight_quantized": quantised, "scale": scale.max(),
                 "zero": np.array(0, np.int8), "layer.fc.bias": BIAS}  # fmt: skip
    return model_of([made], constants)


def _four_bits(w: np.ndarray) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(_three(w), block_size=32, is_symmetric=True)
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    assert [item.op_type for item in made.graph.node] == ["MatMulNBits"]
    return made


def _point(w: np.ndarray) -> onnx.ModelProto:
    weight = np.ascontiguousarray(w.T)[:, :, None, None]
    made = node("Conv", "x layer.fc.weight layer.fc.bias", "y")
    return model_of([made], {"layer.fc.weight": weight, "layer.fc.bias": BIAS},
                    x=(TensorProto.FLOAT, ["batch", N_IN, "h", "w"]))  # fmt: skip


def _point_of_one(w: np.ndarray) -> onnx.ModelProto:
    weight = np.ascontiguousarray(w.T)[:, :, None]
    return model_of([node("Conv", "x layer.fc.weight", "y")], {"layer.fc.weight": weight},
                    x=(TensorProto.FLOAT, ["batch", N_IN, "length"]))  # fmt: skip


def _embedding(w: np.ndarray) -> onnx.ModelProto:
    return model_of([node("Gather", "layer.fc.weight x", "y")], {"layer.fc.weight": w},
                    x=(TensorProto.INT64, ["batch", "words"]))  # fmt: skip


_PIXELS = RNG.standard_normal((2, N_IN, 3, 5)).astype(np.float32)
FORMS = {
    "three sides": Form(_three, X3),
    "bias beside": Form(_bias, X2),
    "transpose": Form(_transpose, X2),
    "gemm": Form(_gemm, X2),
    "gemm of transposed data": Form(_gemm_transposed_data, X2),
    "constant": Form(_constant, X2),
    "fused": Form(_fused, X2),
    "half": Form(_half, X2.astype(np.float16), tolerance=2e-2),
    "cast": Form(_cast, X2, tolerance=1e-2),
    "twice": Form(_twice, X2),
    "nested graph": Form(_branch, X2),
    "function": Form(_function, X2),
    "old": Form(lambda w: _three(w, ir=3, opset=9), X3),
    "dequantised": Form(_dequantized, X2, merges=False),
    "quantised group": Form(_quantized_group, X2, merges=False, tolerance=6e-2),
    "dynamically quantised": Form(_dynamic, X2, merges=False),
    "dynamically quantised and fused": Form(_dynamic_fused, X2, merges=False),
    "four bits": Form(_four_bits, X3, merges=False),
    "convolution": Form(_point, _PIXELS, kind=TargetKind.CONV, kernel=(1, 1)),
    "convolution of one side": Form(
        _point_of_one, _PIXELS[:, :, 0], kind=TargetKind.CONV, kernel=(1,)
    ),
    "embedding": Form(_embedding, IDS, kind=TargetKind.EMBEDDING),
}


# --- a network, and what is run with it ----------------------------------------------------------

W2 = np.random.default_rng(5).standard_normal((N_OUT, N_OUT)).astype(np.float32) / 4


def network(*, head: bool = False) -> onnx.ModelProto:
    """Two layers, and a head of three classes."""
    nodes = [
        node("MatMul", "x first.weight", "a"),
        node("Tanh", "a", "t"),
        node("MatMul", "t second.weight", "h" if head else "y"),
    ]
    constants = {"first.weight": W, "second.weight": W2}
    if head:
        nodes.append(node("Gemm", "h head.weight head.bias", "y", transB=1))
        constants |= {"head.weight": np.ascontiguousarray(W2[:3]), "head.bias": BIAS[:3]}
    return model_of(nodes, constants)


def expected(first: np.ndarray | float = 0.0, second: np.ndarray | float = 0.0) -> np.ndarray:
    result: np.ndarray = np.tanh(X2 @ (W + first)) @ (W2 + second)
    return result


def second(seed: int = 0, rank: int = 4, scale: float = 1.0) -> Factors:
    return factors(seed, rank, scale, n_in=N_OUT)


def head_task(name: str, n_classes: int, *, bias: bool = True) -> tuple[Task, np.ndarray]:
    rng = np.random.default_rng(n_classes)
    weight = rng.standard_normal((n_classes, N_OUT)).astype(np.float16)
    values = {"head.weight": (Role.MODULE, weight)}
    shift = BIAS[:3]
    if bias:
        shift = rng.standard_normal(n_classes).astype(np.float16)
        values["head.bias"] = (Role.MODULE, shift)
    f = factors(n_classes)
    want = expected(delta(f)) @ weight.astype(np.float32).T + shift
    return Task(name, {"first": f}, privates=values), want


def with_adapter(model: Path, adapter: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(adapter))
    active = onnxruntime.RunOptions()
    active.add_active_adapter(loaded)
    result: np.ndarray = session.run(None, feeds, active)[0]
    return result
