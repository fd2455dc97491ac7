"""One task's factors in one place, written over by the next task's: a session that keeps none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from rmmformat.collection import Collection
from rmmformat.loaded import LoadedTask

if TYPE_CHECKING:
    from onnxruntime import OrtValue

    from rmmformat.runtimes.onnx_bound import Bound

__all__ = ["Live"]


class Live:
    """Values that stay bound while tasks of the same shapes come and go in them.

    Wrapping and binding a task's factors takes longer than reconstructing them; here both happen
    once for each set of shapes.  Only in float32, in which every factor fits.

    Parameters
    ----------
    collection
        Where tasks come from.
    factors, parameters
        Give the inputs that a loaded task's factors are, and those that a task replaces as a whole.
    bind
        Makes a bound set of values.

    Attributes
    ----------
    lock
        Held by whoever runs: there is one task at a time.
    """

    def __init__(
        self,
        collection: Collection,
        factors: Callable[[LoadedTask], dict[str, OrtValue]],
        parameters: Callable[[str], dict[str, OrtValue]],
        bind: Callable[[dict[str, OrtValue]], Bound],
    ) -> None:
        self.lock = threading.Lock()
        self._collection = collection
        self._factors, self._parameters, self._bind = factors, parameters, bind
        self._shapes: dict[str, Hashable] = {}
        self._known: dict[Hashable, Hashable] = {}  # equal shapes are one object
        self._task: str | None = None
        self._loaded: LoadedTask | None = None
        self._here: Hashable = None  # shapes of what is loaded
        self._values: dict[str, OrtValue] = {}
        self._extra: dict[str, OrtValue] = {}
        self._bound = bind({})

    def put(self, task: str) -> Bound:
        """Reconstruct a task where the last one was, unless it is there; under the lock."""
        if task == self._task:
            return self._bound
        if task not in self._shapes:
            shapes = tuple(
                (name, info.shape, info.rank, info.scale)
                for name, info in self._collection.targets(task).items()
            )
            self._shapes[task] = self._known.setdefault(shapes, shapes)
        extra = self._parameters(task)  # may refuse the task: before anything is written over
        self._task = None
        if self._loaded is not None and self._here is self._shapes[task]:
            self._collection.load_into(task, self._loaded.arena, threads=1)
            if extra or self._extra:
                self._bound = self._bind(self._values | extra)
        else:
            self._here = None
            loaded = self._collection.load(task, threads=1)
            self._values = self._factors(loaded)
            self._bound = self._bind(self._values | extra)
            self._loaded, self._here = loaded, self._shapes[task]
        self._task, self._extra = task, extra
        return self._bound
