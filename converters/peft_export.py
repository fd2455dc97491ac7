"""Source tasks as PEFT adapter folders.

PEFT ignores tensors that its config does not announce, without a word.  So the config is fitted to
the task: the task's own one where it came from PEFT, changed only where it would lose or misread a
tensor, and otherwise a new one.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rmmformat.converters.base import Options
from rmmformat.converters.files import atomic_folder, parse_json_object
from rmmformat.converters.peft_config import CONFIG_NAME, Scaling, settings_of
from rmmformat.converters.peft_layout import outer_module
from rmmformat.converters.peft_match import TargetRule, covers_module
from rmmformat.converters.safetensors_writer import FactorReader, Planned, write_safetensors
from rmmformat.errors import LossyConversionError, RmmError, UnsupportedError
from rmmformat.model import (
    Action,
    LedgerLine,
    PrivateInfo,
    Role,
    SourceTask,
    TargetInfo,
    TargetKind,
)

__all__ = ["export_adapter", "fit_config", "tensor_keys"]

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_KNOWN = frozenset({CONFIG_NAME, _WEIGHTS, "adapter_model.bin", "README.md"})
_HEADS = frozenset({"classifier", "score"})  # PEFT adds these for classification tasks by itself
_CLOSE = 1e-6  # relative: a scale that went through float32 still counts as the config's


def export_adapter(
    task: SourceTask, out: Path, *, force: bool, options: Options
) -> tuple[LedgerLine, ...]:
    """Write the folder (see :meth:`rmmformat.converters.peft.PeftExporter.export`)."""
    privates = {} if options.drop_private else dict(task.privates)
    ledger = [
        LedgerLine(f"tensor {name}", Action.IGNORED, "notice: dropped on request")
        for name in task.privates
        if name not in privates
    ]
    for name, private in privates.items():
        if private.role is Role.OTHER and ".lora_velora_embed" not in f".{name}":
            raise LossyConversionError(
                f"PEFT would not load the private tensor {name!r} of task {task.name!r}",
                hint="Leave it out with --drop-private.",
            )
    config_text, changes = fit_config(task, privates)
    ledger.extend(changes)
    keys = tensor_keys(task.targets, privates)
    reader = FactorReader(task)
    tensors: dict[str, Planned] = {}
    for target, info in task.targets.items():
        kernel = info.shape.kernel
        inner = info.shape.n_in // math.prod(kernel)
        key_a, key_b = keys[target]
        tensors[key_a], tensors[key_b] = reader.planned(
            target,
            (info.rank, inner, *kernel),
            (info.shape.n_out, info.rank, *(1,) * len(kernel)),
        )
        ledger.append(LedgerLine(f"tensor {key_a}", Action.USED, f"factor A of {target}"))
        ledger.append(LedgerLine(f"tensor {key_b}", Action.USED, f"factor B of {target}"))
    for name in privates:
        (key,) = keys[name]
        tensors[key] = reader.private(name)
        ledger.append(LedgerLine(f"tensor {key}", Action.STORED, f"private tensor {name}"))
    if len(tensors) < 2 * len(task.targets) + len(privates):
        raise RmmError(f"two tensors of task {task.name!r} would get one name in PEFT")

    with atomic_folder(out, force=force, known=_KNOWN) as folder:
        (folder / CONFIG_NAME).write_text(config_text, encoding="utf-8", newline="")
        write_safetensors(folder / _WEIGHTS, tensors, {"format": "pt"})
    return tuple(ledger)


def tensor_keys(
    targets: Mapping[str, TargetInfo], privates: Mapping[str, PrivateInfo]
) -> dict[str, tuple[str, ...]]:
    """Name every tensor as PEFT does: two names a target, one a private tensor."""
    keys: dict[str, tuple[str, ...]] = {}
    for name, info in targets.items():
        module = _PREFIX + _inside(name, targets)
        if info.shape.kind is TargetKind.EMBEDDING:
            keys[name] = (f"{module}.lora_embedding_A", f"{module}.lora_embedding_B")
        else:
            keys[name] = (f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    for name, private in privates.items():
        owner, _, leaf = name.rpartition(".")
        if private.role in (Role.FACTOR_BIAS, Role.MAGNITUDE):
            owner, _, leaf = _split_factor_name(name)
            keys[name] = (f"{_PREFIX}{_inside(owner, targets)}.{leaf}",)
        elif private.role in (Role.MODULE, Role.BIAS) and owner in targets:
            # PEFT moves the adapted module's own parameters under base_layer.
            keys[name] = (f"{_PREFIX}{_inside(owner, targets)}.base_layer.{leaf}",)
        else:
            keys[name] = (_PREFIX + (_inside(name, targets) if owner else name),)
    return keys


def _split_factor_name(name: str) -> tuple[str, str, str]:
    for leaf in (".lora_B.bias", ".lora_magnitude_vector"):
        if name.endswith(leaf):
            return name[: -len(leaf)], ".", leaf[1:]
    raise RmmError(f"private tensor {name!r} is named for no factor that it could belong to")


def _inside(name: str, targets: Iterable[str]) -> str:
    """Put ``base_layer`` behind an adapted module that ``name`` leads through."""
    known = targets if isinstance(targets, Mapping) else set(targets)
    parts = name.split(".")
    kept: list[str] = []
    for n, part in enumerate(parts):
        if n and ".".join(parts[:n]) in known and not part.startswith("lora_"):
            kept.append("base_layer")
        kept.append(part)
    return ".".join(kept)


def fit_config(
    task: SourceTask, privates: Mapping[str, PrivateInfo]
) -> tuple[str, list[LedgerLine]]:
    """Return the text of a config under which PEFT loads every tensor at the task's scales.

    Raises
    ------
    UnsupportedError
        No config expresses the task.
    """
    original = _original(task)
    fields = dict(original) if original is not None else _blank(task)
    why: dict[str, str] = {}

    def change(field: str, value: Any, reason: str) -> None:
        if fields.get(field) != value or type(fields.get(field)) is not type(value):
            fields[field] = value
            why[field] = reason

    _fit_kind(task, fields, change)
    _fit_scales(task, fields, change)
    _fit_modules(task, privates, fields, change)
    _fit_roles(task, privates, fields, change)
    if original is not None and not why:
        return task.config_text, [LedgerLine(f"file {CONFIG_NAME}", Action.USED, "as it was")]
    # Not sort_keys: the order inside a pattern decides which key comes first.
    text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
    if original is None:
        return text, [LedgerLine(f"file {CONFIG_NAME}", Action.USED, "written anew")]
    return text, [
        LedgerLine(f"field {field}", Action.USED, f"notice: changed, {reason}")
        for field, reason in sorted(why.items())
    ]


def _original(task: SourceTask) -> dict[str, Any] | None:
    """Parse the task's own config, if it is one of PEFT's for plain LoRA."""
    if not task.config_text:
        return None
    try:
        fields = parse_json_object(task.config_text, task.path)
        settings_of(fields, task.path)
    except RmmError:
        return None
    looks_like_peft = "peft_type" in fields or "lora_alpha" in fields or "target_modules" in fields
    return fields if looks_like_peft else None


def _blank(task: SourceTask) -> dict[str, Any]:
    return {
        "base_model_name_or_path": task.base_model or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "task_type": None,
    }


_Change = Callable[[str, Any, str], None]


def _fit_kind(task: SourceTask, fields: dict[str, Any], change: _Change) -> None:
    if fields.get("peft_type") != "LORA":
        change("peft_type", "LORA", "it was absent")
    if fields.get("base_model_name_or_path") is None and task.base_model:
        change("base_model_name_or_path", task.base_model, "it was absent")
    if fields.get("bias", "none") is None:
        change("bias", "none", "null is not a value of it")
    linear = [i.shape for i in task.targets.values() if i.shape.kind is TargetKind.LINEAR]
    if linear and bool(fields.get("fan_in_fan_out")) != any(shape.transposed for shape in linear):
        change("fan_in_fan_out", any(shape.transposed for shape in linear), "as the targets are")


def _fit_scales(task: SourceTask, fields: dict[str, Any], change: _Change) -> None:
    wanted: dict[str, tuple[int, float]] = {}
    for name, info in task.targets.items():
        decides = outer_module(name, task.targets)
        if wanted.setdefault(decides, (info.rank, info.scale)) != (info.rank, info.scale):
            raise UnsupportedError(
                f"{name!r} lies inside {decides!r} with another rank or scale; PEFT has one for "
                "both"
            )
    if _scales_fit(fields, wanted):
        return
    reason = "so that ranks and scales are the task's"
    alphas = {module: _alpha(rank, scale) for module, (rank, scale) in wanted.items()}
    ranks = {module: rank for module, (rank, _) in wanted.items()}
    rank = _commonest(ranks.values())
    alpha = _commonest(alphas.values())
    change("use_rslora", False, reason)
    change("r", rank, reason)
    change("lora_alpha", alpha, reason)
    for name_it in (lambda module: module, lambda module: f"^{re.escape(module)}"):
        rank_pattern = {name_it(m): r for m, r in sorted(ranks.items()) if r != rank}
        alpha_pattern = {name_it(m): a for m, a in sorted(alphas.items()) if a != alpha}
        trial = {**fields, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
        if _scales_fit(trial, wanted):
            change("rank_pattern", rank_pattern, reason)
            change("alpha_pattern", alpha_pattern, reason)
            return
    raise UnsupportedError(f"no pattern of PEFT's gives every target of {task.name!r} its scale")


def _commonest(values: Iterable[Any]) -> Any:
    counts = collections.Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _alpha(rank: int, scale: float) -> float | int:
    """Find alpha with ``alpha / rank`` equal to ``scale``, to the last bit where one exists."""
    alpha = scale * rank
    if round(alpha) / rank == scale:
        return round(alpha)
    for candidate in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
        if candidate / rank == scale:
            return candidate
    return alpha


def _scales_fit(fields: Mapping[str, Any], wanted: Mapping[str, tuple[int, float]]) -> bool:
    """Say whether PEFT would compute these ranks and scales from the config, and could load it."""
    try:
        settings = settings_of(fields, "")
        scaling = Scaling(settings, wanted)
        for module, (rank, scale) in wanted.items():
            if scaling.rank_of(module) != rank:
                return False
            if not math.isclose(scaling.scale_of(module, rank), scale, rel_tol=_CLOSE):
                return False
    except RmmError:
        return False
    plain = all(isinstance(fields.get(f, {}), dict) for f in ("rank_pattern", "alpha_pattern"))
    stated = fields.get("r") is not None and fields.get("lora_alpha") is not None
    ranks = [fields.get("r"), *settings.fields.get("rank_pattern", {}).values()] if plain else []
    return plain and stated and all(type(rank) is int for rank in ranks)


def _fit_modules(
    task: SourceTask,
    privates: Mapping[str, PrivateInfo],
    fields: dict[str, Any],
    change: _Change,
) -> None:
    """Fit the lists of modules that are adapted and that are saved in full."""
    outer = sorted({outer_module(target, task.targets) for target in task.targets})
    owners = {
        name.rpartition(".")[0] for name, info in privates.items() if info.role is Role.MODULE
    } - set(task.targets)
    entries = fields.get("modules_to_save")
    if entries is None:
        # Only for a config of our own: in one of PEFT's, a tensor outside the list belongs there
        # (a resized embedding is saved so) and is loaded straight into the model.
        saved = sorted(owner for owner in owners if owner) if "target_modules" not in fields else []
        if saved:
            change("modules_to_save", saved, "private tensors belong to these modules")
    else:
        kept = [e for e in entries if _holds_any(e, owners) or (e in _HEADS and owners)]
        if kept != entries:
            reason = "no tensors are there for the others, and PEFT insists on them"
            change("modules_to_save", kept or None, reason)
            if not owners and fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
                change("task_type", None, "PEFT would ask for the head that is not there")
    # A target is left out by PEFT if its path holds an entry of modules_to_save.
    rule = TargetRule(fields, outer, task.path)
    if all(rule.allows(module) for module in outer):
        return
    reason = "so that PEFT adapts every target"
    change("target_modules", outer, reason)
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if fields.get(field) is not None:
            change(field, None, reason)
    rule = TargetRule(fields, outer, task.path)
    for module in outer:
        if not rule.allows(module):
            raise UnsupportedError(
                f"task {task.name!r} adapts {module!r} and also saves a module of that path in "
                "full, and PEFT does either",
                hint="Drop the private tensors.",
            )


def _holds_any(entry: str, owners: Iterable[str]) -> bool:
    """Say whether PEFT wraps, for this entry, a module on the way to one of ``owners``."""
    for owner in owners:
        parts = owner.split(".")
        if any(covers_module([entry], ".".join(parts[: n + 1])) for n in range(len(parts))):
            return True
    return False


def _fit_roles(
    task: SourceTask,
    privates: Mapping[str, PrivateInfo],
    fields: dict[str, Any],
    change: _Change,
) -> None:
    """Fit the fields that announce magnitudes, biases and rows."""
    by_role: dict[Role, list[str]] = collections.defaultdict(list)
    for name, info in privates.items():
        by_role[info.role].append(name)
    magnitudes, factor_biases = by_role[Role.MAGNITUDE], by_role[Role.FACTOR_BIAS]
    if magnitudes and len(magnitudes) != len(task.targets):
        raise UnsupportedError(
            f"{len(magnitudes)} of {len(task.targets)} targets of {task.name!r} have a DoRA "
            "magnitude; PEFT wants one for all or for none"
        )
    for field, present in (("use_dora", magnitudes), ("lora_bias", factor_biases)):
        if bool(fields.get(field)) != bool(present):
            change(field, bool(present), "as the private tensors are")
    if by_role[Role.BIAS] and fields.get("bias", "none") == "none":
        on_targets = all(name.rpartition(".")[0] in task.targets for name in by_role[Role.BIAS])
        change("bias", "lora_only" if on_targets else "all", "biases are among the tensors")
    if by_role[Role.ROWS]:
        if not fields.get("trainable_token_indices"):
            raise UnsupportedError(
                f"task {task.name!r} replaces rows of an embedding, and its config does not say "
                "which",
                hint="Drop the private tensors.",
            )
    elif fields.get("trainable_token_indices") is not None:
        change("trainable_token_indices", None, "the rows are not there")
