"""LoRA files of image models, as kohya's trainers and diffusers write them, both ways.

What is read: one safetensors file (or a folder of such files, each a task) with ``lora_down``,
``lora_up`` and ``alpha`` under flattened names (``lora_unet_...``, ``lora_te_...``), or with dotted
names and any of diffusers' spellings of the two factors.  A file's components (UNet, text encoders)
are one task, told apart by the beginnings of the targets' names.

Scales: ``alpha / rank`` of each layer; without an alpha, what diffusers' ``lora_adapter_metadata``
says; without that, 1.  Metadata of the header is kept as the task's config, as one JSON object.

What is written: flattened names as they are, with an alpha for each; dotted names in the spelling
of today's diffusers (``lora_A``, ``lora_B``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmmformat.converters.base import DEFAULTS, Options
from rmmformat.converters.casting import cast_task
from rmmformat.converters.files import atomic_file, parse_json_object
from rmmformat.converters.kohya_import import find_files, open_file
from rmmformat.converters.kohya_layout import ADAPTER_METADATA, scales_of_metadata
from rmmformat.converters.kohya_names import COMPONENTS, is_flat
from rmmformat.converters.names import check_task_names
from rmmformat.converters.places import open_each
from rmmformat.converters.safetensors_writer import FactorReader, Planned, write_safetensors
from rmmformat.errors import LossyConversionError, RmmError, SourceError, UnsupportedError
from rmmformat.model import Action, LedgerLine, Role, SourceTask, TargetKind

__all__ = ["KohyaExporter", "KohyaImporter"]

_DOTTED = (*COMPONENTS, "diffusion_model")
_LEAVES = ("dora_scale", "diff", "diff_b", "set_weight")
_DOTTED_LEAVES = (*_LEAVES, "lora_magnitude_vector", "lora_B.bias")
_STALE = ("sshs_model_hash", "sshs_legacy_hash")


class KohyaImporter:
    """Reads a LoRA file of an image model, or a folder of them."""

    name = "kohya"

    def detect(self, path: Path) -> bool:
        """Say whether a header at or just below ``path`` has names that these files have."""
        try:
            return bool(find_files(path))
        except (OSError, ValueError):
            return False

    def open(
        self, path: Path, *, name: str | None = None, options: Options = DEFAULTS
    ) -> list[SourceTask]:
        """Open every file at ``path``.

        Parameters
        ----------
        path
            A file, or a folder of files; other files of a folder are named in the ledger of the
            first task.
        name
            Name of the task; by default the file's, or its folder's for diffusers' usual name.
        options
            ``names`` and ``base`` (a folder that a diffusers pipeline was saved to) turn flattened
            names into dotted ones.

        Raises
        ------
        SourceError
            Broken or empty; ``name`` given for several files; names that collide.
        UnsupportedError
            Not plain LoRA, or pickled and that is not allowed.
        """
        files: list[Path] = []

        def find(path: Path) -> Sequence[tuple[str | None, Path]]:
            found = find_files(path)
            if not found and not path.is_dir():
                found = [(path.stem, path)]  # whoever names the format knows better
            files.extend(file for _, file in found)
            return found

        def open_one(file: Path, own: str | None) -> SourceTask:
            beside: tuple[Path, ...] = ()  # what else lies there is told once
            if path.is_dir() and file == files[0]:
                ours = {*files, *(each.parent for each in files)}
                beside = tuple(entry for entry in sorted(path.iterdir()) if entry not in ours)
            return open_file(file, file.stem if own is None else own, options, beside)

        tasks = open_each(
            path, name, find, open_one, what="LoRA file here or one folder below", many="LoRA files"
        )
        check_task_names([(task.name, task.path) for task in tasks])
        return tasks


class KohyaExporter:
    """Writes a task as one file that the tools of image models load."""

    name = "kohya"

    def export(
        self, task: SourceTask, out: Path, *, force: bool = False, options: Options = DEFAULTS
    ) -> tuple[LedgerLine, ...]:
        """Write the file ``out``, one tensor at a time.

        Parameters
        ----------
        options
            ``names``: target name to the module's name in the file, for targets that have no name
            of an image model's component.

        Raises
        ------
        UnsupportedError
            A target is an embedding, stored transposed, or of a name that no loader would find.
        LossyConversionError
            A private tensor has no place in such a file, or a value is too large for the dtype.
        RmmError
            ``out`` exists and ``force`` is not set, or cannot be written.
        """
        task = cast_task(task, options.dtype)
        plan = _Plan(task, options)
        metadata = plan.metadata()
        plan.privates()
        plan.factors(metadata)
        if ADAPTER_METADATA in metadata and plan.has_alphas:
            detail = "notice: left out, its scales are not the task's; alphas are written"
            plan.ledger.append(LedgerLine(f"field {ADAPTER_METADATA}", Action.IGNORED, detail))
            del metadata[ADAPTER_METADATA]
        with atomic_file(out, force=force) as temporary:
            write_safetensors(temporary, plan.tensors, metadata)
        return tuple(plan.ledger)


class _Plan:
    """What a file will hold."""

    def __init__(self, task: SourceTask, options: Options) -> None:
        self.task = task
        self.options = options
        self.reader = FactorReader(task)
        self.tensors: dict[str, Planned] = {}
        self.ledger: list[LedgerLine] = []
        self.has_alphas = False

    def metadata(self) -> dict[str, str]:
        """Texts of the header: the task's own where it came from such a file."""
        try:
            fields = parse_json_object(self.task.config_text or "{}", self.task.path)
        except SourceError:
            return {}
        if not all(isinstance(value, str) for value in fields.values()) or "peft_type" in fields:
            return {}
        for field in _STALE:
            if field in fields:
                del fields[field]
                detail = "notice: left out, a digest of the original's bytes"
                self.ledger.append(LedgerLine(f"field {field}", Action.IGNORED, detail))
        return fields

    def factors(self, metadata: dict[str, str]) -> None:
        """Plan factors and alphas."""
        modules = {target: self._module(target) for target in self.task.targets}
        ranks = {modules[name]: info.rank for name, info in self.task.targets.items()}
        try:
            stated = scales_of_metadata(metadata, ranks, self.task.path)
        except RmmError:
            stated = {}
        said = {
            module: stated.get(module, 1.0) for module in modules.values() if not is_flat(module)
        }
        fits = all(
            math.isclose(said[modules[name]], info.scale, rel_tol=1e-6)
            for name, info in self.task.targets.items()
            if modules[name] in said
        )
        for target, info in self.task.targets.items():
            module, kernel = modules[target], info.shape.kernel
            inner = info.shape.n_in // math.prod(kernel)
            a, b = self.reader.planned(
                target,
                (info.rank, inner, *kernel),
                (info.shape.n_out, info.rank, *(1,) * len(kernel)),
            )
            note = ""
            if info.scale == 0.0:
                # kohya's trainer takes an alpha of 0 for the rank.
                b = Planned.of(np.zeros(b.shape, b.dtype))
                note = "notice: scale 0, written as zeros; "
            flat = is_flat(module)
            down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
            self._put(f"{module}.{down}.weight", a, Action.USED, f"factor A of {target}")
            self._put(f"{module}.{up}.weight", b, Action.USED, f"{note}factor B of {target}")
            if flat or not fits:
                alpha = np.asarray(_alpha(info.rank, info.scale), np.float32)
                self._put(f"{module}.alpha", Planned.of(alpha), Action.FOLDED, f"scale of {target}")
                self.has_alphas = self.has_alphas or not flat

    def privates(self) -> None:
        """Plan private tensors; refuse those that no loader would find."""
        for name, info in self.task.privates.items():
            if self.options.drop_private:
                line = LedgerLine(f"tensor {name}", Action.IGNORED, "notice: dropped on request")
                self.ledger.append(line)
                continue
            key = self._private_key(name, info.role)
            if key is None:
                raise LossyConversionError(
                    f"the file has no place for the private tensor {name!r} "
                    f"({info.role.name.lower()}) of task {self.task.name!r}",
                    hint="Leave it out with --drop-private.",
                )
            self._put(key, self.reader.private(name), Action.STORED, f"private tensor {name}")

    def _private_key(self, name: str, role: Role) -> str | None:
        if role is Role.OTHER and name.startswith("bundle_emb."):
            return name
        for leaf in _DOTTED_LEAVES:
            owner = name.removesuffix(f".{leaf}")
            if owner == name or role not in (Role.OTHER, Role.MAGNITUDE, Role.FACTOR_BIAS):
                continue
            try:
                module = self._module(owner)
            except UnsupportedError:
                return None
            return f"{module}.{leaf}" if leaf in _LEAVES or not is_flat(module) else None
        return None

    def _module(self, target: str) -> str:
        """Name of a target's module in the file."""
        module = self.options.names.get(target, target)
        info = self.task.targets.get(target)
        if not is_flat(module) and module.partition(".")[0] not in _DOTTED:
            raise UnsupportedError(
                f"target {target!r} has no name that image models' tools know",
                path=self.task.path,
                hint=f"Give one with --map {target}=lora_unet_... or {target}=unet....",
            )
        if info is not None and (info.shape.kind is TargetKind.EMBEDDING or info.shape.transposed):
            what = "an embedding" if info.shape.kind is TargetKind.EMBEDDING else "transposed"
            raise UnsupportedError(
                f"target {target!r} is {what}, which such a file cannot say", path=self.task.path
            )
        return module

    def _put(self, key: str, tensor: Planned, action: Action, detail: str) -> None:
        if key in self.tensors:
            raise RmmError(f"two tensors of task {self.task.name!r} would be called {key!r}")
        self.tensors[key] = tensor
        self.ledger.append(LedgerLine(f"tensor {key}", action, detail))


def _alpha(rank: int, scale: float) -> float:
    """Alpha of a scale: the whole number where it is one but for rounding; the rank for scale 0."""
    if scale == 0.0:
        return float(rank)
    alpha = scale * rank
    whole = round(alpha)
    return float(whole) if math.isclose(alpha, whole, rel_tol=1e-7) else alpha
