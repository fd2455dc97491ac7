"""GGUF LoRA adapters, as llama.cpp writes them, as source tasks."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmmformat.converters.base import Options
from rmmformat.converters.files import describe_file
from rmmformat.converters.gguf_arch import rope_order
from rmmformat.converters.gguf_base import Base, base_of_metadata, open_base
from rmmformat.converters.gguf_layout import DTYPES
from rmmformat.converters.gguf_names import NameMap
from rmmformat.converters.gguf_scan import Header, Tensor, scan
from rmmformat.converters.names import check_name
from rmmformat.errors import NonFiniteError, NotFoundError, SourceError, UnsupportedError
from rmmformat.model import (
    Action,
    Array,
    Factors,
    LedgerLine,
    PrivateInfo,
    SourceFile,
    TargetInfo,
    TargetKind,
    TargetShape,
)

__all__ = ["GgufTask", "open_adapter"]

_ALORA = "adapter.alora.invocation_tokens"
_ALPHA = "adapter.lora.alpha"
_READ = ("general.type", "general.architecture", "general.alignment", "adapter.type")
_FOR_PEOPLE = ("adapter.lora.task_name", "adapter.lora.prompt_prefix")
_HUB = "https://huggingface.co/"
_TEXT_LIMIT = 1 << 16  # longer texts (chat templates, licences) are not kept


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The tensors of a target, and the heads of a query or key in rotary order (else 0)."""

    a: Tensor
    b: Tensor
    heads: int


class GgufTask:
    """One adapter file as a source task; reads tensors when asked for them."""

    def __init__(
        self,
        name: str,
        file: Path,
        config_text: str,
        base_model: str,
        pairs: Mapping[str, _Pair],
        targets: Mapping[str, TargetInfo],
        ledger: tuple[LedgerLine, ...],
        allow_nonfinite: bool,
    ) -> None:
        self._name = name
        self._file = file
        self._config_text = config_text
        self._base_model = base_model
        self._pairs = pairs
        self._targets = targets
        self._ledger = ledger
        self._allow_nonfinite = allow_nonfinite

    @property
    def name(self) -> str:
        """Name of the task."""
        return self._name

    @property
    def path(self) -> str:
        """The file."""
        return str(self._file)

    @property
    def base_model(self) -> str:
        """The Hub's id of the base model, or its name, or the empty string."""
        return self._base_model

    @property
    def config_text(self) -> str:
        """The file's metadata as JSON, with head counts that came from the base."""
        return self._config_text

    @property
    def targets(self) -> Mapping[str, TargetInfo]:
        """Target name to what the task adds there; Q8_0 counts as float32, which it becomes."""
        return self._targets

    @property
    def privates(self) -> Mapping[str, PrivateInfo]:
        """Empty: llama.cpp's adapters hold low-rank pairs only."""
        return {}

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """Every tensor and key of the file."""
        return self._ledger

    @functools.cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """The file with size and digest, hashed on first access."""
        return (describe_file(self._file),)

    def factors(self, target: str) -> Factors:
        """Read both factors of one target, rows in the order of the original model.

        Raises
        ------
        NotFoundError
            There is no such target.
        NonFiniteError
            A factor holds NaN or infinity.
        SourceError
            The file can no longer be read.
        """
        if target not in self._pairs:
            raise NotFoundError(f"no target is called {target!r}", path=self.path)
        pair, info = self._pairs[target], self._targets[target]
        a, b = self._read(pair.a), self._read(pair.b)
        if info.shape.kind is TargetKind.EMBEDDING:
            a = np.ascontiguousarray(a.T)
        if pair.heads:
            original = np.empty_like(b)
            original[rope_order(len(b), pair.heads)] = b
            b = original
        return Factors(a, b, info.scale)

    def private_tensor(self, name: str) -> Array:
        """Raise: there are none."""
        raise NotFoundError(f"no private tensor is called {name!r}", path=self.path)

    def _read(self, tensor: Tensor) -> Array:
        raw = bytearray(tensor.n_bytes)
        try:
            with self._file.open("rb") as stream:
                stream.seek(tensor.offset)
                n = stream.readinto(raw)
        except OSError as error:
            raise SourceError(
                f"tensor {tensor.name!r}: {error.strerror or error}", path=self.path
            ) from error
        if n != tensor.n_bytes:
            raise SourceError(f"the file ends within tensor {tensor.name!r}", path=self.path)
        array = _decode(np.frombuffer(raw, np.uint8), tensor)
        if not self._allow_nonfinite:
            n_bad = int(array.size - np.count_nonzero(np.isfinite(array)))
            if n_bad:
                raise NonFiniteError(
                    f"tensor {tensor.name!r}: {n_bad} of {array.size} values are NaN or infinite",
                    path=self.path,
                    hint="The adapter is broken. Allow non-finite values to look into it.",
                )
        return array


def _decode(raw: Array, tensor: Tensor) -> Array:
    shape = _two_sides(tensor.shape)
    if tensor.kind != "Q8_0":
        return raw.view(DTYPES[tensor.kind.lower()].newbyteorder("<")).reshape(shape)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # a block's scale may be anything in a broken file
        values: Array = dequantize(raw.reshape(shape[0], -1), GGMLQuantizationType.Q8_0)
    return values.reshape(shape)


def _two_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Give the shape without leading ones, which ggml adds and drops as it likes."""
    return (math.prod(shape[:-1]), shape[-1])


def open_adapter(file: Path, name: str | None, options: Options) -> GgufTask:
    """Open one adapter file; raises as an importer does."""
    path = str(file)
    header = scan(file)
    _check_kind(header, path)
    own = base_of_metadata(header.values, path)
    base = _merge(own, open_base(options.base)) if options.base is not None else own
    names = NameMap(own.architecture, options.names, path)
    alpha, ledger = _metadata(header, path)
    halves, others = _halves(header, path)
    ledger.extend(others)
    pairs: dict[str, _Pair] = {}
    targets: dict[str, TargetInfo] = {}
    for tensor, (a, b) in sorted(halves.items()):
        target, pair, info = _target(tensor, a, b, alpha, names, base)
        check_name(target, "target", path)
        if target in targets:
            raise SourceError(
                f"tensors {pairs[target].a.name!r} and {a.name!r} are both for {target!r}",
                path=path,
            )
        pairs[target], targets[target] = pair, info
        notes = f", rows in rotary order of {pair.heads} heads undone" if pair.heads else ""
        turned = ", transposed" if info.shape.kind is TargetKind.EMBEDDING else ""
        ledger.append(LedgerLine(f"tensor {a.name}", Action.USED, f"factor A of {target}{turned}"))
        ledger.append(LedgerLine(f"tensor {b.name}", Action.USED, f"factor B of {target}{notes}"))
    if not targets:
        what = "holds no LoRA tensors" if header.tensors else "holds no tensors at all"
        raise SourceError(f"the adapter {what}", path=path)
    return GgufTask(
        check_name(file.stem if name is None else name, "task name", path),
        file,
        _config_text(header, base),
        _base_model(header, path),
        dict(sorted(pairs.items())),
        dict(sorted(targets.items())),
        (*ledger, LedgerLine(f"file {file.name}", Action.USED)),
        options.allow_nonfinite,
    )


def _check_kind(header: Header, path: str) -> None:
    kind = header.values.get("general.type", "model")
    if kind != "adapter":
        raise SourceError(
            f"general.type is {kind!r:.80}, expected 'adapter'",
            path=path,
            hint="A base model goes to --base.",
        )
    if _ALORA in header.values or _ALORA in header.skipped:
        raise UnsupportedError(
            f"field {_ALORA}: an activated LoRA, which is not to be applied before its invocation "
            "tokens and so is no plain LoRA",
            path=path,
        )
    form = header.values.get("adapter.type")
    if form != "lora":
        raise UnsupportedError(f"adapter.type is {form!r:.80}, expected 'lora'", path=path)
    for key in (*header.values, *header.skipped):
        if key.startswith("adapter.") and key not in (*_READ, _ALPHA, *_FOR_PEOPLE):
            raise UnsupportedError(
                f"field {key[:80]!r} is not known, and may change what the adapter means", path=path
            )


def _metadata(header: Header, path: str) -> tuple[float, list[LedgerLine]]:
    """Read alpha; it is 0 for "scale 1", as in llama.cpp."""
    alpha = header.values.get(_ALPHA)
    if alpha is None or alpha == 0:
        said = "is missing" if alpha is None else "is 0"
        ledger = [
            LedgerLine(
                f"field {_ALPHA}",
                Action.FOLDED,
                f"notice: {said}, which llama.cpp takes for scale 1",
            )
        ]
    else:
        ledger = [LedgerLine(f"field {_ALPHA}", Action.FOLDED, "alpha / rank is the scale")]
    if alpha is not None and (type(alpha) is not float or not math.isfinite(alpha)):
        raise SourceError(f"{_ALPHA} is {alpha!r:.80}, expected a finite float32", path=path)
    for key, value in header.values.items():
        if key == _ALPHA:
            continue
        used = key in _READ or key.endswith((".attention.head_count", ".attention.head_count_kv"))
        if _kept(value):
            ledger.append(
                LedgerLine(f"field {key}", Action.USED if used else Action.STORED, "metadata")
            )
        else:
            ledger.append(LedgerLine(f"field {key}", Action.IGNORED, "a long text about the model"))
    ledger.extend(
        LedgerLine(f"field {key}", Action.IGNORED, f"an array of {n} elements about the model")
        for key, n in header.skipped.items()
    )
    return (float(alpha) if alpha is not None else 0.0), ledger


def _kept(value: Any) -> bool:
    return not isinstance(value, str) or len(value) <= _TEXT_LIMIT


def _halves(header: Header, path: str) -> tuple[dict[str, tuple[Tensor, Tensor]], list[LedgerLine]]:
    """Bundle the tensors to pairs, by the name of the weight that they adapt."""
    found: dict[str, dict[str, Tensor]] = {}
    ledger = []
    for name, tensor in header.tensors.items():
        stem, _, part = name.rpartition(".")
        if part in ("lora_a", "lora_b"):
            if tensor.kind not in ("F32", "F16", "BF16", "Q8_0"):
                raise UnsupportedError(
                    f"tensor {name!r} is of type {tensor.kind}, expected F32, F16, BF16 or Q8_0",
                    path=path,
                    hint="Convert the adapter again, with --outtype f16 or f32.",
                )
            check_name(stem, "tensor", path)
            found.setdefault(stem, {})[part] = tensor
        elif name.endswith("_norm.weight"):
            ledger.append(
                LedgerLine(f"tensor {name}", Action.IGNORED, "notice: llama.cpp ignores it, too")
            )
        elif name == "rope_freqs.weight":
            ledger.append(
                LedgerLine(
                    f"tensor {name}",
                    Action.IGNORED,
                    "notice: a constant of the base model, which old converters wrote",
                )
            )
        else:
            raise UnsupportedError(
                f"tensor {name!r} is no half of a low-rank pair; llama.cpp refuses it, too",
                path=path,
            )
    for stem, parts in found.items():
        for part in ("lora_a", "lora_b"):
            if part not in parts:
                raise SourceError(f"tensor {f'{stem}.{part}'!r} is missing", path=path)
    return {stem: (parts["lora_a"], parts["lora_b"]) for stem, parts in found.items()}, ledger


def _target(
    tensor: str, a: Tensor, b: Tensor, alpha: float, names: NameMap, base: Base
) -> tuple[str, _Pair, TargetInfo]:
    target, place = names.target(tensor)
    for half in (a, b):
        if _two_sides(half.shape)[0] != (half.shape[-2] if len(half.shape) > 1 else 1):
            raise UnsupportedError(
                f"tensor {half.name!r} has shape {half.shape}, expected a matrix", path=names.path
            )
    rows_a, sides_b = _two_sides(a.shape), _two_sides(b.shape)
    embedded = place.local == "token_embd"
    rank, n_in = (rows_a[1], rows_a[0]) if embedded else rows_a
    n_out, rank_b = sides_b
    if rank != rank_b:
        raise SourceError(
            f"tensors {a.name!r} of shape {a.shape} and {b.name!r} of shape {b.shape} have no "
            "common rank",
            path=names.path,
        )
    kind = TargetKind.EMBEDDING if embedded else TargetKind.LINEAR
    shape = TargetShape(n_in, n_out, kind)
    base.check_shape(target, place, shape)
    heads = base.heads_in_order(target, place, n_out)
    dtypes = [DTYPES["f32" if half.kind == "Q8_0" else half.kind.lower()] for half in (a, b)]
    scale = alpha / rank if alpha else 1.0
    return target, _Pair(a, b, heads), TargetInfo(shape, rank, scale, dtypes[0], dtypes[1])


def _merge(own: Base, given: Base) -> Base:
    if own.architecture != given.architecture:
        raise SourceError(
            f"the adapter is for a {own.architecture} model, the base is {given.architecture}",
            path=own.path,
            hint=f"Is {given.path} the right base model?",
        )
    for said, other in ((own.n_heads, given.n_heads), (own.n_heads_kv, given.n_heads_kv)):
        if said is not None and other is not None and said != other:
            raise SourceError(
                f"the adapter says {said} heads, the base {other}",
                path=own.path,
                hint=f"Is {given.path} the right base model?",
            )
    return dataclasses.replace(
        given,
        n_heads=given.n_heads if given.n_heads is not None else own.n_heads,
        n_heads_kv=given.n_heads_kv if given.n_heads_kv is not None else own.n_heads_kv,
    )


def _config_text(header: Header, base: Base) -> str:
    values: dict[str, Any] = {
        key: value for key, value in header.values.items() if _kept(value) and _is_json(value)
    }
    values |= dict(base.head_fields())
    return json.dumps(values, ensure_ascii=False, sort_keys=True, indent=2) + "\n"


def _is_json(value: Any) -> bool:
    several = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(item) for item in several if isinstance(item, float))


def _base_model(header: Header, path: str) -> str:
    for key in ("general.base_model.0.repo_url", "general.base_model.0.name"):
        value = header.values.get(key)
        if isinstance(value, str) and value:
            return check_name(value.removeprefix(_HUB), "base model", path)
    return ""
