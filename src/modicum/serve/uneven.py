"""Layers of different shapes in one cache: each layer's heads and dimensions padded with zeros to the largest.

Shapes: B batch, T tokens, H query heads, G KV heads, R = H / G, E head dimension.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from modicum.model.attend import Attend
from modicum.model.config import DecoderConfig

SHAPE = frozenset({"heads", "kv_heads", "head_dim"})  # fields that decide what a layer's cache looks like


def largest(config: DecoderConfig) -> tuple[int, int]:
    """(KV heads, head dimension) that hold any layer's keys."""
    return max(c.kv_heads for c in config.per_layer), max(c.head_dim for c in config.per_layer)


class PaddedAttend:
    """An `Attend` around one whose cache has a single shape. Zero dimensions change no score, zero heads no output."""

    def __init__(self, attend: Attend, config: DecoderConfig):
        self.attend, (self.heads, self.dim) = attend, largest(config)

    def __call__(self, layer: int, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, **how: object) -> Tensor:
        G, E = k_BGTE.shape[1], k_BGTE.shape[3]
        pad = (0, self.dim - E, 0, 0, 0, self.heads - G)
        q_BGRTE = F.pad(q_BHTE.unflatten(1, (G, -1)), (*pad[:4], 0, 0, *pad[4:]))
        out_BHTE = self.attend(layer, q_BGRTE.flatten(1, 2), F.pad(k_BGTE, pad), F.pad(v_BGTE, pad), **how)  # type: ignore[arg-type]
        return out_BHTE.unflatten(1, (self.heads, -1))[:, :G, ..., :E].flatten(1, 2)


def attend_for(attend: Attend, config: DecoderConfig) -> Attend:
    return PaddedAttend(attend, config) if SHAPE & config.varying else attend
