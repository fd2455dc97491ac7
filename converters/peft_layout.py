"""What each tensor of a PEFT adapter is: a factor, a private tensor, or a reason to refuse."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from rmmformat.converters.laid_out import Layout
from rmmformat.converters.names import AdapterKey, check_name, parse_adapter_key, strip_wrappers
from rmmformat.converters.peft_config import LoraSettings, Scaling
from rmmformat.converters.peft_match import TargetRule, covers_module
from rmmformat.converters.tensors import TensorMeta
from rmmformat.errors import SourceError, UnsupportedError
from rmmformat.model import (
    Action,
    LedgerLine,
    PrivateInfo,
    Role,
    TargetInfo,
    TargetKind,
    TargetShape,
)

__all__ = ["PeftLayout", "lay_out", "outer_module"]

_FACTOR_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_ROWS = "token_adapter.trainable_tokens_delta"
_KOHYA = "Give the file as a source of its own: --from kohya."
_AS_LORA = "In PEFT, save_as_lora(path, model, rank=...) writes many other types as plain LoRA."
_LOWER = (
    "Save it in PEFT's form: torchtune's Hugging Face checkpointer does; for MLX, rename and "
    "transpose the factors."
)
# Path segments that give other methods and tools away: what each is, and the remedy.
_FOREIGN: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(rf"(?:.*\.)?(?:{pattern})(?:\..*)?"), what, hint)
    for pattern, what, hint in (
        (r"lora_[ab]", "a factor as torchtune and MLX name it", _LOWER),
        (r"lora_(?:unet|te\d?|transformer)_[^.]*", "a tensor in kohya's flattened naming", _KOHYA),
        (r"lora_(?:down|up)", "a factor as kohya names it", _KOHYA),
        (r"lora\.(?:down|up)|to_[a-z_]+_lora", "a factor as old diffusers name it", _KOHYA),
        (r"lora_mid", "the core of a Tucker-decomposed LoRA (LyCORIS)", _AS_LORA),
        (r"dora_scale", "a magnitude as kohya names it", _KOHYA),
        (r"hada_[wt]\d?(?:_[ab])?", "part of a LoHa adapter (LyCORIS)", _AS_LORA),
        (r"lokr_[wt]\d?(?:_[ab])?", "part of a LoKr adapter (LyCORIS)", _AS_LORA),
        (r"lora_E|ranknum", "part of an AdaLoRA adapter", _AS_LORA),
        (r"lora_diag", "part of a KaSA adapter", "Merge it with PEFT."),
        (r"vera_lambda_[bd]|vera_[AB]", "part of a VeRA adapter", _AS_LORA),
        (r"ia3_l", "part of an IA3 adapter", _AS_LORA),
        (r"oft_r|oft_diag|oft_blocks|boft_[RPs]", "part of an OFT adapter", _AS_LORA),
        (r"prompt_embeddings", "a prompt", "Prompts are not weights; keep them as they are."),
        (r"arrow_prototypes|lora_router", "part of a router over adapters", _AS_LORA),
    )
)


@dataclasses.dataclass
class PeftLayout(Layout):
    """Also counts how often each number of repeated prefixes was taken off a name."""

    prefixes: dict[int, int] = dataclasses.field(default_factory=dict)


def outer_module(name: str, targets: Container[str]) -> str:
    """Return the module whose config entries hold for the target ``name``.

    That is the target itself, but for one inside another: PEFT adapts the output projection of
    torch's multi-head attention together with the attention module, and under its settings.
    """
    end = name.find(".")
    while end >= 0:
        if name[:end] in targets:
            return name[:end]
        end = name.find(".", end + 1)
    return name


def lay_out(metas: Mapping[str, TensorMeta], settings: LoraSettings, *, keep: bool) -> PeftLayout:
    """Put every tensor in its place.

    Parameters
    ----------
    metas
        Tensors of the file.
    settings
        Its config.
    keep
        Whether private tensors are kept; else they are only listed.

    Raises
    ------
    SourceError
        No factors, or tensors that disagree with one another or with the config.
    UnsupportedError
        A tensor of another method or tool, or of a kind that cannot be stored.
    """
    return _Sorter(metas, settings, keep).run()


class _Sorter:
    def __init__(self, metas: Mapping[str, TensorMeta], settings: LoraSettings, keep: bool) -> None:
        self.metas = metas
        self.settings = settings
        self.keep = keep
        self.layout = PeftLayout()
        self.parts: dict[str, dict[str, str]] = {}  # module -> part -> key
        self.rest: dict[str, str] = {}  # key -> name inside the model
        self.adapters: dict[str, str] = {}  # adapter -> a key that holds its name

    def run(self) -> PeftLayout:
        self._split()
        modules = sorted(self.parts)
        if not modules:
            what = "holds no LoRA tensors" if self.metas else "holds no tensors at all"
            raise SourceError(f"the adapter {what}", path=self._path(), hint=self._gather_hint())
        scaling = Scaling(self.settings, modules)
        rule = TargetRule(self.settings.fields, modules, self.settings.path)
        for module in modules:
            self._target(module, scaling, rule)
        self._magnitudes()
        saved = {
            name.rpartition(".modules_to_save.")[0]
            for name in self.rest.values()
            if ".modules_to_save." in name
        }
        # Plain names first: with bias "all", PEFT saves biases of whole modules under both names,
        # and prefers the plain one when it loads them.
        for key, name in sorted(self.rest.items(), key=lambda item: ".modules_to_save." in item[1]):
            self._private(key, name, saved)
        self.layout.ledger.extend(scaling.unused())
        self.layout.targets = dict(sorted(self.layout.targets.items()))
        self.layout.privates = dict(sorted(self.layout.privates.items()))
        return self.layout

    # --- names --------------------------------------------------------------------------------

    def _split(self) -> None:
        for key, meta in self.metas.items():
            check_name(key, "tensor name", str(meta.path))
            name, n_prefixes = strip_wrappers(key)
            self.layout.prefixes[n_prefixes] = self.layout.prefixes.get(n_prefixes, 0) + 1
            parsed = parse_adapter_key(name)
            if parsed is None:
                self.rest[key] = name
            else:
                self._part(key, parsed)
            if 0 in meta.shape:
                raise self._fault(key, f"is empty: shape {meta.shape}", self._gather_hint())
        # Names of other tools only now: a module may be called as their parts are.
        for key, name in self.rest.items():
            for pattern, what, hint in _FOREIGN:
                if pattern.fullmatch(name):
                    raise self._unsupported(key, f"is {what}", hint)
        if len(self.adapters) > 1:
            names = ", ".join(sorted(self.adapters))
            raise SourceError(
                f"holds several adapters: {names}",
                path=self._path(),
                hint="Save each adapter in a folder of its own.",
            )

    def _part(self, key: str, parsed: AdapterKey) -> None:
        module = parsed.module
        if module.rpartition(".")[2] == "base_layer":
            raise self._unsupported(
                key,
                "is a factor for a bare parameter (target_parameters, as in mixture-of-experts "
                "layers)",
                "Merge it with PEFT.",
            )
        if not module:
            raise self._fault(key, "names no module")
        if parsed.adapter is not None:
            self.adapters.setdefault(parsed.adapter, key)
        parts = self.parts.setdefault(module, {})
        if parsed.part in parts and len(self.adapters) < 2:
            raise self._fault(key, f"and {parts[parsed.part]!r} are the same part of {module!r}")
        parts[parsed.part] = key

    def _name_of(self, module: str) -> str:
        """Drop ``base_layer`` behind a module that is itself adapted."""
        parts = module.split(".")
        return ".".join(
            part
            for n, part in enumerate(parts)
            if part != "base_layer" or ".".join(parts[:n]) not in self.parts
        )

    # --- factors ------------------------------------------------------------------------------

    def _target(self, module: str, scaling: Scaling, rule: TargetRule) -> None:
        parts = self.parts[module]
        embedded = any(part.startswith("lora_embedding") for part in parts)
        part_a, part_b = (
            ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A", "lora_B")
        )
        for part in parts:
            if embedded and part in ("lora_A", "lora_B", "lora_B.bias"):
                raise self._fault(parts[part], f"stands beside embedding factors of {module!r}")
        for part, other in ((part_a, part_b), (part_b, part_a)):
            if part not in parts:
                orphan = parts.get(other, next(iter(parts.values())))
                raise self._fault(orphan, f"has no {part} beside it")
        name = check_name(self._name_of(module), "target name", self._path())
        if name in self.layout.targets:
            raise self._fault(parts[part_a], f"is a second adapter of {name!r}")
        a, b = parts[part_a], parts[part_b]
        shape, rank = self._shape(a, b, TargetKind.EMBEDDING if embedded else None)
        decides = outer_module(module, self.parts)
        stated = scaling.rank_of(decides)
        if stated is not None and stated != rank:
            raise self._fault(a, f"has rank {rank}, and the config gives {decides!r} rank {stated}")
        scale = scaling.scale_of(decides, rank)
        self.layout.targets[name] = TargetInfo(
            shape, rank, scale, self.metas[a].dtype, self.metas[b].dtype
        )
        self.layout.target_keys[name] = (a, b)
        stray = rule.allows(decides) is False
        note = (
            "notice: PEFT would not load it, as the config excludes the module; " if stray else ""
        )
        for key, letter in ((a, "A"), (b, "B")):
            self._say(key, Action.USED, f"{note}factor {letter} of {name}")
        if "lora_B.bias" in parts:
            if not self.settings.fields.get("lora_bias"):
                raise self._fault(
                    parts["lora_B.bias"],
                    "is a factor bias, and the config has no lora_bias",
                    "Set lora_bias to true if the adapter was trained with it.",
                )
            self._keep(parts["lora_B.bias"], f"{name}.lora_B.bias", Role.FACTOR_BIAS)
        if "lora_magnitude_vector" in parts:
            self._keep(
                parts["lora_magnitude_vector"], f"{name}.lora_magnitude_vector", Role.MAGNITUDE
            )

    def _shape(self, a: str, b: str, kind: TargetKind | None) -> tuple[TargetShape, int]:
        """Check both factors against one another and describe the target."""
        shape_a, shape_b = self.metas[a].shape, self.metas[b].shape
        for key in (a, b):
            if self.metas[key].dtype not in _FACTOR_DTYPES:
                raise self._unsupported(
                    key,
                    f"is a factor of dtype {self.metas[key].dtype}",
                    "Save the adapter as float32, float16 or bfloat16.",
                )
        if len(shape_a) == 2 and len(shape_b) == 3:
            raise self._unsupported(
                b,
                f"of shape {shape_b} belongs to a fused MergedLinear layer",
                "Split it into one adapter per projection.",
            )
        conv = kind is None and 3 <= len(shape_a) <= 5
        if len(shape_a) != len(shape_b) or not (conv or len(shape_a) == 2):
            raise self._fault(b, f"of shape {shape_b} does not fit {a!r} of shape {shape_a}")
        if conv and math.prod(shape_b[2:]) != 1:
            raise self._unsupported(b, f"of shape {shape_b} is not a 1x1 convolution", _AS_LORA)
        rank = shape_a[0]
        if shape_b[1] != rank:
            if conv and rank % shape_b[1] == 0:
                raise self._unsupported(
                    b,
                    f"of shape {shape_b} is for a convolution in {rank // shape_b[1]} groups",
                    "Leave grouped convolutions out of target_modules.",
                )
            raise self._fault(b, f"has rank {shape_b[1]}, and {a!r} has rank {rank}")
        if conv:
            kind = TargetKind.CONV
        return (
            TargetShape(
                n_in=math.prod(shape_a[1:]),
                n_out=shape_b[0],
                kind=kind or TargetKind.LINEAR,
                # An embedding's table is always (vocabulary, width), and a convolution never is.
                transposed=kind is None and self.settings.fan_in_fan_out,
                kernel=shape_a[2:] if conv else (),
            ),
            rank,
        )

    def _magnitudes(self) -> None:
        with_magnitude = [m for m, parts in self.parts.items() if "lora_magnitude_vector" in parts]
        if self.settings.use_dora and len(with_magnitude) < len(self.parts):
            module = next(m for m in sorted(self.parts) if m not in with_magnitude)
            raise SourceError(
                f"use_dora is set, and {module!r} has no lora_magnitude_vector", path=self._path()
            )
        if with_magnitude and not self.settings.use_dora:
            raise self._fault(
                self.parts[min(with_magnitude)]["lora_magnitude_vector"],
                "is a DoRA magnitude, and the config does not set use_dora",
                "Set use_dora to true if the adapter was trained with it.",
            )

    # --- private tensors ----------------------------------------------------------------------

    def _private(self, key: str, name: str, saved: Container[str]) -> None:
        adapter = next(iter(self.adapters), "default")
        owner, _, leaf = name.rpartition(".")
        if name.endswith((f".{_ROWS}", f".{_ROWS}.{adapter}", f".{_ROWS}.default")):
            where = name[: name.rindex(f".{_ROWS}")]
            if not self.settings.fields.get("trainable_token_indices"):
                raise self._fault(
                    key, "replaces rows, and the config has no trainable_token_indices to say which"
                )
            self._keep(key, f"{where}.{_ROWS}", Role.ROWS)
            return
        before, mark, after = name.rpartition(".modules_to_save.")
        if mark:
            first, _, others = after.partition(".")
            after = others if others and first in (adapter, "default") else after
            plain = self.layout.private_keys.get(f"{before}.{after}")
            if plain is not None and ".modules_to_save." not in plain:
                self._say(key, Action.IGNORED, f"PEFT takes tensor {plain} instead")
            else:
                self._keep(key, f"{before}.{after}", Role.MODULE)
            return
        before, mark, _ = name.rpartition(".original_module.")
        if mark and before in saved:
            self._say(key, Action.IGNORED, "the base model's own values of a module saved in full")
            return
        targets = self.layout.targets
        name = self._name_of(name)
        owner, _, leaf = name.rpartition(".")
        if "lora_velora_embed" in name.split(".")[-2:]:
            self._keep(key, name.removesuffix(f".{adapter}"), Role.OTHER)
            return
        if owner in targets and leaf == "alpha":
            raise self._unsupported(
                key,
                "is an alpha of its own beside PEFT's factors, which PEFT does not read",
                "Put it in alpha_pattern.",
            )
        for part in name.split("."):
            inside = name.partition(f".{part}")[0]
            if part.startswith("lora_") and inside in targets:
                raise self._unsupported(key, "is of an unknown variant of LoRA", _AS_LORA)
        is_bias = leaf == "bias" and (
            owner in targets or (self.settings.bias == "all" and not self._saved_whole(owner))
        )
        self._keep(key, name, Role.BIAS if is_bias else Role.MODULE)

    def _saved_whole(self, owner: str) -> bool:
        parts = owner.split(".")
        paths = (".".join(parts[: n + 1]) for n in range(len(parts)))
        return any(covers_module(self.settings.modules_to_save, path) for path in paths)

    def _keep(self, key: str, name: str, role: Role) -> None:
        meta = self.metas[key]
        if name in self.layout.private_keys:
            raise self._fault(key, f"and {self.layout.private_keys[name]!r} are both {name!r}")
        self.layout.private_keys[name] = key
        if not self.keep:
            self._say(key, Action.IGNORED, f"notice: {role.name.lower()} dropped on request")
            return
        check_name(name, "private tensor name", self._path())
        if len(meta.shape) > 8:
            raise self._unsupported(key, f"has {len(meta.shape)} axes, expected at most 8", "")
        self.layout.privates[name] = PrivateInfo(role, meta.dtype, meta.shape)
        self._say(key, Action.STORED, f"{role.name.lower()}, as private tensor {name}")

    # --- messages -----------------------------------------------------------------------------

    def _say(self, key: str, action: Action, detail: str) -> None:
        self.layout.ledger.append(LedgerLine(f"tensor {key}", action, detail))

    def _path(self, key: str | None = None) -> str:
        if key is not None:
            return str(self.metas[key].path)
        meta = next(iter(self.metas.values()), None)
        return str(meta.path) if meta else self.settings.path

    @staticmethod
    def _gather_hint() -> str:
        return (
            "DeepSpeed ZeRO-3 and FSDP leave such files when parameters are not gathered before "
            "saving; gather them and save again."
        )

    def _fault(self, key: str, problem: str, hint: str | None = None) -> SourceError:
        return SourceError(f"tensor {key!r} {problem}", path=self._path(key), hint=hint)

    def _unsupported(self, key: str, problem: str, hint: str) -> UnsupportedError:
        return UnsupportedError(
            f"tensor {key!r} {problem}", path=self._path(key), hint=hint or None
        )


def describe_prefixes(prefixes: Mapping[int, int]) -> str:
    """Say how tensor names differ from PEFT's own, or nothing."""
    total = sum(prefixes.values())
    said: list[Any] = []
    if prefixes.get(0):
        said.append(f"{prefixes[0]} of {total} tensor names lack the prefix base_model.model.")
    doubled = sum(count for n, count in prefixes.items() if n > 1)
    if doubled:
        said.append(
            f"{doubled} of {total} tensor names carry the prefix base_model.model. twice: trained "
            "inside another wrapper, whose own changes are not part of this file"
        )
    return "; ".join(said)
