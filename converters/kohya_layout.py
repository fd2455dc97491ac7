"""What each tensor of an image model's LoRA file is: a factor, an alpha, kept, or refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from rmmformat.converters.files import parse_json_object
from rmmformat.converters.kohya_names import Key, is_flat, parse_key
from rmmformat.converters.laid_out import Layout
from rmmformat.converters.names import check_name
from rmmformat.converters.peft_config import Scaling, settings_of
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

__all__ = ["ADAPTER_METADATA", "lay_out", "scales_of_metadata"]

#: Metadata key under which diffusers keeps the LoRA config of every component.
ADAPTER_METADATA = "lora_adapter_metadata"

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_LYCORIS = "Merge it into its checkpoint, and extract the difference as a LoRA of some rank."
_FOREIGN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf".+\.(?:{pattern})"), what)
    for pattern, what in (
        (r"hada_[wt]\d?(?:_[ab])?", "part of a LoHa adapter (LyCORIS)"),
        (r"lokr_[wt]\d?(?:_[ab])?", "part of a LoKr adapter (LyCORIS)"),
        (r"lora_mid\.weight", "the core of a Tucker-decomposed LoRA (LyCORIS)"),
        (r"(?:a1|a2|b1|b2|bm1|bm2)\.weight", "part of a GLoRA adapter (LyCORIS)"),
        (r"on_input|weight", "a full or IA3 weight (LyCORIS)"),
        (r"oft_blocks|oft_diag|oft_r|rescale", "part of an OFT adapter"),
        (r"scalar", "a learnt scalar beside the factors (LyCORIS)"),
        (r"[wb]_norm", "a norm of a LyCORIS adapter"),
        (r"lora_up\.bias|lora_down\.bias", "a bias of a factor"),
    )
)
_KEPT = {
    "dora_scale": (Role.MAGNITUDE, "a DoRA magnitude"),
    "lora_magnitude_vector": (Role.MAGNITUDE, "a DoRA magnitude"),
    "lora_B.bias": (Role.FACTOR_BIAS, "a factor bias"),
    "diff": (Role.OTHER, "a full difference of a weight"),
    "diff_b": (Role.OTHER, "a full difference of a bias"),
    "set_weight": (Role.OTHER, "a weight that replaces the base's"),
}
_EMBEDDING = "bundle_emb."  # textual inversions that travel in the same file


def lay_out(
    metas: Mapping[str, TensorMeta],
    metadata: Mapping[str, str],
    read_alpha: Callable[[str], float],
    rename: Callable[[str], str],
    *,
    keep: bool,
    path: str,
) -> Layout:
    """Put every tensor in its place.

    Parameters
    ----------
    metas
        Tensors of the file.
    metadata
        Texts of its header.
    read_alpha
        Reads the one value of an alpha tensor.
    rename
        Module in the file to the name of the target.
    keep
        Whether private tensors are kept; else they are only listed.

    Raises
    ------
    SourceError
        No factors, or tensors that disagree.
    UnsupportedError
        A tensor of another method.
    """
    return _Sorter(metas, read_alpha, rename, keep, path).run(metadata)


class _Sorter:
    def __init__(
        self,
        metas: Mapping[str, TensorMeta],
        read_alpha: Callable[[str], float],
        rename: Callable[[str], str],
        keep: bool,
        path: str,
    ) -> None:
        self.metas = metas
        self.read_alpha = read_alpha
        self.rename = rename
        self.keep = keep
        self.path = path
        self.layout = Layout()
        self.modules: dict[str, dict[str, str]] = {}  # module -> part -> key
        self.loose: list[str] = []

    def run(self, metadata: Mapping[str, str]) -> Layout:
        for key, meta in self.metas.items():
            self._sort(key, meta)
        pairs = sorted(m for m, parts in self.modules.items() if parts.keys() & {"A", "B"})
        if not pairs:
            raise SourceError("holds no LoRA factors", path=self.path)
        stated = scales_of_metadata(metadata, {m: self._rank(m) for m in pairs}, self.path)
        without = [m for m in pairs if "alpha" not in self.modules[m] and m not in stated]
        for module in pairs:
            self._target(module, stated.get(module), all_without=len(without) == len(pairs))
        if len(without) == len(pairs):
            detail = "notice: nothing says what the factors were scaled by; scale 1 for all"
            self.layout.ledger.append(LedgerLine("field alpha", Action.IGNORED, detail))
        for module in sorted(self.modules):
            self._others(module)
        for key in self.loose:
            self._keep(key, key, Role.OTHER, "a textual inversion in the same file")
        self.layout.targets = dict(sorted(self.layout.targets.items()))
        self.layout.privates = dict(sorted(self.layout.privates.items()))
        return self.layout

    def _sort(self, key: str, meta: TensorMeta) -> None:
        check_name(key, "tensor name", self.path)
        if 0 in meta.shape:
            raise self._fault(key, f"is empty: shape {meta.shape}")
        parsed: Key | None = parse_key(key)
        if parsed is not None:
            parts = self.modules.setdefault(parsed.module, {})
            if parsed.part in parts:
                raise self._fault(
                    key, f"and {parts[parsed.part]!r} are the same part of {parsed.module!r}"
                )
            parts[parsed.part] = key
        elif key.startswith(_EMBEDDING):
            self.loose.append(key)
        else:
            what = next((w for pattern, w in _FOREIGN if pattern.fullmatch(key)), None)
            if what is not None:
                raise self._unsupported(key, f"is {what}", _LYCORIS)
            raise self._unsupported(key, "is no part of a LoRA that is known here")

    def _rank(self, module: str) -> int:
        """Rank of a pair; raises where a factor has no fellow or they disagree."""
        parts = self.modules[module]
        for part, other in (("A", "B"), ("B", "A")):
            if part not in parts:
                raise self._fault(parts[other], f"has no fellow: factor {part} is missing")
        a, b = parts["A"], parts["B"]
        for key in (a, b):
            if self.metas[key].dtype not in _FLOATS:
                raise self._unsupported(
                    key,
                    f"is a factor of dtype {self.metas[key].dtype}",
                    "Save the file as float32, float16 or bfloat16.",
                )
        shape_a, shape_b = self.metas[a].shape, self.metas[b].shape
        # DyLoRA leaves the axes of the kernel out of B.
        if len(shape_b) not in (2, len(shape_a)) or not 2 <= len(shape_a) <= 5:
            raise self._fault(b, f"of shape {shape_b} does not fit {a!r} of shape {shape_a}")
        if math.prod(shape_b[2:]) != 1:
            raise self._unsupported(b, f"of shape {shape_b} is not a 1x1 convolution", _LYCORIS)
        if shape_b[1] != shape_a[0]:
            raise self._fault(b, f"has rank {shape_b[1]}, and {a!r} has rank {shape_a[0]}")
        return shape_a[0]

    def _target(self, module: str, stated: float | None, *, all_without: bool) -> None:
        parts = self.modules[module]
        a, b, rank = parts["A"], parts["B"], self._rank(module)
        shape_a, shape_b = self.metas[a].shape, self.metas[b].shape
        scale, notice = 1.0, ""
        if "alpha" in parts:
            scale, notice = self._scale(module, parts["alpha"], rank, stated)
        elif stated is not None:
            scale = stated
        elif not all_without:
            notice = "notice: no alpha beside it, as others have; scale 1; "
        name = check_name(self.rename(module), "target name", self.path)
        if name in self.layout.targets:
            raise self._fault(a, f"is a second adapter of {name!r}")
        conv = len(shape_a) > 2
        shape = TargetShape(
            n_in=math.prod(shape_a[1:]),
            n_out=shape_b[0],
            kind=TargetKind.CONV if conv else TargetKind.LINEAR,
            kernel=shape_a[2:],
        )
        self.layout.targets[name] = TargetInfo(
            shape, rank, scale, self.metas[a].dtype, self.metas[b].dtype
        )
        self.layout.target_keys[name] = (a, b)
        self._say(a, Action.USED, f"{notice}factor A of {name}")
        self._say(b, Action.USED, f"factor B of {name}")

    def _scale(self, module: str, key: str, rank: int, stated: float | None) -> tuple[float, str]:
        alpha = self.read_alpha(key)
        if not math.isfinite(alpha):
            raise self._fault(key, f"is {alpha}, expected a finite number")
        scale = alpha / rank
        if stated is not None and not math.isclose(scale, stated, rel_tol=1e-3):
            raise self._fault(
                key,
                f"says scale {scale:g} of {module!r}, and the field {ADAPTER_METADATA} says "
                f"{stated:g}",
                "Take one of them out; tools read one or the other.",
            )
        zero = alpha == 0
        note = "notice: alpha is 0, so the delta is 0, though kohya's trainer takes it for the rank"
        self._say(key, Action.FOLDED, note if zero else f"scale of {module}")
        return scale, ""

    def _others(self, module: str) -> None:
        parts = self.modules[module]
        adapted = "A" in parts
        for part, key in sorted(parts.items()):
            if part in ("A", "B") or (part == "alpha" and adapted):
                continue
            role, what = _KEPT.get(part, (Role.OTHER, ""))
            belongs = role is Role.OTHER and part != "alpha"
            if not adapted and not belongs:
                raise self._fault(key, "has no factors beside it")
            name = self.rename(module)
            self._keep(key, f"{name}.{part}", role, what)

    def _keep(self, key: str, name: str, role: Role, what: str) -> None:
        meta = self.metas[key]
        if not self.keep:
            self._say(key, Action.IGNORED, f"notice: {what}, dropped on request")
            return
        check_name(name, "private tensor name", self.path)
        if len(meta.shape) > 8:
            raise self._unsupported(key, f"has {len(meta.shape)} axes, expected at most 8")
        if name in self.layout.privates:
            raise self._fault(key, f"and {self.layout.private_keys[name]!r} are both {name!r}")
        self.layout.privates[name] = PrivateInfo(role, meta.dtype, meta.shape)
        self.layout.private_keys[name] = key
        self._say(key, Action.STORED, f"{what}, as private tensor {name}")

    def _say(self, key: str, action: Action, detail: str) -> None:
        self.layout.ledger.append(LedgerLine(f"tensor {key}", action, detail))

    def _fault(self, key: str, problem: str, hint: str | None = None) -> SourceError:
        return SourceError(f"tensor {key!r} {problem}", path=self.path, hint=hint)

    def _unsupported(self, key: str, problem: str, hint: str | None = None) -> UnsupportedError:
        return UnsupportedError(f"tensor {key!r} {problem}", path=self.path, hint=hint)


def scales_of_metadata(
    metadata: Mapping[str, str], ranks: Mapping[str, int], path: str
) -> dict[str, float]:
    """Scales that diffusers' metadata gives to modules, by PEFT's rules.

    Parameters
    ----------
    metadata
        Texts of a file's header.
    ranks
        Module to the rank of its factors.

    Returns
    -------
    dict
        Module to scale, for those whose component has a config.

    Raises
    ------
    SourceError
        The metadata cannot be read, or gives a module another rank than its factors have.
    UnsupportedError
        It is a config of something else than plain LoRA.
    """
    if ADAPTER_METADATA not in metadata:
        return {}
    fields = parse_json_object(metadata[ADAPTER_METADATA], path)
    scales: dict[str, float] = {}
    for component in sorted({module.partition(".")[0] for module in ranks if not is_flat(module)}):
        prefix = f"{component}."
        own: dict[str, Any] = {
            field[len(prefix) :]: value
            for field, value in fields.items()
            if field.startswith(prefix)
        }
        if not own:
            continue
        inside = [module for module in ranks if module.startswith(prefix)]
        settings = settings_of(own, path)
        scaling = Scaling(settings, [module[len(prefix) :] for module in inside])
        for module in inside:
            rank = scaling.rank_of(module[len(prefix) :])
            if rank not in (None, ranks[module]):
                raise SourceError(
                    f"factors of {module!r} have rank {ranks[module]}, and the field "
                    f"{ADAPTER_METADATA} gives rank {rank}",
                    path=path,
                )
            scales[module] = scaling.scale_of(module[len(prefix) :], ranks[module])
    return scales


def metadata_text(metadata: Mapping[str, str]) -> str:
    """Give the texts of a header as one JSON object, the same for the same texts."""
    return json.dumps(dict(sorted(metadata.items())), ensure_ascii=False, indent=1)
