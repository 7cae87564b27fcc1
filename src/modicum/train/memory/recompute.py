"""recompute: keeps the inputs of each layer and computes its activations again in the backward pass.

What autograd would keep inside a layer is dropped in the forward pass; the backward pass runs the layer's
forward pass once more. A step of L layers keeps L inputs and one layer's activations instead of L layers'.

    kept = L B T D + activations(one layer)        FLOPs = 4/3 of the plain step's

Chen et al. 2016, arXiv:1604.06174, section 3. Departs from the paper: every layer is a segment, where the
paper cuts L layers into sqrt(L) segments: a decoder's layer holds some 30 times the bytes of its input, so
that keeping each layer's input is the cheaper part already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from modicum.core.errors import UserError
from modicum.train.memory import MemorySaver

CLAIM = {
    "figure": "O(sqrt(n)) memory for n layers at the cost of one more forward pass",
    "where": "abstract",
    "scale": "1,000-layer residual network, 48 GB to 7 GB",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Recompute(MemorySaver):
    provides = frozenset({"activation_memory"})
    conflicts = frozenset({"activation_memory"})
    config: Config

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        if not hasattr(model, "checkpoint_layers"):
            raise UserError(f"memory/recompute: {type(model).__name__} cannot recompute its layers; leave it out")
        setattr(model, "checkpoint_layers", True)  # noqa: B010  (no nn.Module declares it)
        return model
