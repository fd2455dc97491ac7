"""PEFT's ``adapter_config.json``: what it says about the weights, and what of it is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rmmformat.converters.files import read_json_object
from rmmformat.converters.names import check_name
from rmmformat.converters.peft_match import PatternKeys
from rmmformat.errors import SourceError, UnsupportedError
from rmmformat.model import Action, LedgerLine

__all__ = [
    "CONFIG_NAME",
    "DEFAULT_ALPHA",
    "LoraSettings",
    "Scaling",
    "read_settings",
    "settings_of",
]

CONFIG_NAME = "adapter_config.json"
_MODULES_LIMIT = 1000  # modules_to_save: each is compared with every module
DEFAULT_ALPHA = 8.0  # PEFT's, for a config that states a rank and no alpha

_CONVERTIBLE = (
    "In PEFT, save_as_lora(path, model, rank=...) writes many other adapter types as plain LoRA."
)
_INIT_HINT = (
    "Save it as plain LoRA: model.save_pretrained(path, path_initial_model_for_weight_conversion="
    "INITIAL_ADAPTER); the rank doubles."
)
# Initialisations that change the base weights, so that the adapter is right on no public base.
_MUTATING = {
    "pissa": _INIT_HINT,
    "olora": _INIT_HINT,
    "corda": _INIT_HINT,
    "lora_ga": _INIT_HINT,
    "loftq": "Merge it into the quantised base it was trained on and extract the difference.",
}
# Fields that, when set, make the adapter something else than scale * B @ A on a base weight.
_VARIANTS = {
    "alora_invocation_tokens": (
        "an activated LoRA (aLoRA), which acts only after its invocation tokens",
        "Serve it with PEFT.",
    ),
    "use_qalora": ("a QALoRA adapter, whose A acts on pooled inputs", "Merge it with PEFT."),
    "use_bdlora": ("a block-diagonal LoRA (BD-LoRA)", _CONVERTIBLE),
    "arrow_config": ("an Arrow router over several adapters", "Convert the adapters one by one."),
    "kasa_config": ("a KaSA adapter, which changes the base weights", "Merge it with PEFT."),
    "monteclora_config": ("a MonteCLoRA adapter, which samples its weights", _CONVERTIBLE),
    "target_parameters": (
        "an adapter of bare parameters (target_parameters, as in mixture-of-experts layers)",
        "Merge it with PEFT.",
    ),
    "layer_replication": (
        "an adapter of a model with replicated layers, whose layer numbers are not the base's",
        "Build the replicated model, save it, and name it as the base with the field removed.",
    ),
    "megatron_config": ("an adapter of Megatron's sharded layers", "Gather the shards first."),
    "enable_lora": (
        "a fused MergedLinear adapter of an old loralib or PEFT",
        "Split it into one adapter per projection.",
    ),
}
_STORED = "kept in the stored config"
_USED = {
    "peft_type": "",
    "r": "rank of every target that rank_pattern does not name",
    "rank_pattern": "ranks of the targets that its keys match",
    "fan_in_fan_out": "the base stores its weights as (in, out)",
    "use_dora": "magnitudes are private tensors",
    "lora_bias": "factor biases are private tensors",
}
_FOLDED = {"lora_alpha": "scale", "alpha_pattern": "scale", "use_rslora": "scale"}
_DESCRIBES = {
    "base_model_name_or_path": "name of the base model",
    "target_modules": "where PEFT puts adapters; the tensors decide here",
    "exclude_modules": "where PEFT puts no adapters; the tensors decide here",
    "layers_to_transform": "which layers PEFT adapts; the tensors decide here",
    "layers_pattern": "which layers PEFT adapts; the tensors decide here",
    "modules_to_save": "their tensors are private tensors",
    "trainable_token_indices": "the rows that the row tensors replace",
    "bias": "biases are private tensors",
    "task_type": "",
    "auto_mapping": "",
    "revision": "",
    "ensure_weight_tying": "tied targets are stored as the file has them",
    "peft_version": "",
}
_TRAINING = {
    *("lora_dropout", "init_lora_weights", "inference_mode", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "velora_config"),
    *("runtime_config", "merge_weights"),
}


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The fields of a config that decide about weights, checked for type and range.

    ``rank`` and ``alpha`` are None where the config does not state them.
    """

    fields: Mapping[str, Any]
    path: str
    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    use_dora: bool
    bias: str
    base_model: str
    modules_to_save: tuple[str, ...]
    ledger: tuple[LedgerLine, ...]


class Scaling:
    """Resolves rank and scale of one target after another, and remembers what did not apply.

    Parameters
    ----------
    settings
        The config.
    modules
        Every module that will be asked for (their lengths bound the work of matching).
    """

    def __init__(self, settings: LoraSettings, modules: Iterable[str]) -> None:
        self._settings = settings
        known = tuple(modules)
        self._ranks = PatternKeys(settings.rank_pattern, known, "rank_pattern", settings.path)
        self._alphas = PatternKeys(settings.alpha_pattern, known, "alpha_pattern", settings.path)

    def rank_of(self, module: str) -> int | None:
        """Rank that the config gives ``module``; None where it states none."""
        key = self._ranks.find(module)
        return self._settings.rank if key is None else self._settings.rank_pattern[key]

    def scale_of(self, module: str, rank: int) -> float:
        """Scale of ``module``: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

        Without any alpha it is PEFT's default of 8 over the rank if the config states a rank, and
        1 if it states neither: then nothing says what the tensors were scaled by.
        """
        settings = self._settings
        key = self._alphas.find(module)
        alpha = settings.alpha if key is None else settings.alpha_pattern[key]
        if alpha is None:
            if self.rank_of(module) is None:
                return 1.0
            alpha = DEFAULT_ALPHA
        scale = alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank
        if not math.isfinite(scale):
            raise SourceError(f"scale of {module!r} is not finite", path=settings.path)
        return scale

    def unused(self) -> Iterable[LedgerLine]:
        """List the pattern keys that decided for no target so far."""
        for field, keys in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
            for key in keys.keys:
                if key not in keys.used:
                    yield LedgerLine(
                        f"field {field}[{key!r}]", Action.IGNORED, "notice: decides for no target"
                    )


def read_settings(folder: Path) -> tuple[str, LoraSettings]:
    """Read the config of an adapter folder: its text, character for character, and the settings.

    Raises
    ------
    SourceError
        Missing, not strict JSON, or a field of the wrong type; names the field.
    UnsupportedError
        Not a plain LoRA adapter; says what it is and what to do.
    """
    path = folder / CONFIG_NAME
    text, fields = read_json_object(path)
    return text, settings_of(fields, str(path))


def settings_of(fields: Mapping[str, Any], path: str) -> LoraSettings:
    """Check a parsed config; raises as :func:`read_settings` does."""
    _check_kind(fields, path)
    get = _Reader(fields, path)
    base_model = get.text("base_model_name_or_path")
    modules_to_save = get.strings("modules_to_save")
    if len(modules_to_save) > _MODULES_LIMIT:
        raise get.wrong("modules_to_save", f"at most {_MODULES_LIMIT} modules")
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        if not isinstance(fields.get(field), str):
            get.strings(field)
    layers = fields.get("layers_to_transform")
    if layers is not None and not all(
        type(layer) is int for layer in (layers if isinstance(layers, list) else [layers])
    ):
        raise get.wrong("layers_to_transform", "integers")
    bias = "none" if fields.get("bias") is None else get.text("bias")
    if bias not in ("none", "all", "lora_only"):
        raise get.wrong("bias", "'none', 'all' or 'lora_only'")
    return LoraSettings(
        fields=fields,
        path=path,
        rank=get.rank("r", fields["r"]) if fields.get("r") is not None else None,
        alpha=(
            get.number("lora_alpha", fields["lora_alpha"])
            if fields.get("lora_alpha") is not None
            else None
        ),
        rank_pattern=get.pattern("rank_pattern", get.rank),
        alpha_pattern=get.pattern("alpha_pattern", get.number),
        use_rslora=get.flag("use_rslora"),
        fan_in_fan_out=get.flag("fan_in_fan_out"),
        use_dora=get.flag("use_dora"),
        bias=bias,
        base_model=check_name(base_model, "base model", path) if base_model else "",
        modules_to_save=modules_to_save,
        ledger=tuple(_ledger(fields)),
    )


def _check_kind(fields: Mapping[str, Any], path: str) -> None:
    kind = fields.get("peft_type", "LORA")
    if not isinstance(kind, str):
        raise SourceError(f"field peft_type: expected a string, got {kind!r}", path=path)
    if kind.upper() != "LORA":
        raise UnsupportedError(
            f"an adapter of type {kind[:40]}, not LoRA", path=path, hint=_CONVERTIBLE
        )
    initial = fields.get("init_lora_weights")
    if isinstance(initial, str):
        for method, hint in _MUTATING.items():
            if initial.lower().startswith(method):
                raise UnsupportedError(
                    f"field init_lora_weights: {initial[:40]!r} changed the base weights, so the "
                    "adapter is wrong on the original base",
                    path=path,
                    hint=hint,
                )
    for field, (what, hint) in _VARIANTS.items():
        if fields.get(field):
            raise UnsupportedError(f"field {field}: this is {what}", path=path, hint=hint)


def _ledger(fields: Mapping[str, Any]) -> Iterable[LedgerLine]:
    for field, value in fields.items():
        item = f"field {field}"
        if field in _USED:
            yield LedgerLine(item, Action.USED, _USED[field])
        elif field in _FOLDED:
            yield LedgerLine(item, Action.FOLDED, _FOLDED[field])
        elif field in _DESCRIBES:
            detail = _DESCRIBES[field]
            yield LedgerLine(item, Action.STORED, f"{detail}; {_STORED}" if detail else _STORED)
        elif field in _TRAINING:
            yield LedgerLine(item, Action.IGNORED, f"concerns training alone; {_STORED}")
        elif field in _VARIANTS:
            yield LedgerLine(item, Action.USED, "not set")
        elif value is None or value is False or value in ([], {}, ""):
            yield LedgerLine(item, Action.STORED, f"unknown and not set; {_STORED}")
        else:
            yield LedgerLine(item, Action.STORED, f"notice: unknown to this release; {_STORED}")
    for field, detail in (
        ("peft_type", "notice: absent; taken for LORA"),
        ("r", "notice: absent; ranks taken from the tensors"),
        ("base_model_name_or_path", "notice: absent; the base model is not recorded"),
    ):
        if fields.get(field) is None:
            yield LedgerLine(f"field {field}", Action.IGNORED, detail)
    if fields.get("lora_alpha") is None:
        stated = fields.get("r") is not None
        detail = f"PEFT's default of {DEFAULT_ALPHA:g}" if stated else "scale 1"
        yield LedgerLine("field lora_alpha", Action.IGNORED, f"notice: absent; {detail}")
    if "bias" in fields and fields["bias"] is None:
        yield LedgerLine("field bias", Action.IGNORED, "notice: null; taken for 'none'")


class _Reader:
    """Typed access to the fields of a config."""

    def __init__(self, fields: Mapping[str, Any], path: str) -> None:
        self._fields = fields
        self._path = path

    def wrong(self, field: str, expected: str, value: Any = None) -> SourceError:
        got = repr(self._fields.get(field) if value is None else value)
        got = got if len(got) <= 80 else got[:80] + "..."
        return SourceError(f"field {field}: expected {expected}, got {got}", path=self._path)

    def text(self, field: str) -> str:
        value = self._fields.get(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.wrong(field, "a string")
        return value

    def flag(self, field: str) -> bool:
        value = self._fields.get(field)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(field, "true or false")
        return value

    def strings(self, field: str) -> tuple[str, ...]:
        value = self._fields.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(field, "a list of strings")
        return tuple(value)

    def number(self, field: str, value: Any) -> float:
        # Numbers in quotes are refused: PEFT cannot compute with them either.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(field, "a number", value)
        try:
            number = float(value)
        except OverflowError as error:
            raise self.wrong(field, "a finite number", f"{len(str(value))} digits") from error
        if not math.isfinite(number):
            raise self.wrong(field, "a finite number", value)
        return number

    def rank(self, field: str, value: Any) -> int:
        number = self.number(field, value)
        if not number.is_integer() or not 1 <= number <= 1 << 20:
            raise self.wrong(field, f"a whole number from 1 to {1 << 20}", value)
        return int(number)

    def pattern(self, field: str, check: Callable[[str, Any], Any]) -> dict[str, Any]:
        value = self._fields.get(field)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(field, "an object")
        return {key: check(f"{field}[{key[:80]!r}]", entry) for key, entry in value.items()}
