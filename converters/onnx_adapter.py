"""One task as an ``.onnx_adapter`` file, which ONNX Runtime's LoraAdapter loads.

Layout
------
The names are those of a prepared graph's inputs (:mod:`rmmformat.converters.onnx_names`):
``TARGET.lora_A`` (rank, n_in), ``TARGET.lora_B`` (n_out, rank) and ``TARGET.lora_scale`` (1,), and
``NAME.task`` for a parameter that the task replaces, such as a head.

ONNX Runtime looks at names, dtypes and shapes only when a model runs, and never at the versions in
the file.  With a prepared model as ``base`` they are checked here; without one, targets keep their
names and factors are f32, what graphs have as a rule.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.casting import FLOATS, cast_task
from rmmformat.converters.files import atomic_file
from rmmformat.converters.onnx_names import (
    PARAMETER_ROLES,
    Interface,
    parameter_input,
    parameter_names,
    read_interface,
)
from rmmformat.errors import (
    LossyConversionError,
    NotFoundError,
    OptionError,
    RmmError,
    SourceError,
)
from rmmformat.format.reader import nearest
from rmmformat.model import Action, Array, LedgerLine, SourceTask

__all__ = ["OnnxAdapterExporter", "adapter_parameters", "write_adapter"]

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which numpy has no dtype for


class OnnxAdapterExporter:
    """Writes a task as an ``.onnx_adapter`` file (layout: the module's docstring)."""

    name = "onnx"

    def export(
        self, task: SourceTask, out: Path, *, force: bool = False, options: Options = DEFAULTS
    ) -> tuple[LedgerLine, ...]:
        """Write the file ``out``; the whole task is held in memory.

        Raises
        ------
        LossyConversionError
            A private tensor has no place, or a value is too large for the dtype.
        NotFoundError
            The prepared model has no inputs for a target.
        OptionError
            The base model is not prepared, or takes another dtype.
        SourceError
            The base model cannot be read, or a shape is another one there.
        RmmError
            ``out`` exists and ``force`` is not set, or cannot be written.
        """
        interface = None
        if options.base is not None:
            interface = read_interface(options.base)
            if interface is None:
                raise OptionError(
                    "the base model has no inputs for factors",
                    path=str(options.base),
                    hint="Make them with `rmm onnx prepare`, and name its output here.",
                )
        parameters, ledger = adapter_parameters(task, interface, options)
        with atomic_file(out, force=force) as temporary:
            write_adapter(parameters, temporary)
        return ledger


def adapter_parameters(
    task: SourceTask, interface: Interface | None, options: Options = DEFAULTS
) -> tuple[dict[str, Array], tuple[LedgerLine, ...]]:
    """Give the parameters of a task by their names in the file, and the ledger.

    Parameters
    ----------
    interface
        What the graph takes; None if that is not known.

    Raises
    ------
    LossyConversionError, NotFoundError, OptionError, SourceError
        As :meth:`OnnxAdapterExporter.export`.
    """
    dtype = _dtype(interface, options)
    task = cast_task(task, dtype)
    found: dict[str, Array] = {}
    ledger: list[LedgerLine] = []

    def put(name: str, array: Array, item: str, action: Action, detail: str) -> None:
        if name in found:
            raise SourceError(f"two parameters of task {task.name!r} would be called {name!r}")
        found[name] = np.array(array, FLOATS[dtype], order="C")
        ledger.append(LedgerLine(item, action, detail))

    for target in task.targets:
        name = _target_name(task, target, interface, options)
        factors = task.factors(target)
        for key, array, part in zip(
            parameter_names(name),
            (factors.A, factors.B, np.array([factors.scale])),
            ("factor A", "factor B", "scale"),
            strict=True,
        ):
            put(key, array, f"{part} of {target}", Action.USED, f"parameter {key}")
    for name, info in task.privates.items():
        item = f"tensor {name}"
        place = interface.find_parameter(name) if interface is not None else name
        if info.role in PARAMETER_ROLES and place is not None:
            key, array = parameter_input(place), task.private_tensor(name)
            if interface is not None:
                _check_sides(task, name, array.shape, interface.parameters[place].shape)
            put(key, array, item, Action.STORED, f"parameter {key}")
        elif options.drop_private:
            ledger.append(LedgerLine(item, Action.IGNORED, "notice: dropped on request"))
        else:
            raise LossyConversionError(
                f"task {task.name!r}: the model takes no {info.role.name.lower()} {name!r}",
                hint="Leave it out with --drop-private, and apply it yourself.",
            )
    if interface is None:
        notice = "notice: names and dtypes are not checked; --base PREPARED.onnx checks them"
        ledger.append(LedgerLine("base model", Action.IGNORED, notice))
    return found, tuple(ledger)


def _dtype(interface: Interface | None, options: Options) -> str:
    if interface is None:
        return options.dtype or "f32"
    if options.dtype not in (None, interface.dtype):
        raise OptionError(
            f"dtype {options.dtype!r} is not what the model takes, {interface.dtype!r}",
            hint="Leave --dtype out.",
        )
    return interface.dtype


def _target_name(
    task: SourceTask, target: str, interface: Interface | None, options: Options
) -> str:
    if interface is None:
        return options.names.get(target, target)
    name = interface.find(target, options.names)
    if name is None:
        raise NotFoundError(
            f"task {task.name!r}: the model has no inputs for target {target!r}",
            hint=nearest(options.names.get(target, target), tuple(interface.targets)),
        )
    shape, slot = task.targets[target].shape, interface.targets[name]
    if shape.kind is not slot.kind:
        raise SourceError(
            f"target {target!r} of task {task.name!r} is of kind {shape.kind.name.lower()}, "
            f"{name!r} of the model of {slot.kind.name.lower()}"
        )
    _check_sides(task, target, (shape.n_in, shape.n_out), (slot.n_in, slot.n_out))
    return name


def _check_sides(
    task: SourceTask, what: str, have: tuple[int, ...], want: tuple[int | None, ...]
) -> None:
    good = len(have) == len(want) and all(w in (None, h) for h, w in zip(have, want, strict=True))
    if not good:
        raise SourceError(
            f"{what!r} of task {task.name!r} has sides {have}, the model expects {want}",
            hint="Was the model prepared from the base model of the collection?",
        )


def write_adapter(parameters: dict[str, Array], path: Path) -> None:
    """Write parameters with ONNX Runtime's own writer, in the order of their names.

    Raises
    ------
    RmmError
        The file cannot be written.
    """
    from onnxruntime import AdapterFormat, OrtValue

    values = {}
    for name in sorted(parameters):
        array = parameters[name]
        if array.dtype.name == "bfloat16":
            raw = array.view(np.uint16)
            values[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _BFLOAT16)
        else:
            values[name] = OrtValue.ortvalue_from_numpy(array)
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:  # it says no more than that
        raise RmmError("cannot write: ONNX Runtime failed to", path=str(path)) from error
