"""Names in LoRA files of image models: keys taken apart, flattened names, modules of a base.

kohya's trainer writes a module's path with underscores for dots, behind the name of the component:
``lora_unet_mid_block_attentions_0_proj_in``.  Where a dot was cannot be told from such a name, and
the trainer's loader does not try: it flattens the paths of the model and compares.  So a flattened
name is kept as the target's name unless the base model or the user says what it stands for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from rmmformat.converters.tensors import SafetensorsStore
from rmmformat.errors import SourceError

__all__ = ["COMPONENTS", "Key", "flatten", "is_flat", "modules_of", "parse_key"]

#: Component of a diffusers pipeline to the word that kohya's names begin with.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet", "lycoris"),
    "transformer": ("lora_transformer", "lora_unet", "lycoris"),
    "prior": ("lora_prior_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
_FLAT = re.compile(r"(?:lora_(?:unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_[^.]+")


@dataclasses.dataclass(frozen=True)
class Key:
    """A tensor name taken apart.

    Parameters
    ----------
    module
        What is adapted, dotted or flattened.
    part
        ``A``, ``B``, ``alpha``, or the rest of the name of whatever else belongs to the module.
    """

    module: str
    part: str


_FACTORS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<module>.+)\.lora_(?P<side>down|up)\.weight",
        r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight",
        r"(?P<module>.+)\.lora\.(?P<side>down|up)\.weight",
        r"(?P<module>.+)\.lora_linear_layer\.(?P<side>down|up)\.weight",
        r"(?P<module>.+)_lora\.(?P<side>down|up)\.weight",
    )
)
_REST = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>alpha|dora_scale|diff|diff_b|set_weight|lora_magnitude_vector|lora_B\.bias)"
)


def parse_key(name: str) -> Key | None:
    """Take a tensor name apart; None if it is none of the known ones.

    >>> parse_key("unet.mid.attn1.processor.to_out_lora.down.weight")
    Key(module='unet.mid.attn1.to_out.0', part='A')
    """
    for pattern in _FACTORS:
        match = pattern.fullmatch(name)
        if match is not None:
            part = "A" if match["side"] in ("down", "A") else "B"
            return Key(_without_processor(match["module"]), part)
    match = _REST.fullmatch(name)
    return None if match is None else Key(match["module"], match["part"])


def _without_processor(module: str) -> str:
    """Name the layer that an attention processor of an old diffusers put its factors beside."""
    owner, mark, leaf = module.rpartition(".processor.")
    if not mark:
        return module
    return f"{owner}.{'to_out.0' if leaf == 'to_out' else leaf}"


def is_flat(name: str) -> bool:
    """Say whether a name is flattened."""
    return _FLAT.fullmatch(name) is not None


def flatten(component: str, module: str) -> str:
    """Flatten the path of a module as kohya's trainer does.

    >>> flatten("lora_unet", "mid_block.attentions.0.proj_in")
    'lora_unet_mid_block_attentions_0_proj_in'
    """
    return f"{component}_{module.replace('.', '_')}"


def modules_of(base: Path) -> Mapping[str, str | None]:
    """Map flattened names to paths, for every module of a diffusers pipeline folder.

    Parameters
    ----------
    base
        A folder with subfolders ``unet``, ``text_encoder`` and so on, which hold safetensors files;
        their headers are read.

    Returns
    -------
    mapping
        Flattened name to ``COMPONENT.PATH``; None where several paths flatten to one name.

    Raises
    ------
    SourceError
        There is no such folder, or a file in it is broken.
    """
    known: dict[str, str | None] = {}
    found = False
    for component, words in COMPONENTS.items():
        try:
            files = tuple(sorted((base / component).glob("*.safetensors")))
        except OSError:
            files = ()
        for file in files:
            found = True
            for tensor in SafetensorsStore((file,)).metas:
                module = tensor.rpartition(".")[0]
                for word in words:
                    flat, path = flatten(word, module), f"{component}.{module}"
                    # A UNet and a transformer never are in one pipeline.
                    known[flat] = path if known.get(flat, path) == path else None
    if not found:
        raise SourceError(
            f"no safetensors file in a subfolder called {', '.join(COMPONENTS)}",
            path=str(base),
            hint="The base of image LoRAs is a folder that a diffusers pipeline was saved to.",
        )
    return known
