"""One GGUF adapter in memory: a header that stays, and values that tasks are reconstructed into."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from rmmformat.collection import Collection
from rmmformat.converters.gguf_arch import rope_order
from rmmformat.converters.gguf_layout import DTYPES, Layout, Plan, Slot
from rmmformat.converters.gguf_payload import header, payload
from rmmformat.converters.gguf_scales import is_exact
from rmmformat.errors import InternalError, LossyConversionError
from rmmformat.model import Array, Factors, TargetInfo
from rmmformat.runtimes._memory_file import MemoryFile

__all__ = ["MemoryAdapter", "Recipe", "recipe_for"]


@dataclasses.dataclass(frozen=True)
class _Change:
    """What a factor still needs once it is reconstructed in its place.

    Attributes
    ----------
    fold
        Factor for its values.
    narrowed
        It comes in another dtype than its own.
    order
        (n_out,), rows in llama.cpp's order; only where that is all there is to do.
    """

    slot: Slot
    info: TargetInfo
    fold: float
    narrowed: bool
    order: npt.NDArray[np.intp] | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a task gets into a file: all that can be known before its values are.

    Attributes
    ----------
    layout
        Of the file.
    changes
        Of the factors that llama.cpp has otherwise than a collection.
    """

    layout: Layout
    changes: tuple[_Change, ...]


def recipe_for(collection: Collection, task: str, planned: Plan) -> Recipe:
    """Hold a plan against the places that a collection reconstructs to, which must be the same.

    Raises
    ------
    InternalError
        They are not.
    """
    slots = planned.layout.slots
    places = collection.places(task, dtype=slots[0].dtype)
    own = collection.targets(task)
    changes = []
    for slot in slots:
        if places[slot.target]["AB".index(slot.factor)] != slot.offset:
            raise InternalError(
                f"tensor {slot.name!r}: the arena has it elsewhere than the header says"
            )
        info = own[slot.target]
        fold = planned.folds[slot.target] if slot.factor == "B" else 1.0
        narrowed = DTYPES[slot.dtype] != (info.dtype_a if slot.factor == "A" else info.dtype_b)
        order = None
        if slot.heads and fold == 1:
            order = rope_order(slot.shape[0], slot.heads)
        if narrowed or slot.turned or slot.heads or fold != 1:
            changes.append(_Change(slot, info, fold, narrowed, order))
    return Recipe(planned.layout, tuple(changes))


class MemoryAdapter:
    """A file in memory with the header of a layout; only its values change.

    Attributes
    ----------
    file
        The file.
    task
        Whose values it has, or None.
    """

    def __init__(self, layout: Layout) -> None:
        head = header(layout)
        self.task: str | None = None
        self.file = MemoryFile(len(head) + layout.n_bytes)
        self.file.bytes[: len(head)] = np.frombuffer(head, np.uint8)
        self._arena = self.file.bytes[len(head) :]

    def fill(self, collection: Collection, task: str, recipe: Recipe, threads: int) -> None:
        """Reconstruct a task in place, then see to the few factors that llama.cpp has otherwise.

        Raises
        ------
        NotFoundError, FormatError, UnsupportedError
            As :meth:`Collection.load`.
        LossyConversionError
            A value would become infinite in the file's type.
        """
        if self.task == task:
            return
        self.task = None
        dtype = recipe.layout.slots[0].dtype
        collection.load_into(task, self._arena, dtype=dtype, threads=threads)
        for change in recipe.changes:
            self._apply(change, collection, task)
        self.task = task

    def _apply(self, change: _Change, collection: Collection, task: str) -> None:
        slot, info = change.slot, change.info
        shape_a, shape_b = (info.rank, info.shape.n_in), (info.shape.n_out, info.rank)
        raw = self._arena[slot.offset : slot.offset + slot.n_bytes]
        flat: Array = raw.view(DTYPES[slot.dtype])
        view = flat.reshape(shape_a if slot.factor == "A" else shape_b)
        if change.narrowed and slot.dtype != "f32" and not np.isfinite(view).all():
            raise LossyConversionError(
                f"task {task!r}, tensor {slot.name!r}: values are too large for {slot.dtype}",
                hint="Choose f32.",
            )
        if change.order is not None:
            bits = raw.view(f"u{flat.itemsize}").reshape(shape_b)
            bits[:] = bits.take(change.order, axis=0)
        elif slot.turned or change.fold != 1:
            if change.narrowed and not is_exact(change.fold):
                # Round once, after the product, as the exporter does.
                view = np.empty(shape_b, info.dtype_b)
                collection.load_factor(task, slot.target, "B", view)
            # Only the slot's own factor is looked at.
            if slot.factor == "A":
                factors = Factors(view, np.empty((0, info.rank), view.dtype), info.scale)
            else:
                factors = Factors(np.empty((info.rank, 0), view.dtype), view, info.scale)
            flat[:] = payload(slot, factors, change.fold).reshape(-1)
