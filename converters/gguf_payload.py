"""The bytes of a GGUF LoRA adapter: its header, and the values of each tensor."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from rmmformat.converters.gguf_arch import rope_order
from rmmformat.converters.gguf_layout import BLOCK_BYTES, DTYPES, Layout, Slot, padded
from rmmformat.errors import LossyConversionError
from rmmformat.model import Array, Factors

__all__ = ["header", "payload"]


def payload(slot: Slot, factors: Factors, fold: float, path: str = "") -> Array:
    """Give the values of a slot as they are written.

    Parameters
    ----------
    factors
        Of its target.
    fold
        Of its target; only B is multiplied.

    Returns
    -------
    C-contiguous array of the slot's shape, for Q8_0 of its blocks' bytes.

    Raises
    ------
    LossyConversionError
        A value would become infinite in the slot's type.
    """
    array: Array = factors.A if slot.factor == "A" else factors.B
    wide = array.dtype
    if slot.turned:
        array = array.T
    if slot.factor == "B" and fold != 1:
        with np.errstate(over="ignore", under="ignore"):
            array = np.zeros_like(array) if fold == 0 else array.astype(np.float64) * fold
    if slot.heads:
        array = array[rope_order(slot.shape[0], slot.heads)]
    if slot.dtype == "q8_0":
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import quantize

        single = np.ascontiguousarray(array, dtype=np.float32)
        _check_finite(single, array, slot, path)
        with np.errstate(over="ignore"):
            blocks: Array = quantize(single, GGMLQuantizationType.Q8_0)
        # The scale of a block is a float16.
        scales = blocks.reshape(-1, BLOCK_BYTES)[:, :2].copy().view(np.float16)
        _check_finite(scales, np.zeros(1) if np.isfinite(single).all() else single, slot, path)
        return blocks
    with np.errstate(over="ignore", under="ignore"):
        stored: Array = np.ascontiguousarray(array, dtype=DTYPES[slot.dtype])
    if stored.dtype != wide or fold != 1:
        _check_finite(stored, array, slot, path)
    return stored


def _check_finite(stored: Array, original: Array, slot: Slot, path: str) -> None:
    if not np.isfinite(stored).all() and np.isfinite(original).all():
        raise LossyConversionError(
            f"tensor {slot.name!r}: values are too large for {slot.dtype}",
            path=path or None,
            hint="Choose f32: --dtype f32.",
        )


def header(layout: Layout, *, name: str = "", base_model: str = "") -> bytes:
    """Write all that comes before the data section, padding included.

    Parameters
    ----------
    name
        Of the task, for people.
    base_model
        Id of the base model, for people and for the importer.
    """
    from gguf.constants import GGMLQuantizationType, Keys
    from gguf.gguf_writer import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = GGUFWriter(path, layout.architecture)
        writer.add_type("adapter")
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, layout.alpha)
        if layout.alignment != writer.data_alignment:
            writer.add_custom_alignment(layout.alignment)
        if name:
            writer.add_name(name)
        if base_model:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base_model)
        for key, value in layout.heads:
            if isinstance(value, tuple):
                writer.add_array(key, list(value))
            else:
                writer.add_uint32(key, value)
        for slot in layout.slots:
            writer.add_tensor_info(
                slot.name,
                slot.shape,
                DTYPES["f32"],
                slot.n_bytes,
                raw_dtype=GGMLQuantizationType[slot.dtype.upper()],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        raw = path.read_bytes()
    return raw.ljust(padded(len(raw), layout.alignment), b"\0")
