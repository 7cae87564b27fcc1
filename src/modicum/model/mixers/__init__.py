"""Mixers: what mixes tokens in a decoder's layer.

A mixer is one file here holding one public subclass of `Mixer`; its name is the file's, and `LayerConfig.mixer` names
it. Another distribution adds one through the entry-point group `modicum.mixers` (`NAME = package.module`). It is found
by its place; adding one touches nothing else.

A mixer keeps nothing between calls but what it gives to `attend`: keys and values, in the heads of its `LayerConfig`.
So it trains, packs documents, generates from caches and is served like any other. Kernels know `softmax` alone and
leave the rest to the decoder as written.

Shapes: B batch, T tokens, D width, R rotated dimensions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from modicum.core.errors import UserError, unknown
from modicum.model.attend import Attend

if TYPE_CHECKING:
    from modicum.model.config import DecoderConfig, LayerConfig

Rotation = tuple[Tensor, Tensor] | None  # cos and sin, B1T(R/2)


class Mixer(nn.Module):
    """Made as `cls(config, layer)`; reads `config.per_layer[layer]`. Its matrix products are `nn.Linear`s, so that
    linear forms go into it; what is added to the residual stream comes out of one called `o`."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """y_BTD. `rotation` is for queries and keys; None where the layer does not rotate."""
        raise NotImplementedError

    @classmethod
    def matmul_weights(cls, layer: LayerConfig, width: int) -> int:
        """Weights that take part in matrix products."""
        raise NotImplementedError

    @classmethod
    def other_parameters(cls, layer: LayerConfig, width: int) -> int:
        """Parameters besides those: biases, norms, scales."""
        return 0


@functools.cache
def mixers() -> dict[str, str]:
    """The module of every mixer by name; nothing is imported."""
    files = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.name.startswith("_"))
    modules = {name: f"{__name__}.{name}" for name in files}
    for entry in importlib.metadata.entry_points(group="modicum.mixers"):
        if entry.name in modules:
            raise UserError(
                f"mixer {entry.name!r} of {entry.value} is already taken by {modules[entry.name]}; rename it"
            )
        modules[entry.name] = entry.value
    return modules


@functools.cache
def load(name: str) -> type[Mixer]:
    """Raises `UserError` with a near miss for a name that is not known."""
    if name not in mixers():
        raise unknown("mixer", name, mixers())
    module = importlib.import_module(mixers()[name])
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    classes = [v for v in own if issubclass(v, Mixer) and not v.__name__.startswith("_")]
    if len(classes) != 1:
        raise UserError(f"{module.__name__}: a mixer's file holds one public subclass of Mixer, found {len(classes)}")
    return classes[0]
