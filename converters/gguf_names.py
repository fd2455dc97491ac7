"""Names of GGUF tensors, and of the modules that they are in the original model.

The gguf package lists for each tensor of an architecture the names that it has in the models that
llama.cpp converts.  From module to tensor that is a look-up.  Back it is a choice, because several
model classes share an architecture; the rule is:

1. a name that the user gave;
2. of the architecture's preferred beginnings
   (:data:`~rmmformat.converters.gguf_arch.ARCHITECTURES`; those of the class with a
   language-modelling head, as ``transformers`` has it), the first one with which any of the listed
   names begins, and of those names the first;
3. else the tensor is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from rmmformat.converters.gguf_arch import APPLIED, facts
from rmmformat.errors import SourceError, UnsupportedError

__all__ = ["NameMap", "Place"]

_BLOCK = re.compile(r"((?:enc\.|dec\.)?blk\.)(0|[1-9][0-9]{0,5})\.(.+)")
# What stands before a language model inside one of more senses, and before an encoder.
_OUTER = (("model.language_model.", "model."), ("language_model.", ""))
_OUTER_OF_ENCODERS = (("bert.", ""), ("roberta.", ""), ("distilbert.", ""), ("model.", ""))


@dataclasses.dataclass(frozen=True)
class Place:
    """A weight of a base model as llama.cpp has it.

    Parameters
    ----------
    tensor
        Its name: ``blk.3.attn_q.weight``.
    local
        The name without block and ``.weight``: ``attn_q``.
    block
        Number of the block; None outside of blocks.
    """

    tensor: str
    local: str
    block: int | None


class NameMap:
    """Modules to tensors and back, for one architecture.

    Parameters
    ----------
    architecture
        llama.cpp's name of it.
    names
        Target to tensor, as the user gave them (``.weight`` may be left out): they go before the
        rule.
    path
        For messages.

    Raises
    ------
    UnsupportedError
        The architecture is not known, here or to the installed gguf package.
    """

    def __init__(self, architecture: str, names: Mapping[str, str], path: str) -> None:
        self.architecture = architecture
        self.facts = facts(architecture, path)
        self.path = path
        self._given = {target: _with_weight(tensor) for target, tensor in names.items()}
        self._given_back = {tensor: target for target, tensor in self._given.items()}
        self._tensors, self._modules = _templates(architecture, path)

    def place(self, target: str) -> Place:
        """Find the tensor that a target is in llama.cpp.

        Raises
        ------
        UnsupportedError
            There is none, or none that a low-rank pair could be for.
        """
        tensor = self._given.get(target) or self._look_up(target)
        if tensor is None:
            raise UnsupportedError(
                f"target {target!r} has no tensor in llama.cpp's {self.architecture} models",
                path=self.path,
                hint="Name it (--map TARGET=TENSOR), or leave the target out.",
            )
        return self._checked(tensor, f"target {target!r}: ")

    def target(self, tensor: str) -> tuple[str, Place]:
        """Choose the target name of a tensor, by the rule of the module's docstring; and its place.

        Raises
        ------
        UnsupportedError
            There is none to choose, or llama.cpp applies no pair there.
        """
        place = self._checked(tensor, "")
        if tensor in self._given_back:
            return self._given_back[tensor], place
        match = _BLOCK.fullmatch(tensor.removesuffix(".weight"))
        template = f"{match[1]}{{bid}}.{match[3]}" if match else tensor.removesuffix(".weight")
        known = self._modules.get(template, ())
        for beginning in self.facts.prefer:
            for module in known:
                if module.startswith(beginning):
                    return module.replace("{bid}", match[2] if match else ""), place
        listed = f"the gguf package lists {', '.join(known)}" if known else "nothing is listed"
        raise UnsupportedError(
            f"tensor {tensor!r} of a {self.architecture} model: what it is called in the original "
            f"cannot be told ({listed})",
            path=self.path,
            hint=f"Name it: --map TARGET={tensor}.",
        )

    @property
    def has_output(self) -> bool:
        """Whether models of this architecture can have a head of their own."""
        return "output" in self._modules

    def _look_up(self, target: str) -> str | None:
        around = (*_OUTER, *(_OUTER_OF_ENCODERS if self.facts.encoder else ()))
        names = [target]
        names += [
            inner + target[len(outer) :] for outer, inner in around if target.startswith(outer)
        ]
        for name in names:
            if name in self._tensors:
                return f"{self._tensors[name]}.weight"
            parts = name.split(".")
            for n, part in enumerate(parts):
                # A number in the path is the block; in models with several, only one fits the map.
                if part.isdecimal() and part.isascii() and str(int(part)) == part:
                    template = ".".join((*parts[:n], "{bid}", *parts[n + 1 :]))
                    if template in self._tensors:
                        return f"{self._tensors[template].replace('{bid}', part)}.weight"
        return None

    def _checked(self, tensor: str, before: str) -> Place:
        if not tensor.endswith(".weight"):
            raise SourceError(
                f"{before}tensor {tensor!r} is no weight: its name does not end in .weight",
                path=self.path,
            )
        stem = tensor.removesuffix(".weight")
        match = _BLOCK.fullmatch(stem)
        local = match[3] if match else stem
        if local in self.facts.rewritten:
            raise UnsupportedError(
                f"{before}tensor {tensor!r}: llama.cpp's {self.architecture} models have this "
                "weight split, joined, scaled or reordered, so that the pair means another one "
                "in the original",
                path=self.path,
                hint="Leave the target out, or merge the adapter into the base.",
            )
        if local not in APPLIED:
            raise UnsupportedError(
                f"{before}tensor {tensor!r}: llama.cpp applies no low-rank pair there, it would "
                "have no effect",
                path=self.path,
                hint="Leave the target out, or merge the adapter into the base.",
            )
        return Place(tensor, local, int(match[2]) if match else None)


def _with_weight(tensor: str) -> str:
    return tensor if tensor.endswith(".weight") else f"{tensor}.weight"


def _templates(architecture: str, path: str) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Give the package's name map with ``{bid}`` for the block: module to tensor, and back."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        raise UnsupportedError(
            f"the installed gguf package does not know the architecture {architecture!r}",
            path=path,
            hint="pip install --upgrade gguf",
        )
    arch: MODEL_ARCH = numbers[architecture]
    own = TensorNameMap.arch_block_mappings_cfg.get(arch, {})
    blocks = {**TensorNameMap.block_mappings_cfg, **own}
    tensors: dict[str, str] = {}
    modules: dict[str, tuple[str, ...]] = {}
    for table in (TensorNameMap.mappings_cfg, blocks):
        for tensor, names in table.items():
            if tensor in MODEL_TENSORS[arch]:
                template = TENSOR_NAMES[tensor]
                tensors.update(dict.fromkeys(names, template))
                modules[template] = tuple(dict.fromkeys(names))
    return tensors, modules
