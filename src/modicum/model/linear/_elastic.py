"""Elastic forms: a weight in blocks of bytes, of which the first few alone are a coarser weight.

What loads, drops and sorts blocks over a whole model is in `model.elastic`; it knows no method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modicum.model.linear import LinearForm


class Elastic(LinearForm):
    """Provides `elastic`. Block i is the buffer `block_i`, uint8; blocks may differ in size.

    A method gives `block_nbytes` and `block_weight`, calls `set_layout({"blocks": N})` in `__init__`, and computes with
    `partial_sum` if that is set, else with the blocks it holds. A knob `bits`, if it has one, is how many bits per
    weight are kept, over all layers together.
    """

    loaded: int = 0  # blocks that are here
    available: int = 0  # blocks that the model's folder has
    order: list[int]  # position of each block among the blocks of all layers, the most useful first; [] before that
    partial_sum: Tensor | None = None  # stands for the weight, if set: whoever tries sums of blocks sets it

    @classmethod
    def after_attach(cls, model: nn.Module, forms: dict[str, LinearForm]) -> None:
        """Down to `bits` per weight, in the order of the blocks."""
        from modicum.model.elastic import trim

        mine = {name: form for name, form in forms.items() if isinstance(form, Elastic)}
        trim(mine, {name: bits_of(form.config) for name, form in mine.items()})

    def block_nbytes(self, i: int) -> int:
        raise NotImplementedError

    def block_weight(self, i: int) -> Tensor:
        """What block i adds to the weight of the blocks before it: float32 (O, I)."""
        raise NotImplementedError

    def layout(self) -> dict[str, Any]:
        return {"blocks": self.loaded} | ({"order": self.order[: self.loaded]} if self.order else {})

    def set_layout(self, layout: dict[str, Any]) -> None:
        """Hold `blocks` blocks: those above go, new ones are empty, the others stay as they are."""
        n = int(layout["blocks"])
        for i in range(n, self.loaded):
            delattr(self, f"block_{i}")
        for i in range(self.loaded, n):
            self.register_buffer(f"block_{i}", self._like.new_empty(self.block_nbytes(i), dtype=torch.uint8))
        self.loaded, self.available = n, int(layout.get("available", max(n, self.available)))
        self.order = list(layout.get("order", getattr(self, "order", [])))


def bits_of(config: Any) -> float | None:
    """The knob `bits` of an elastic method; None: all blocks stay."""
    return getattr(config, "bits", None)
