"""One adapter of a model whose tensors are overwritten from task to task."""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from rmmformat.arena import Arena, ArenaPool
from rmmformat.cache import TaskCache
from rmmformat.collection import Collection, LoadedTask
from rmmformat.errors import RmmError, UnsupportedError
from rmmformat.model import Array, PrivateInfo, Role, TargetKind
from rmmformat.runtimes.peft_modules import Place, find_module, find_place
from rmmformat.runtimes.peft_room import Room, privates_of

__all__ = ["LiveAdapter", "Source"]

Source = Collection | TaskCache
_FORGOTTEN = frozenset({"_lock", "_plans", "_layouts", "_arena", "_views", "_kept_views"})


@dataclasses.dataclass(frozen=True)
class _Site:
    """A target in the model."""

    a: Place
    b: Place
    layer: Any  # PEFT's layer, in which they are


@dataclasses.dataclass(frozen=True)
class _Rest:
    """A private tensor in the model, and what it is while no task has it."""

    place: Place
    value: torch.Tensor | None  # None: zeros
    shared: bool  # part of the base model itself
    target: str | None = None  # the target that a bias of B belongs to


@dataclasses.dataclass(frozen=True)
class _Move:
    """A factor of a task, and where it goes."""

    target: str
    factor: str  # "A" or "B"
    place: Place
    shape: tuple[int, ...]  # in PEFT's layout
    multiplier: float


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What switching to one task does; checked once, as an open file does not change."""

    moves: tuple[_Move, ...]
    zeros: tuple[Place, ...]
    privates: tuple[tuple[str, float], ...]  # name, multiplier
    rests: tuple[_Rest, ...]
    layout: tuple[tuple[str, int], ...]  # one object for all tasks of one layout


class LiveAdapter:
    """An adapter that :func:`rmmformat.runtimes.peft.load` put into a model.

    It survives ``copy.deepcopy`` and pickling together with its model, and ``model.to(...)``.

    Attributes
    ----------
    name
        PEFT's name of the adapter.
    task
        The task whose values it has now; None if a switch was broken off half-way.
    """

    def __init__(self, base: nn.Module, name: str, room: Room, private: bool) -> None:
        self.name = name
        self.task: str | None = None
        self._base = base
        self._room = room
        self._private = private
        self._sites: dict[str, _Site] = {}
        self._rests: dict[str, _Rest] = {}
        self._bind()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _FORGOTTEN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        return f"<LiveAdapter {self.name!r}: task {self.task!r}, {len(self._sites)} targets>"

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets that there is room for."""
        return tuple(self._sites)

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of the live adapter at each target; tasks of smaller ranks are filled with zeros."""
        return {name: info.rank for name, info in self._room.targets.items()}

    @property
    def scales(self) -> Mapping[str, float]:
        """PEFT's constant ``scaling`` of each target; where a task's scale differs, B has it."""
        return {name: info.scale for name, info in self._room.targets.items()}

    # --- the model ----------------------------------------------------------------------------

    def _bind(self) -> None:
        for target, info in self._room.targets.items():
            layer: Any = find_module(self._base, target)
            embedding = info.shape.kind is TargetKind.EMBEDDING
            groups: list[Any] = [
                getattr(layer, f"lora_{'embedding_' if embedding else ''}{letter}", None)
                for letter in "AB"
            ]
            if any(group is None or self.name not in group for group in groups):
                raise UnsupportedError(f"PEFT has put no adapter at {target!r}")
            a, b = (
                Place(group._parameters, self.name)
                if embedding
                else Place(group[self.name]._parameters, "weight")
                for group in groups
            )
            if a.tensor.shape[0] != info.rank:
                raise UnsupportedError(
                    f"PEFT gave {target!r} rank {a.tensor.shape[0]}, expected {info.rank}"
                )
            # PEFT computed it from alpha and rank, and may be off by a last digit.
            layer.scaling[self.name] = info.scale
            self._sites[target] = _Site(a, b, layer)
        for name, private in self._room.privates.items():
            self._rests[name] = self._find_rest(name, private)
        if any(info.role is Role.FACTOR_BIAS for info in self._room.privates.values()):
            for target in self._sites:  # PEFT gives a bias to all of them
                name = f"{target}.lora_B.bias"
                self._rests.setdefault(name, self._factor_bias(target))

    def _factor_bias(self, target: str) -> _Rest:
        container = self._sites[target].layer.lora_B[self.name]
        return _Rest(Place(container._parameters, "bias"), None, False, target)

    def _find_rest(self, name: str, info: PrivateInfo) -> _Rest:
        if info.role is Role.FACTOR_BIAS:
            return self._factor_bias(name.removesuffix(".lora_B.bias"))
        if info.role is Role.MAGNITUDE:
            layer = self._sites[name.removesuffix(".lora_magnitude_vector")].layer
            place = Place(layer.lora_magnitude_vector[self.name]._parameters, "weight")
            # Without factors, the norm of the base weight: PEFT starts with that.
            rest = _Rest(place, place.tensor.detach().clone(), False)
        else:
            found = find_place(self._base, name, self.name)
            if found is None:
                raise UnsupportedError(f"PEFT has left no place for {name!r}")
            if found.original is not None:
                rest = _Rest(found, found.original, False)
            elif info.role is Role.MODULE and self._room.in_full(name):
                raise UnsupportedError(f"PEFT keeps no copy of {name!r} for the adapter")
            else:
                rest = _Rest(found, found.tensor.detach().clone(), True)
        if tuple(rest.place.tensor.shape) != info.shape:
            raise UnsupportedError(
                f"PEFT has {name!r} with shape {tuple(rest.place.tensor.shape)}, and the task has "
                f"{info.shape}"
            )
        return rest

    @property
    def shared(self) -> tuple[str, ...]:
        """Private tensors that are written over the base model's own (biases, for instance)."""
        return tuple(name for name, rest in self._rests.items() if rest.shared)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that is the adapter's own."""
        for site in self._sites.values():
            yield from (place.table[place.key] for place in (site.a, site.b))
        for rest in self._rests.values():
            if not rest.shared and isinstance(rest.place.tensor, nn.Parameter):
                yield rest.place.table[rest.place.key]

    def cast(self, dtype: torch.dtype) -> None:
        """Give the factors, and magnitudes and biases of theirs, another dtype."""
        places = [place for site in self._sites.values() for place in (site.a, site.b)]
        for name, info in self._room.privates.items():
            if info.role in (Role.MAGNITUDE, Role.FACTOR_BIAS):
                places.append(self._rests[name].place)
        for place in places:
            old = place.table[place.key]
            if old.dtype != dtype:
                place.table[place.key] = nn.Parameter(old.detach().to(dtype), old.requires_grad)

    def restore_shared(self) -> None:
        """Give the base model back what tasks wrote over."""
        with torch.no_grad():
            for rest in self._rests.values():
                if rest.shared:
                    _rest(rest)

    def check(self) -> None:
        """Make sure that the adapter is in the model and not merged.

        Raises
        ------
        RmmError
            It is not there any more, or merged into the base weights.
        """
        target, site = next(iter(self._sites.items()))
        there = find_module(self._base, target) is site.layer
        if not there or self.name not in site.layer.scaling:
            raise RmmError(
                f"adapter {self.name!r} is no longer in the model", hint="Load the task again."
            )
        for target, site in self._sites.items():
            if self.name in site.layer.merged_adapters:
                raise RmmError(
                    f"adapter {self.name!r} is merged into the base weight of {target!r}",
                    hint="Call unmerge_adapter() first.",
                )

    # --- switching ----------------------------------------------------------------------------

    def _forget(self) -> None:
        """Start without a lock, plans and memory: what does not go into copies and pickles."""
        self._lock = threading.Lock()
        self._plans: weakref.WeakKeyDictionary[Collection, dict[str, _Plan]] = (
            weakref.WeakKeyDictionary()
        )
        self._layouts: dict[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]] = {}
        self._arena: Arena | None = None
        self._views: tuple[tuple[tuple[str, int], ...], list[torch.Tensor]] | None = None
        self._kept_views: dict[int, list[torch.Tensor]] = {}  # id of a cache's task

    def switch(self, source: Source, task: str, *, threads: int = 1) -> None:
        """Put another task's values in the place of the present ones.

        Parameters and errors as for :func:`rmmformat.runtimes.peft.switch`.
        """
        collection = source.collection if isinstance(source, TaskCache) else source
        with self._lock:
            self.check()
            plans = self._plans.setdefault(collection, {})
            plan = plans.get(task)
            if plan is None:
                plan = plans[task] = self._make_plan(collection, task)
            if isinstance(source, TaskCache):
                values = self._kept(source.get(task), plan)
            else:
                values = self._reconstruct(collection, task, plan, threads)
            privates = collection.privates(task) if plan.privates else {}
            others = [as_tensor(privates[name]) for name, _ in plan.privates]
            # Whatever can fail has been done; from here on, the model changes.
            self.task = None
            with torch.inference_mode():  # the one mode that may write to inference tensors, too
                for move, value in zip(plan.moves, values, strict=True):
                    tensor = move.place.table[move.place.key]
                    if move.multiplier == 1 and tensor.shape == value.shape:
                        tensor.copy_(value)
                    else:
                        _put(move, tensor, value)
                for place in plan.zeros:
                    place.tensor.zero_()
                for (name, multiplier), value in zip(plan.privates, others, strict=True):
                    _write(self._rests[name].place.tensor, value, multiplier)
                for rest in plan.rests:
                    _rest(rest)
            if self._room.dora:
                for site in self._sites.values():
                    _forget_norms(site.layer.lora_magnitude_vector[self.name])
            self.task = task

    def _reconstruct(
        self, collection: Collection, task: str, plan: _Plan, threads: int
    ) -> list[torch.Tensor]:
        n_bytes = collection.arena_bytes(task)
        if self._arena is None or self._arena.nbytes < n_bytes:
            self._views, self._arena = None, ArenaPool().lend(n_bytes)
        loaded = collection.load(task, out=self._arena, threads=threads)
        # Tasks of one collection mostly have one layout, so the views are made once.
        if self._views is None or self._views[0] is not plan.layout:
            self._views = (plan.layout, _values(loaded, plan))
        return self._views[1]

    def _kept(self, loaded: LoadedTask, plan: _Plan) -> list[torch.Tensor]:
        values = self._kept_views.get(id(loaded))
        if values is None:
            values = self._kept_views[id(loaded)] = _values(loaded, plan)
            # They go when the cache lets the task go, so that its budget holds.
            weakref.finalize(loaded, self._kept_views.pop, id(loaded), None).atexit = False
        return values

    def _make_plan(self, collection: Collection, task: str) -> _Plan:
        source = collection.source(task)
        targets = source.targets
        privates = privates_of(source, self._private)
        self._room.check(source, privates)

        def multiplier(target: str) -> float:
            ours, theirs = self._room.targets[target].scale, targets[target].scale
            return 1.0 if theirs == ours else theirs / ours

        moves = []
        for target, info in targets.items():
            site, kernel = self._sites[target], info.shape.kernel
            shape_a = (info.rank, info.shape.n_in // math.prod(kernel), *kernel)
            shape_b = (info.shape.n_out, info.rank, *(1 for _ in kernel))
            moves.append(_Move(target, "A", site.a, shape_a, 1.0))
            moves.append(_Move(target, "B", site.b, shape_b, multiplier(target)))
        values = []
        for name in privates:
            owner = self._rests[name].target  # PEFT multiplies the bias of B by its scale, too
            values.append((name, 1.0 if owner is None else multiplier(owner)))
        layout = tuple((target, info.rank) for target, info in targets.items())
        return _Plan(
            tuple(moves),
            tuple(p for t, s in self._sites.items() if t not in targets for p in (s.a, s.b)),
            tuple(values),
            tuple(rest for name, rest in self._rests.items() if name not in privates),
            self._layouts.setdefault(layout, layout),
        )


def _values(loaded: LoadedTask, plan: _Plan) -> list[torch.Tensor]:
    """View a task's factors as the plan's moves want them."""
    return [
        as_tensor(getattr(loaded[move.target], move.factor)).reshape(move.shape)
        for move in plan.moves
    ]


def _put(move: _Move, tensor: torch.Tensor, value: torch.Tensor) -> None:
    if tensor.shape == value.shape:
        _write(tensor, value, move.multiplier)
        return
    dim = 0 if move.factor == "A" else 1  # where the rank is
    rank = value.shape[dim]
    _write(tensor.narrow(dim, 0, rank), value, move.multiplier)
    tensor.narrow(dim, rank, tensor.shape[dim] - rank).zero_()


def _write(tensor: torch.Tensor, value: torch.Tensor, multiplier: float) -> None:
    if multiplier == 1:
        tensor.copy_(value)
    elif tensor.dtype == value.dtype == torch.float32 and tensor.device == value.device:
        torch.mul(value, multiplier, out=tensor)
    else:
        tensor.copy_(value.float() * multiplier)


def _rest(rest: _Rest) -> None:
    if rest.value is None:
        rest.place.tensor.zero_()
    else:
        rest.place.tensor.copy_(rest.value)


def _forget_norms(magnitude: Any) -> None:
    cached = getattr(magnitude, "_dora_cache", None)
    if cached:
        cached.clear()


class _Opened:
    """An array's memory, offered as writable: torch has no read-only tensors, and warns."""

    def __init__(self, array: Array) -> None:
        self._array = array  # keeps the memory
        pointer, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (pointer, False)}


def as_tensor(array: Array) -> torch.Tensor:
    """View an array as a tensor that nobody writes to, without a copy.

    bfloat16 and float8 (ml_dtypes), which torch does not take from numpy, come as torch's own.
    """
    name = array.dtype.name
    foreign = array.dtype.kind == "V" or name.startswith(("bfloat", "float8"))
    raw: Any = array.view({1: np.uint8, 2: np.int16}[array.dtype.itemsize]) if foreign else array
    if not raw.flags.writeable:
        raw = np.asarray(_Opened(raw))
    tensor = torch.from_numpy(raw)
    return tensor.view(getattr(torch, name)) if foreign else tensor
