"""A decoder with fewer layers than another, of the same modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from modicum.model.decoder import Decoder


def without(model: Decoder, gone: set[int]) -> Decoder:
    """A decoder of the layers that are not in `gone`; nothing is copied."""
    kept = [i for i in range(model.config.layers) if i not in gone]
    overrides = tuple(model.config.overrides[i] for i in kept) if model.config.overrides else ()
    with torch.device("meta"):
        made = Decoder(dataclasses.replace(model.config, layers=len(kept), overrides=overrides), init=False)
    for name, module in model.named_children():
        if name != "layers":
            setattr(made, name, module)
    for number, index in enumerate(kept):
        layer: Any = model.layers[index]
        layer.attention.layer = number
        made.layers[number] = layer
    return made.train(model.training)
