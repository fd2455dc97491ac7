"""The work of LoRE on whole models: one estimate of their base, and a low-rank delta for each.

The mathematics is in :mod:`rmmformat.merge.lore`.  Here each weight of all models is gone through
once, streamed: the base is written as it is found, factors go to a temporary file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from rmmformat.blas import one_thread
from rmmformat.converters.base import Options
from rmmformat.converters.checkpoint_layout import (
    as_delta,
    as_weight,
    in_layers,
    is_float,
    target_of,
    tied_output,
)
from rmmformat.converters.checkpoint_store import Checkpoint
from rmmformat.converters.files import describe_file
from rmmformat.converters.lore_base import write_model
from rmmformat.converters.safetensors_writer import Planned
from rmmformat.converters.spool import Spool
from rmmformat.errors import NonFiniteError, SourceError
from rmmformat.merge.lore import lore
from rmmformat.model import (
    Action,
    Array,
    LedgerLine,
    PrivateInfo,
    Role,
    TargetInfo,
    TargetShape,
)

__all__ = ["MARK", "LoreRun", "Part"]

#: Metadata key of the files of an estimated base.
MARK = "rmmformat_lore"

_FLOAT32 = np.dtype(np.float32)
Progress = Callable[[str, int, int], None]


class _Reads(Sequence[Array]):
    """The same weight of every model as (out, in); read from its file each time it is asked for."""

    def __init__(self, models: Sequence[Checkpoint], name: str, shape: TargetShape) -> None:
        self._models = models
        self._name = name
        self._shape = shape

    def __len__(self) -> int:
        return len(self._models)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | Sequence[Array]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return as_delta(self._models[index].read(self._name), self._shape)


@dataclasses.dataclass
class Part:
    """What was found for one task."""

    targets: dict[str, TargetInfo] = dataclasses.field(default_factory=dict)
    privates: dict[str, PrivateInfo] = dataclasses.field(default_factory=dict)
    ledger: list[LedgerLine] = dataclasses.field(default_factory=list)
    unchanged: int = 0
    energy: float = 0.0  # squared norm of the models' distances from the base
    residual: float = 0.0  # squared norm of what the deltas leave of them
    norm: float = 0.0  # squared norm of the models' matrices
    worst: float = 0.0


class LoreRun:
    """All models together; the work is done once, by whoever asks first.

    Attributes
    ----------
    objective
        Sum of the objective over all weights, before the first step and after each; once done.
    """

    def __init__(self, models: Mapping[str, Checkpoint], options: Options, base: Path) -> None:
        self.models = dict(models)
        self.options = options
        self.base = base
        self.objective: tuple[float, ...] = ()
        self.spool: Spool | None = None
        self._parts = {name: Part() for name in models}
        self._done = False
        self._lock = threading.Lock()
        self._shared, self._own = self._split()

    def _split(self) -> tuple[list[str], dict[str, list[str]]]:
        """Names that all models have in one shape, and those that each has for itself."""
        first_name, first = next(iter(self.models.items()))
        shapes = {name: meta.shape for name, meta in first.metas.items()}
        for model in self.models.values():
            for name in shapes.keys() & model.metas.keys():
                if model.metas[name].shape != shapes[name] and not in_layers(name):
                    shapes.pop(name)
            for name in shapes.keys() ^ model.metas.keys():
                if in_layers(name):
                    raise SourceError(
                        f"tensor {name!r} is in a layer, and only one of it and {first_name!r} "
                        "has it",
                        path=str(model.path),
                        hint="All models must be fine-tunes of one base.",
                    )
            for name in list(shapes):
                if name not in model.metas:
                    shapes.pop(name)
                elif model.metas[name].shape != shapes[name]:
                    raise SourceError(
                        f"tensor {name!r} has shape {model.metas[name].shape}, and "
                        f"{shapes[name]} in {first_name!r}",
                        path=str(model.path),
                        hint="All models must be fine-tunes of one base.",
                    )
        if not any(is_float(first.metas[name].dtype) for name in shapes):
            raise SourceError("no weights that all models have in common", path=str(first.path))
        own = {
            task: [name for name in model.metas if name not in shapes]
            for task, model in self.models.items()
        }
        return sorted(shapes), own

    def part(self, task: str) -> Part:
        """Give what was found for a task; does the work first."""
        self.prepare()
        return self._parts[task]

    def prepare(self, progress: Progress | None = None) -> None:
        """Estimate the base, write it, and keep every delta; once.

        Raises
        ------
        NonFiniteError
            A weight holds NaN or infinity.
        RmmError
            The base cannot be written.
        """
        with self._lock:
            if self._done:
                return
            self._parts = {name: Part() for name in self.models}
            self.spool = Spool()
            totals: list[float] = []
            first = next(iter(self.models.values()))
            tied, _ = tied_output(first, first.config)
            count = 0

            def reading(name: str, dtype: np.dtype[Any]) -> Callable[[], Array]:
                def read() -> Array:
                    nonlocal count
                    with one_thread():
                        array = self._estimate(name, dtype, name in tied, totals)
                    count += 1
                    if progress is not None:
                        progress("estimating the base", count, len(self._shared))
                    return array

                return read

            tensors = {}
            for name in self._shared:
                dtype = self._dtype(name)
                shape = first.metas[name].shape
                tensors[name] = Planned(dtype, shape, reading(name, dtype))
            write_model(self.base, tensors, first.config_text, MARK)
            self.objective = tuple(totals)
            self._keep_own()
            self._finish()
            self._done = True

    def _dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of the base's tensor: the models', or float32 where they differ."""
        dtypes = {model.metas[name].dtype for model in self.models.values()}
        return dtypes.pop() if len(dtypes) == 1 else _FLOAT32

    def _estimate(self, name: str, dtype: np.dtype[Any], tied: bool, totals: list[float]) -> Array:
        """Find the base's tensor of one name, and keep what each model has beside it."""
        models = list(self.models.values())
        first = models[0].read(name)
        self.check_finite(next(iter(self.models)), name, first)
        if all(_same(first, model.read(name)) for model in models[1:]):
            for part in self._parts.values():
                part.unchanged += 1
            return first.astype(dtype)
        found = None
        if not tied:
            found = target_of(name, first.shape, models[0].metas[name].dtype, models[0].config)
        for task, model in self.models.items():
            self.check_finite(task, name, model.read(name))
        if found is None:
            return self._mean(name, dtype, tied)
        target, shape = found
        thetas = _Reads(models, name, shape)
        try:
            with np.errstate(all="ignore"):
                result = lore(thetas, mu=self.options.mu, steps=self.options.steps)
        except np.linalg.LinAlgError as error:
            raise SourceError(
                f"tensor {name!r} has values too large to be decomposed", path=str(models[0].path)
            ) from error
        _add_up(totals, result.objective)
        base = np.ascontiguousarray(as_weight(result.theta0, shape)).astype(dtype)
        near: npt.NDArray[np.float64] = as_delta(base, shape).astype(np.float64)
        said = (
            f"objective {result.objective[0]:.6g} to {result.objective[-1]:.6g} in "
            f"{result.steps} steps"
        )
        for (task, part), theta, (a, b) in zip(
            self._parts.items(), thetas, result.factors, strict=True
        ):
            self._keep_delta(task, part, name, target, shape, theta, near, (a, b), said)
        return base

    def _keep_delta(
        self,
        task: str,
        part: Part,
        name: str,
        target: str,
        shape: TargetShape,
        theta: Array,
        near: npt.NDArray[np.float64],
        factors: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
        said: str,
    ) -> None:
        rank = len(factors[0]) if self.options.rank is None else self.options.rank
        a = np.ascontiguousarray(factors[0][:rank], np.float32)
        b = np.ascontiguousarray(factors[1][:, :rank], np.float32)
        distance = theta.astype(np.float64) - near
        left = distance - b.astype(np.float64) @ a.astype(np.float64)
        energy, residual = float(np.vdot(distance, distance)), float(np.vdot(left, left))
        part.energy += energy
        part.residual += residual
        part.norm += float(np.linalg.norm(theta.astype(np.float64)) ** 2)
        error = math.sqrt(residual / energy) if energy else 0.0
        part.worst = max(part.worst, error)
        if len(a):
            assert self.spool is not None  # the run has begun  # noqa: S101
            self.spool.put((task, target, "A"), a)
            self.spool.put((task, target, "B"), b)
            part.targets[target] = TargetInfo(
                shape, len(a), float(self.options.weight), _FLOAT32, _FLOAT32
            )
            text = f"rank {len(a)}, leaves {100.0 * error:.2f} % of the distance from the base"
        else:
            text = "no direction above mu: the base's own"
        part.ledger.append(LedgerLine(f"tensor {name}", Action.USED, f"{text}; {said}"))

    def _mean(self, name: str, dtype: np.dtype[Any], tied: bool) -> Array:
        """Give the mean of a tensor that has no low-rank form; each model keeps its own whole."""
        models = list(self.models.values())
        if is_float(models[0].metas[name].dtype):
            total = np.zeros(models[0].metas[name].shape)
            for model in models:
                total += model.read(name).astype(np.float64)
            mean = (total / len(models)).astype(dtype)
            what = "the base has the mean, kept whole"
        else:
            mean = models[0].read(name).astype(dtype)
            what = "no float: the base has the first model's, kept whole"
        why = "tied to the output weight; " if tied else ""
        for task in self.models:
            self._keep_whole(task, name, why + what)
        return mean

    def _keep_own(self) -> None:
        for task, names in self._own.items():
            for name in names:
                self._keep_whole(task, name, "not in all models in one shape; kept whole")

    def _keep_whole(self, task: str, name: str, why: str) -> None:
        part, meta = self._parts[task], self.models[task].metas[name]
        if self.options.drop_private:
            part.ledger.append(
                LedgerLine(f"tensor {name}", Action.IGNORED, f"notice: left out on request ({why})")
            )
            return
        part.privates[name] = PrivateInfo(Role.MODULE, meta.dtype, meta.shape)
        part.ledger.append(LedgerLine(f"tensor {name}", Action.STORED, why))

    def _finish(self) -> None:
        for part in self._parts.values():
            for name, info in part.privates.items():
                owner, _, leaf = name.rpartition(".")
                if leaf == "bias" and owner in part.targets:
                    part.privates[name] = dataclasses.replace(info, role=Role.BIAS)
            part.targets = dict(sorted(part.targets.items()))
            part.privates = dict(sorted(part.privates.items()))
            total = len(self._shared)
            line = f"{part.unchanged} of {total}: the same in all models, in the base alone"
            part.ledger.append(LedgerLine("unchanged tensors", Action.IGNORED, line))
            if self.objective:
                before, after = self.objective[0], self.objective[-1]
                leaves = math.sqrt(part.residual / part.norm) if part.norm else 0.0
                text = (
                    f"notice: the base is an estimate, written to {self.base}; objective "
                    f"{before:.6g} to {after:.6g}; base and deltas are {100.0 * leaves:.3g} % off "
                    "the model's matrices"
                )
                part.ledger.append(LedgerLine("base model", Action.USED, text))

    def check_finite(self, task: str, name: str, array: Array) -> None:
        """Raise NonFiniteError, with the tensor's name in the file, for NaN or infinity."""
        if not is_float(array.dtype):
            return
        n_bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if n_bad:
            model = self.models[task]
            raise NonFiniteError(
                f"tensor {model.key_of(name)!r}: {n_bad} of {array.size} values are NaN or "
                "infinite",
                path=str(model.path),
                hint="The model is broken.",
            )

    @functools.cached_property
    def base_id(self) -> str:
        """Name of the estimate: the same for the same models and parameters."""
        digest = hashlib.sha256(f"{self.options.mu} {self.options.steps}".encode())
        for model in self.models.values():
            for path in model.files:
                digest.update(describe_file(path).sha256.encode())
        return f"lore:{digest.hexdigest()[:16]}"


def _same(one: Array, other: Array) -> bool:
    """Say whether two tensors are the same, bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (one, other))
    return bool(np.array_equal(first, second))


def _add_up(totals: list[float], objective: Sequence[float]) -> None:
    """Add one weight's objective to the sums; one that stopped early keeps its last value."""
    length = max(len(totals), len(objective))
    last = totals[-1] if totals else 0.0
    totals.extend([last] * (length - len(totals)))
    for step in range(length):
        totals[step] += objective[min(step, len(objective) - 1)]
