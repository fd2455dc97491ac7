"""Inputs that stay from run to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue

__all__ = ["Bound"]


class Bound:
    """Values that are inputs of every run of one task, and bindings that have them."""

    def __init__(self, values: dict[str, OrtValue]) -> None:
        self.values = values
        self._free: list[IOBinding] = []  # append and pop are atomic

    def take(self, session: InferenceSession) -> IOBinding:
        """Give a binding that has the values, for one run at a time."""
        try:
            return self._free.pop()
        except IndexError:
            binding = session.io_binding()
            for name, value in self.values.items():
                binding.bind_ortvalue_input(name, value)
            return binding

    def give_back(self, binding: IOBinding) -> None:
        """Take one back for the next run; all else in it will be overwritten."""
        self._free.append(binding)
