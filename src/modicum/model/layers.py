"""The parts of a decoder layer besides its mixer: MLP, block.

Shapes: B batch, T tokens, D width, F MLP width.
Every matrix product is a plain `nn.Linear`, so a method may replace any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.model import fused, mixers, sublayers
from modicum.model.attend import Attend
from modicum.model.config import DecoderConfig
from modicum.model.mixers import Rotation
from modicum.model.norms import RMSNorm, make_norm
from modicum.model.wide import widened

__all__ = ["ACTIVATION", "MLP", "Block", "RMSNorm", "make_norm"]
ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), or down(act(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        c = config.per_layer[layer]
        self.act, self.gated = ACTIVATION[c.activation], c.gated
        if c.gated:
            self.gate = nn.Linear(config.width, c.mlp_width, bias=c.mlp_bias)
        self.up = nn.Linear(config.width, c.mlp_width, bias=c.mlp_bias)
        self.down = nn.Linear(c.mlp_width, config.width, bias=c.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gated:
            gate_BTF, up_BTF = self.gate(x_BTD), self.up(x_BTD)
            if self.act is F.silu and fused.ready(gate_BTF) and up_BTF.dtype == gate_BTF.dtype:
                return self.down(fused.swiglu(gate_BTF, up_BTF))
            return self.down(self.act(gate_BTF) * up_BTF)
        return self.down(self.act(self.up(x_BTD)))


class Router(nn.Module):
    """p = sigmoid(w . x + b): whether a layer is needed. Begins by letting all through (p = 0.88).

    soft: the layer gives p layer(x) + (1 - p) x, and `last_BT` is the p of its last forward pass."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.full((1,), 2.0))
        self.soft, self.last_BT = False, torch.empty(0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return torch.sigmoid(x_BTD @ self.weight + self.bias)


class Block(nn.Module):
    """One layer: mixer and MLP around the residual stream, with norms where the config puts them."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.norm_place, self.parallel = config.per_layer[layer].norm_place, config.per_layer[layer].parallel
        self.attention = mixers.load(config.per_layer[layer].mixer)(config, layer)
        self.mlp = MLP(config, layer)
        if self.norm_place in ("pre", "sandwich", "after"):
            self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)
        if self.norm_place in ("output", "sandwich"):
            self.attention_out_norm, self.mlp_out_norm = make_norm(config), make_norm(config)
        if config.per_layer[layer].router:
            self.router = Router(config.width)

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend, source_BTD: Tensor | None = None) -> Tensor:
        with widened(x_BTD):
            y_BTD = self._whole(x_BTD, rotation, attend, source_BTD)
        router: Any = getattr(self, "router", None)
        if router is None or not router.soft:
            return y_BTD
        router.last_BT = p_BT = router(x_BTD)
        return x_BTD + p_BT[..., None] * (y_BTD - x_BTD)

    def _whole(self, x_BTD: Tensor, rotation: Rotation, attend: Attend, source_BTD: Tensor | None) -> Tensor:
        x = x_BTD
        if source_BTD is not None:  # pre-norm, as mixer swiftkv demands
            x = x + self.attention(self.attention_norm(x), rotation, attend, source_BTD)
            return x + self.mlp(self.mlp_norm(x))
        if self.parallel:
            return x + self.attention(self.attention_norm(x), rotation, attend) + self.mlp(self.mlp_norm(x))
        if self.norm_place == "pre":
            if (whole := sublayers.run(self, x, rotation, attend)) is not None:
                return whole
            x = x + self.attention(self.attention_norm(x), rotation, attend)
            return x + self.mlp(self.mlp_norm(x))
        if self.norm_place == "output":
            x = x + self.attention_out_norm(self.attention(x, rotation, attend))
            return x + self.mlp_out_norm(self.mlp(x))
        if self.norm_place == "sandwich":
            x = x + self.attention_out_norm(self.attention(self.attention_norm(x), rotation, attend))
            return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.attention(x, rotation, attend))
        return self.mlp_norm(x + self.mlp(x))
