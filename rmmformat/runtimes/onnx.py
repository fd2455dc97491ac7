"""Tasks in ONNX Runtime: one session of the base model, and any task of a collection in it.

>>> from rmmformat.runtimes import onnx  # doctest: +SKIP
>>> session = onnx.Session("base.onnx", rmmformat.open("skills.rmm"))  # doctest: +SKIP
>>> logits, = session.run("sst2", {"input_ids": ids, "attention_mask": mask})  # doctest: +SKIP

:func:`prepare` writes the base model with inputs for factors, :func:`merge` one with the weights of
one task, :func:`adapter_file` lends a task as an ``.onnx_adapter`` file in memory.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmmformat.ahead import Ahead
from rmmformat.cache import DEFAULT_BUDGET, TaskCache
from rmmformat.collection import Collection, LoadedTask
from rmmformat.converters.casting import FLOATS
from rmmformat.converters.onnx_names import (
    METADATA_KEY,
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
    UnsupportedError,
)
from rmmformat.format.reader import nearest
from rmmformat.model import Array, Factors
from rmmformat.runtimes.onnx_bound import Bound
from rmmformat.runtimes.onnx_edit import PreparedTarget, PrepareReport, prepare, prepare_model
from rmmformat.runtimes.onnx_files import external_files, load_model
from rmmformat.runtimes.onnx_live import Live
from rmmformat.runtimes.onnx_memory import adapter_file
from rmmformat.runtimes.onnx_merge import MergeReport, merge

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue, SessionOptions

__all__ = [
    "MergeReport",
    "PrepareReport",
    "PreparedTarget",
    "Session",
    "adapter_file",
    "merge",
    "prepare",
]

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which numpy has no dtype for
_FOLDER = "session.model_external_initializers_file_folder_path"


class Session:
    """A base model in ONNX Runtime that speaks as any task of a collection, or as itself.

    Tasks used last stay reconstructed under a budget (:class:`~rmmformat.cache.TaskCache`).  The
    factors of such a task are bound once, where they lie: running another task means running with
    another binding, and no value moves.

    Thread-safe: any number of threads may run any tasks at once.  They share the factors, which
    nobody writes to, and each run has a binding of its own, kept for the next one.

    Parameters
    ----------
    model
        A model file: prepared by :func:`prepare`, or a base model, which is prepared in memory.
    collection
        An open collection; closing it is the caller's.
    providers, session_options
        As for :class:`onnxruntime.InferenceSession`; by default the CPU's, and warnings are not
        shown (one an input says that it has a default).
    budget_bytes
        Memory for the factors of tasks that are kept.  With 0 none is: there is one place for
        factors, which stays bound and is written over by the next task, and runs of tasks wait for
        one another.
    names
        Target to the name of an initialiser or node of a base model, or to a target of a prepared
        one, where the rule cannot tell (:mod:`rmmformat.converters.onnx_names`).
    drop_private
        Run tasks without the private tensors that the model does not take; :meth:`privates` has
        them.  Otherwise running such a task is an error.
    allow_unmatched
        Run tasks without the targets that the model has no place for; likewise.

    Attributes
    ----------
    interface
        What the model takes of a task.
    input_names, output_names
        The inputs that every run has to be fed, and the outputs.
    cache
        The tasks in memory, and what happened so far.

    Raises
    ------
    SourceError, NotFoundError, UnsupportedError
        As :func:`prepare`.
    RmmError
        ONNX Runtime does not take the model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        collection: Collection,
        *,
        providers: Sequence[Any] | None = None,
        session_options: SessionOptions | None = None,
        budget_bytes: int = DEFAULT_BUDGET,
        names: Mapping[str, str] | None = None,
        drop_private: bool = False,
        allow_unmatched: bool = False,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UnsupportedError(
                "running ONNX models needs onnxruntime, which is not installed",
                hint='pip install "rmmformat[onnx]"',
            ) from error
        if session_options is None:
            session_options = onnxruntime.SessionOptions()
            session_options.log_severity_level = 3
        self._names, self._drop_private = dict(names or {}), drop_private
        self._allow_unmatched = allow_unmatched
        path = Path(model)
        source, interface = self._source(path, collection, session_options)
        providers = ["CPUExecutionProvider"] if providers is None else list(providers)
        try:
            self._session: InferenceSession = onnxruntime.InferenceSession(
                source, session_options, providers=providers
            )
        except Exception as error:  # its errors have no base of their own
            raise RmmError(f"ONNX Runtime refuses the model: {error}", path=str(path)) from error
        self.interface = self._told_interface(path) if interface is None else interface
        self.collection = collection
        self.cache = TaskCache(collection, budget_bytes, self.interface.dtype)
        own = {name for target in self.interface.targets for name in parameter_names(target)}
        own |= {parameter_input(name) for name in self.interface.parameters}
        optional = {item.name for item in self._session.get_overridable_initializers()}
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self._known = (optional - own).union(self.input_names)
        self._factor_inputs = own
        self.output_names = tuple(item.name for item in self._session.get_outputs())
        self._base = Bound({})
        self._live = (
            Live(collection, self._factor_values, self._parameter_values, Bound)
            if budget_bytes == 0 and self.interface.dtype == "f32"
            else None
        )
        self._bounds: dict[int, Bound] = {}
        self._lock = threading.Lock()
        self._ahead = Ahead()

    def __repr__(self) -> str:
        return f"<Session: {len(self.interface.targets)} targets, {self.cache!r}>"

    def _source(
        self, path: Path, collection: Collection, options: SessionOptions
    ) -> tuple[str | bytes, Interface | None]:
        """Give what to make a session of, and the interface as far as it is known before that."""
        if importlib.util.find_spec("onnx") is None:
            return str(path), None
        interface = read_interface(path)
        if interface is not None:
            return str(path), interface
        model = load_model(path)
        _, interface = prepare_model(
            model,
            collection=collection,
            names=self._names,
            allow_unmatched=self._allow_unmatched,
            path=str(path),
        )
        # Names are settled: the inputs are called as the collection calls its targets.
        self._names = {}
        if external_files(model, path):
            options.add_session_config_entry(_FOLDER, str(path.parent.resolve()))
        return model.SerializeToString(deterministic=True), interface

    def _told_interface(self, path: Path) -> Interface:
        """Read the interface of a prepared model through the runtime: a device needs no onnx."""
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise UnsupportedError(
                "the model has no inputs for factors, and making them needs onnx, which is not "
                "installed",
                path=str(path),
                hint='pip install "rmmformat[onnx]", or prepare the model elsewhere.',
            )
        return Interface.from_json(metadata[METADATA_KEY], str(path))

    def run(
        self,
        task: str | None,
        feeds: Mapping[str, Array | OrtValue],
        output_names: Sequence[str] | None = None,
    ) -> list[Array]:
        """Run the model as a task.

        Parameters
        ----------
        task
            Name of the task; None runs the base model.
        feeds
            The model's own inputs by name.
        output_names
            Outputs to give; by default all.

        Returns
        -------
        list of ndarray
            In the order of ``output_names``.

        Raises
        ------
        NotFoundError
            No such task, input or output; a target that the model has no place for.
        LossyConversionError
            The task has a private tensor that the model does not take, or a value that its dtype
            cannot hold.
        OptionError
            An input is missing.
        FormatError, UnsupportedError
            The task cannot be reconstructed.
        RmmError
            ONNX Runtime reports an error.
        """
        outputs = self.output_names if output_names is None else tuple(output_names)
        self._check_names(feeds, outputs)
        if task is None:
            return self._run(task, self._base, feeds, outputs)
        if self._live is None:
            self._ahead.call_off(task)
            return self._run(task, self._bound(task), feeds, outputs)
        with self._live.lock:
            return self._run(task, self._live.put(task), feeds, outputs)

    def prefetch(self, task: str) -> None:
        """Reconstruct and bind a task on a thread, so that :meth:`run` finds it.

        For a task that is expected next, while the current one is run.  It takes part in the budget
        as if it had been run, and if it cannot be had, :meth:`run` says so.

        Raises
        ------
        OptionError
            The session keeps no task (``budget_bytes=0``).
        """
        if self.cache.budget_bytes == 0:
            raise OptionError(
                "a session with budget_bytes=0 keeps no task, so none can be there before its run"
            )
        self._ahead.begin(task, lambda: self._bound(task))

    def _run(
        self,
        task: str | None,
        bound: Bound,
        feeds: Mapping[str, Array | OrtValue],
        outputs: Sequence[str],
    ) -> list[Array]:
        binding = bound.take(self._session)
        # Arrays are bound where they lie, so they have to live until the run is over.
        arrays = {
            name: np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value
            for name, value in feeds.items()
        }
        try:
            for name, value in arrays.items():
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(name, value)
                else:
                    binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            results: list[Array] = binding.copy_outputs_to_cpu()
        except Exception as error:
            what = "the base model" if task is None else f"task {task!r}"
            raise RmmError(f"ONNX Runtime cannot run {what}: {error}") from error
        binding.clear_binding_outputs()
        if feeds.keys() == set(self.input_names):  # all that the next run will overwrite
            bound.give_back(binding)
        return results

    def privates(self, task: str) -> Mapping[str, Array]:
        """Give the private tensors of a task that the model does not take, such as a head.

        Whoever runs with ``drop_private`` applies them to the outputs; read-only.
        """
        found = self.collection.privates(task)
        taken = self._parameter_inputs(task)
        return {name: array for name, array in found.items() if name not in taken}

    def _check_names(self, feeds: Mapping[str, Any], outputs: tuple[str, ...]) -> None:
        for name in feeds:
            if name in self._factor_inputs:
                raise OptionError(f"input {name!r} belongs to the task, and cannot be fed")
            if name not in self._known:
                raise NotFoundError(
                    f"the model has no input {name!r}", hint=nearest(name, self.input_names)
                )
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise OptionError(f"input {missing[0]!r} of the model is not fed")
        for name in outputs:
            if name not in self.output_names:
                raise NotFoundError(
                    f"the model has no output {name!r}", hint=nearest(name, self.output_names)
                )

    def _bound(self, task: str) -> Bound:
        """The factors of a task, reconstructed and wrapped now or before."""
        loaded = self.cache.get(task)
        key = id(loaded)
        with self._lock:
            bound = self._bounds.get(key)
            if bound is None:
                bound = self._bounds[key] = Bound(self._values(loaded))
                # It goes when the cache lets the task go, so that the budget holds.
                weakref.finalize(loaded, self._bounds.pop, key, None).atexit = False
        return bound

    def _values(self, loaded: LoadedTask) -> dict[str, OrtValue]:
        return self._factor_values(loaded) | self._parameter_values(loaded.name)

    def _factor_values(self, loaded: LoadedTask) -> dict[str, OrtValue]:
        values: dict[str, OrtValue] = {}
        scales: dict[float, OrtValue] = {}  # most targets have the same
        for target, factors in loaded.items():
            name = self.interface.find(target, self._names)
            if name is None:
                if self._allow_unmatched:
                    continue
                raise NotFoundError(
                    f"task {loaded.name!r}: the model has no inputs for target {target!r}",
                    hint=nearest(target, tuple(self.interface.targets)),
                )
            slot = self.interface.targets[name]
            sides = factors.A.shape[1], factors.B.shape[0]
            if sides != (slot.n_in, slot.n_out):
                raise SourceError(
                    f"task {loaded.name!r}: target {target!r} has {sides[0]} inputs and "
                    f"{sides[1]} outputs, the model has {slot.n_in} and {slot.n_out} there",
                    hint="Is this the base model of the collection?",
                )
            if not self._fits(factors):
                raise LossyConversionError(
                    f"task {loaded.name!r}: target {target!r} has values too large for f16",
                    hint="Prepare the model with --dtype f32.",
                )
            if factors.scale not in scales:
                scales[factors.scale] = _wrap(np.array([factors.scale], factors.A.dtype))
            given = (_wrap(factors.A), _wrap(factors.B), scales[factors.scale])
            wanted = parameter_names(name)
            if wanted[0] in values:
                raise SourceError(
                    f"task {loaded.name!r}: two targets are {name!r} in the model",
                    hint="Map them with names.",
                )
            values.update(zip(wanted, given, strict=True))
        return values

    def _fits(self, factors: Factors) -> bool:
        """Whether no value has become an infinity, which only float16 is too small for."""
        if self.interface.dtype != "f16":
            return True
        scale = np.float64(factors.scale).astype(np.float16)
        return bool(
            np.isfinite(scale) and np.isfinite(factors.A).all() and np.isfinite(factors.B).all()
        )

    def _parameter_inputs(self, task: str) -> dict[str, str]:
        """Private tensor to parameter, for those that the model takes."""
        found = {}
        for name, info in self.collection.source(task).privates.items():
            parameter = self.interface.find_parameter(name)
            if info.role in PARAMETER_ROLES and parameter is not None:
                found[name] = parameter
        return found

    def _parameter_values(self, task: str) -> dict[str, OrtValue]:
        taken = self._parameter_inputs(task)
        values: dict[str, OrtValue] = {}
        for name, array in self.collection.privates(task).items():
            if name not in taken:
                if self._drop_private:
                    continue
                raise LossyConversionError(
                    f"task {task!r} has the private tensor {name!r}, which the model does not take",
                    hint="Run with drop_private=True and apply Session.privates(task) yourself.",
                )
            parameter = self.interface.parameters[taken[name]]
            if len(array.shape) != len(parameter.shape) or any(
                side not in (None, have)
                for side, have in zip(parameter.shape, array.shape, strict=True)
            ):
                raise SourceError(
                    f"task {task!r}: {name!r} has shape {array.shape}, the model expects "
                    f"{parameter.shape}"
                )
            values[parameter_input(taken[name])] = _wrap(
                np.array(array, FLOATS[parameter.dtype], order="C")
            )
        return values


def _wrap(array: Array) -> OrtValue:
    """Show an array to ONNX Runtime where it lies; the result keeps it alive."""
    from onnxruntime import OrtValue

    if array.dtype == FLOATS["bf16"]:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array)
