"""How large an adapter must be so that every task of a collection fits: no torch in here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from rmmformat.collection import Collection, StoredTask
from rmmformat.converters.peft_export import fit_config
from rmmformat.converters.peft_layout import outer_module
from rmmformat.errors import InternalError, NotFoundError, OptionError, ShapeError, UnsupportedError
from rmmformat.format.reader import nearest
from rmmformat.model import (
    Array,
    Factors,
    LedgerLine,
    PrivateInfo,
    Role,
    SourceFile,
    TargetInfo,
    TargetKind,
    TargetShape,
)

__all__ = ["Room", "make_room", "privates_of"]

_OF_FACTORS = frozenset({Role.FACTOR_BIAS, Role.MAGNITUDE})
_SUPPORTED = _OF_FACTORS | {Role.MODULE, Role.BIAS}


def privates_of(task: StoredTask, private: bool) -> dict[str, PrivateInfo]:
    """Give a task's private tensors, or only those that belong to its factors."""
    return {n: i for n, i in task.privates.items() if private or i.role in _OF_FACTORS}


@dataclasses.dataclass(frozen=True)
class Room:
    """Targets with the rank and the scale that the live adapter has there, and private tensors.

    The scale is the tasks' where all have the same; else it is 1, and each task's own scale goes
    into its B.  Either way it stays the same from task to task: compiled models treat it as a
    constant.
    """

    targets: Mapping[str, TargetInfo]
    privates: Mapping[str, PrivateInfo]

    @property
    def dora(self) -> bool:
        """Whether every target has a magnitude."""
        return any(info.role is Role.MAGNITUDE for info in self.privates.values())

    def config_text(self, base_model: str) -> str:
        """Text of a PEFT config that makes this adapter.

        Raises
        ------
        UnsupportedError
            There is none.
        """
        announced = {
            name: info
            for name, info in self.privates.items()
            if info.role in _OF_FACTORS or (info.role is Role.MODULE and self.in_full(name))
        }
        return fit_config(_Blank(self.targets, announced, base_model), announced)[0]

    def in_full(self, name: str) -> bool:
        """Say whether a private tensor is part of a module that PEFT keeps in full per adapter."""
        owner = name.rpartition(".")[0]
        return bool(owner) and owner not in self.targets

    def check(self, task: StoredTask, privates: Mapping[str, PrivateInfo]) -> None:
        """Say why a task does not fit, if it does not.

        Raises
        ------
        NotFoundError
            It has targets or private tensors that the live adapter has no place for.
        ShapeError
            A rank is too large, or a shape is another one.
        UnsupportedError
            DoRA and plain LoRA in one adapter.
        """
        again = f"Load the task under another adapter_name, or load anew with tasks={[task.name]!r}"
        for name, info in task.targets.items():
            room = self.targets.get(name)
            if room is None:
                raise NotFoundError(
                    f"task {task.name!r} has target {name!r}, for which the live adapter has no "
                    "place",
                    path=task.path or None,
                    hint=f"{again} and those to switch between.",
                )
            check_shape(task.name, name, info.shape, room.shape)
            if info.rank > room.rank:
                raise ShapeError(
                    f"task {task.name!r} has rank {info.rank} at {name!r}, and the live adapter "
                    f"has {room.rank}",
                    path=task.path or None,
                    hint=f"Make room when loading: load(..., max_rank={info.rank}).",
                )
        for name, private in privates.items():
            place = self.privates.get(name)
            if place is None:
                raise NotFoundError(
                    f"task {task.name!r} has private tensor {name!r}, for which the live adapter "
                    "has no place",
                    path=task.path or None,
                    hint=f"{again} and those to switch between.",
                )
            if place.shape != private.shape:
                raise _private_shape(task.name, name, private, place.shape)
        magnitudes = {name for name, info in privates.items() if info.role is Role.MAGNITUDE}
        if self.dora != bool(magnitudes):
            what = ("plain LoRA", "DoRA") if self.dora else ("DoRA", "plain LoRA")
            raise UnsupportedError(
                f"task {task.name!r} is {what[0]}, and the live adapter is {what[1]}",
                path=task.path or None,
                hint=f"{again}.",
            )


@dataclasses.dataclass(frozen=True)
class _Blank:
    """The room as a task without a config of its own, for the exporter to make one."""

    targets: Mapping[str, TargetInfo]
    privates: Mapping[str, PrivateInfo]
    base_model: str
    name: str = "all"
    path: str = ""
    config_text: str = ""
    ledger: tuple[LedgerLine, ...] = ()
    files: tuple[SourceFile, ...] = ()

    # A config is made from descriptions alone; there are no values here to ask for.
    def factors(self, target: str) -> Factors:
        raise InternalError(f"the room at {target!r} has no values")

    def private_tensor(self, name: str) -> Array:
        raise InternalError(f"the room for {name!r} has no values")


def make_room(
    collection: Collection,
    task: str,
    others: Iterable[str],
    *,
    max_rank: int | None,
    private: bool,
    shape_of: Callable[[str], TargetShape | None],
    tensor_shape: Callable[[str], tuple[int, ...] | None],
    module_names: Callable[[], Iterable[str]],
) -> Room:
    """Decide ranks, scales and private tensors of an adapter.

    Parameters
    ----------
    task
        Must fit the model.
    others
        Tasks that there shall be room for, too.  What of them does not fit the model is left out;
        switching to them says so.
    max_rank
        Rank of every target; by default the largest that any of the tasks has there.
    private
        Whether private tensors count.
    shape_of, tensor_shape, module_names
        The model: shape of a module's base weight, shape of a tensor, all names; None for what is
        not there.

    Raises
    ------
    NotFoundError, ShapeError, UnsupportedError
        The model has no such module or tensor, or has it in another shape or class.
    OptionError
        `max_rank` is too small for `task`.
    """
    first = collection.source(task)
    shapes = {
        name: _fit(task, name, info, shape_of, module_names) for name, info in first.targets.items()
    }
    privates: dict[str, PrivateInfo] = {}
    for name, tensor in privates_of(first, private).items():
        _check_private(task, name, tensor, first.targets, tensor_shape)
        privates[name] = tensor
    dora = any(info.role is Role.MAGNITUDE for info in privates.values())
    entries: dict[str, list[TargetInfo]] = {name: [i] for name, i in first.targets.items()}
    for other in others:
        source = collection.source(other)
        theirs = privates_of(source, private)
        if any(info.role is Role.MAGNITUDE for info in theirs.values()) != dora:
            continue
        for name, info in source.targets.items():
            try:
                shapes.setdefault(name, _fit(other, name, info, shape_of, module_names))
            except (NotFoundError, ShapeError, UnsupportedError):
                continue
            if _same(shapes[name], info.shape):
                entries.setdefault(name, []).append(info)
        for name, tensor in theirs.items():
            try:
                _check_private(other, name, tensor, entries, tensor_shape)
            except (NotFoundError, ShapeError, UnsupportedError):
                continue
            privates.setdefault(name, tensor)
    if dora:  # PEFT wants a magnitude for every target
        entries = {n: i for n, i in entries.items() if f"{n}.lora_magnitude_vector" in privates}
    return Room(_ranks_and_scales(task, entries, shapes, max_rank), privates)


def _ranks_and_scales(
    task: str,
    entries: Mapping[str, list[TargetInfo]],
    shapes: Mapping[str, TargetShape],
    max_rank: int | None,
) -> dict[str, TargetInfo]:
    groups: dict[str, list[TargetInfo]] = {}  # PEFT has one rank and scale for each of these
    for name, infos in entries.items():
        groups.setdefault(outer_module(name, entries), []).extend(infos)
    targets = {}
    for name, infos in sorted(entries.items()):
        group = groups[outer_module(name, entries)]
        rank = max(info.rank for info in group) if max_rank is None else max_rank
        if infos[0].rank > rank:
            raise OptionError(
                f"task {task!r} has rank {infos[0].rank} at {name!r}, more than max_rank={rank}"
            )
        scales = {info.scale for info in group}
        scale = scales.pop() if len(scales) == 1 else 1.0
        targets[name] = TargetInfo(
            shapes[name], rank, scale or 1.0, infos[0].dtype_a, infos[0].dtype_b
        )
    return targets


def _fit(
    task: str,
    name: str,
    info: TargetInfo,
    shape_of: Callable[[str], TargetShape | None],
    module_names: Callable[[], Iterable[str]],
) -> TargetShape:
    shape = shape_of(name)
    if shape is None:
        raise NotFoundError(
            f"task {task!r} has target {name!r}, and the model has no such module",
            hint=nearest(name, tuple(module_names()))
            or "Names start in the class of model that the adapter was trained on.",
        )
    check_shape(task, name, info.shape, shape)
    return shape


def check_shape(task: str, name: str, got: TargetShape, want: TargetShape) -> None:
    """Compare a task's target with the model's module.

    Raises
    ------
    ShapeError
        They differ.
    """
    if not _same(got, want):
        raise ShapeError(
            f"task {task!r} has {_describe(got)} at {name!r}, and the model has {_describe(want)}"
        )


def _same(got: TargetShape, want: TargetShape) -> bool:
    # How the base stores its weight is PEFT's affair: factors do not depend on it.
    return (got.n_in, got.n_out, got.kind, got.kernel) == (
        want.n_in,
        want.n_out,
        want.kind,
        want.kernel,
    )


def _describe(shape: TargetShape) -> str:
    kind = {TargetKind.LINEAR: "a linear map", TargetKind.EMBEDDING: "an embedding"}.get(
        shape.kind, f"a convolution {shape.kernel}"
    )
    return f"{kind} from {shape.n_in} to {shape.n_out}"


def _check_private(
    task: str,
    name: str,
    info: PrivateInfo,
    targets: Iterable[str],
    tensor_shape: Callable[[str], tuple[int, ...] | None],
) -> None:
    if info.role not in _SUPPORTED:
        raise UnsupportedError(
            f"task {task!r} has private tensor {name!r} of role {info.role.name.lower()}, which "
            "cannot be switched",
            hint="Export the task (rmm export --to peft) and load it with PEFT, or pass "
            "private=False to go without its private tensors.",
        )
    if info.role in _OF_FACTORS:
        leaf = ".lora_B.bias" if info.role is Role.FACTOR_BIAS else ".lora_magnitude_vector"
        if not name.endswith(leaf) or name.removesuffix(leaf) not in targets:
            raise NotFoundError(f"private tensor {name!r} of task {task!r} belongs to no target")
        return
    shape = tensor_shape(name)
    if shape is None:
        raise NotFoundError(
            f"task {task!r} has private tensor {name!r}, and the model has no such tensor",
            hint="Use the class of model that the adapter was trained on, or pass private=False "
            "to go without its private tensors.",
        )
    if shape != info.shape:
        raise _private_shape(task, name, info, shape)


def _private_shape(task: str, name: str, info: PrivateInfo, shape: tuple[int, ...]) -> ShapeError:
    return ShapeError(
        f"task {task!r} has {name!r} with shape {info.shape}, and the model has {shape}",
        hint="Load the base model with that size (num_labels, for a head; resize_token_embeddings, "
        "for an embedding), or pass private=False to go without private tensors.",
    )
