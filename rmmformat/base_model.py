"""Which base model a collection belongs to, by name and, where its weights are at hand, by them.

A delta on the wrong base is noise that no runtime notices.  So weights are fingerprinted
(specification, 9.1), shapes are compared, and tasks of different bases are kept apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.checkpoint_layout import base_names, target_of, tied_output
from rmmformat.converters.checkpoint_store import Checkpoint, find_weights, open_checkpoint
from rmmformat.errors import RmmError, SourceError
from rmmformat.model import SourceTask, TargetInfo, TargetKind

__all__ = [
    "ALGORITHM",
    "Fingerprint",
    "check_base",
    "common_base",
    "fingerprint",
    "first_base",
    "tensor_digest",
]

ALGORITHM = "rmm-base-1"
_WHOLE = 65_536  # bytes of a tensor up to which all of it is hashed
_BLOCKS, _BLOCK = 16, 4_096
_DIGITS = 8  # of a target's digest
_INSIST = "Name the right base with --base; --allow-base-mismatch insists."


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Digests of a base model's weights.

    Attributes
    ----------
    digest
        Of all of them, 64 hexadecimal digits.
    targets
        Of the weight behind each target, 8 hexadecimal digits.
    """

    digest: str
    targets: Mapping[str, str]

    @classmethod
    def of_metadata(cls, value: Any) -> Fingerprint | None:
        """Read one from metadata; None if there is none, or of another algorithm."""
        if not isinstance(value, Mapping) or value.get("algorithm") != ALGORITHM:
            return None
        return cls(str(value["digest"]), dict(value["targets"]))

    def as_metadata(self) -> dict[str, Any]:
        """Give it as the specification has it."""
        return {"algorithm": ALGORITHM, "digest": self.digest, "targets": dict(self.targets)}

    def agrees_with(self, other: Fingerprint) -> bool:
        """Say whether the two are of one base, as far as their targets can tell."""
        if self.digest == other.digest:
            return True
        common = self.targets.keys() & other.targets.keys()
        return bool(common) and all(self.targets[name] == other.targets[name] for name in common)

    def first_difference(self, other: Fingerprint) -> str | None:
        """Name the first target, in the order of names, for which the two differ."""
        common = sorted(self.targets.keys() & other.targets.keys(), key=str.encode)
        return next((n for n in common if self.targets[n] != other.targets[n]), None)

    def with_targets_of(self, other: Fingerprint) -> Fingerprint:
        """Add the targets of another one that agrees."""
        return Fingerprint(self.digest, {**other.targets, **self.targets})


def tensor_digest(base: Checkpoint, name: str) -> bytes:
    """Digest of one tensor: 32 bytes.

    Source: specification, 9.1.
    """
    meta = base.metas[name]
    n_bytes = math.prod(meta.shape) * meta.dtype.itemsize
    if n_bytes <= _WHOLE:
        parts = [(0, n_bytes)]
    else:
        last = n_bytes - _BLOCK
        parts = [(i * last // (_BLOCKS - 1), _BLOCK) for i in range(_BLOCKS)]
    sizes = ",".join(map(str, meta.shape))
    return hashlib.sha256(
        f"{meta.dtype.name}\n{sizes}\n".encode() + base.read_parts(name, parts)
    ).digest()


def fingerprint(base: Checkpoint, targets: Iterable[str]) -> Fingerprint:
    """Fingerprint a base; targets whose weight is not found have no digest of their own.

    Raises
    ------
    SourceError
        A file cannot be read.
    """
    digests = {name: tensor_digest(base, name) for name in base.metas}
    whole = hashlib.sha256()
    for name in sorted(digests, key=str.encode):
        whole.update(name.encode() + b"\0" + digests[name])
    found = _weights(base, targets)
    return Fingerprint(
        whole.hexdigest(),
        {target: digests[name].hex()[:_DIGITS] for target, name in sorted(found.items())},
    )


def _weights(base: Checkpoint, targets: Iterable[str]) -> dict[str, str]:
    """Target to the base's tensor that it adds to, for those that are found."""
    wanted = {f"{target}.weight": target for target in targets}
    found = {wanted[name]: other for name, other in base_names(wanted, base.metas).items()}
    embeddings, output = tied_output(base, base.config)
    if output is not None and output in wanted.values():
        found.setdefault(output, embeddings[0])
    return found


def _check_shapes(task: SourceTask, base: Checkpoint) -> None:
    found = _weights(base, task.targets)
    for target, info in task.targets.items():
        if target not in found:
            raise SourceError(
                f"task {task.name!r}: the base {base.path} has no weight for target {target!r}",
                path=task.path,
                hint=_INSIST,
            )
        shape = base.metas[found[target]].shape
        if shape not in _stored_shapes(info, found[target], base):
            raise SourceError(
                f"task {task.name!r}: target {target!r} adds {info.shape.n_in} inputs to "
                f"{info.shape.n_out} outputs, and the base's weight is {shape}",
                path=task.path,
                hint=_INSIST,
            )


def _stored_shapes(info: TargetInfo, name: str, base: Checkpoint) -> set[tuple[int, ...]]:
    """Shapes that the weight of a target may have."""
    shape = info.shape
    if shape.kind is TargetKind.CONV:
        return {(shape.n_out, shape.n_in // math.prod(shape.kernel), *shape.kernel)}
    if shape.kind is TargetKind.EMBEDDING:
        return {(shape.n_in, shape.n_out)}
    meta = base.metas[name]
    try:
        found = target_of(name, meta.shape, meta.dtype, base.config)
    except RmmError:
        found = None
    turned = found is not None and found[1].transposed
    # PEFT says once for all targets whether they are transposed, and corrects it by itself.
    either = shape.transposed or turned
    return {(shape.n_out, shape.n_in), *([(shape.n_in, shape.n_out)] if either else [])}


def first_base(tasks: Sequence[SourceTask]) -> str:
    """Id of the base model that the first task names, or the empty string.

    Tasks that were extracted beside their base know only its folder's name, so others come first.
    """
    ordered = sorted(tasks, key=lambda task: hasattr(task, "base_checkpoint"))
    return next((task.base_model for task in ordered if task.base_model), "")


def check_base(tasks: Sequence[SourceTask]) -> str:
    """Id of the one base model of all tasks.

    Raises
    ------
    RmmError
        Tasks name different base models.
    """
    named = [task for task in tasks if task.base_model]
    for task in named[1:]:
        if task.base_model != named[0].base_model:
            first = named[0]
            raise _other_name(task, task.base_model, f"task {first.name!r}", first.base_model)
    return named[0].base_model if named else ""


def common_base(
    tasks: Sequence[SourceTask],
    options: Options = DEFAULTS,
    *,
    allow_mismatch: bool = False,
    of_file: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Find the one base of all tasks, and of the file that they join.

    Parameters
    ----------
    tasks
        Those extracted beside their base bring it along.
    options
        ``base`` is that of the others; it is looked at if it holds weights.
    allow_mismatch
        Accept everything; nothing is then said of weights that differ.
    of_file
        The metadata key ``base_model`` of the file that the tasks join.

    Returns
    -------
    dict
        The key ``base_model`` as it is from now on: ``id`` and ``fingerprint``, each if known.

    Raises
    ------
    RmmError
        Names or weights differ; the message has the first target with another weight.
    SourceError
        A target does not fit the base's weight.
    """
    old = dict(of_file or {})
    known = Fingerprint.of_metadata(old.get("fingerprint"))
    agreed, differ = known, False
    for task, found in _fingerprints(tasks, options, allow_mismatch):
        if agreed is None:
            agreed = found
        elif agreed.agrees_with(found):
            agreed = agreed.with_targets_of(found)
        elif allow_mismatch:
            differ = True
        else:
            raise _other_weights(task, agreed, found)
    if not allow_mismatch:
        _check_names(tasks, str(old.get("id", "")), known is not None)
    if differ or (of_file is not None and known is None):
        # Of the tasks that the file has already, or of tasks of two bases, nothing new is known.
        agreed = known
    result = {**old, "id": old.get("id") or first_base(tasks)}
    if agreed is not None:
        result["fingerprint"] = agreed.as_metadata()
    return {key: value for key, value in result.items() if value}


def _other_weights(task: SourceTask, agreed: Fingerprint, found: Fingerprint) -> RmmError:
    target = agreed.first_difference(found)
    where = "" if target is None else f": the weight of {target!r} is the first that differs"
    return RmmError(
        f"task {task.name!r} belongs to a base with other weights than the rest{where}",
        path=task.path,
        hint="One file holds tasks of one base model. " + _INSIST,
    )


def _check_names(tasks: Sequence[SourceTask], of_file: str, known: bool) -> None:
    """Compare names of bases, as far as weights have not been compared already.

    Parameters
    ----------
    of_file
        Id that the file has for its base.
    known
        The file has a fingerprint.
    """
    # Those extracted beside their base have only its folder's name for it.
    extracted = [task for task in tasks if hasattr(task, "base_checkpoint")]
    named = [task for task in tasks if not hasattr(task, "base_checkpoint")]
    of_tasks = check_base(named)
    if of_file and of_tasks and of_file != of_tasks:
        raise _other_name(named[0], of_tasks, "the file", of_file)
    if of_file and not known:
        for task in extracted:
            if task.base_model != of_file:
                raise _other_name(task, task.base_model, "the file", of_file)


def _other_name(task: SourceTask, name: str, whose: str, other: str) -> RmmError:
    return RmmError(
        f"task {task.name!r} belongs to {name!r}, {whose} to {other!r}",
        path=task.path,
        hint="One file holds tasks of one base model; use --allow-base-mismatch if these are "
        "two names of one model.",
    )


def _fingerprints(
    tasks: Sequence[SourceTask], options: Options, allow_mismatch: bool
) -> list[tuple[SourceTask, Fingerprint]]:
    """Fingerprint every base that is at hand, each with the first task that it belongs to."""
    given = None
    if any(not hasattr(task, "base_checkpoint") for task in tasks):
        given = _given_base(options)
    groups: dict[str, tuple[Checkpoint, list[SourceTask]]] = {}
    for task in tasks:
        base: Checkpoint | None = getattr(task, "base_checkpoint", given)
        if base is None:
            continue
        if base is given and not allow_mismatch:
            _check_shapes(task, base)
        groups.setdefault(str(base.path.resolve()), (base, []))[1].append(task)
    return [
        (members[0], fingerprint(base, {name for task in members for name in task.targets}))
        for base, members in groups.values()
    ]


def _given_base(options: Options) -> Checkpoint | None:
    """Open ``options.base`` if it holds weights that may be read."""
    if options.base is None:
        return None
    if not options.base.exists():
        raise SourceError("no such file or folder", path=str(options.base), hint="See --base.")
    weights = find_weights(options.base)
    if weights is None or (".safetensors" not in weights.name and not options.allow_pickle):
        return None
    return open_checkpoint(options.base, options)
