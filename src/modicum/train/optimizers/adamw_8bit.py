"""adamw-8bit: AdamW whose moments are stored in 8 bits.

The moments of each matrix are kept as one byte per value and one scale per block of a row; a step decodes
them, takes the gradient in, updates the weight from the float32 values and encodes them again. Values go
through in slices, so that little float32 exists at once.

    m = b1 decode(m) + (1 - b1) g         v = b2 decode(v) + (1 - b2) g^2
    w = w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) - lr * decay * w
    m, v = encode(m), encode(v)           nearest of 256 points of a dynamic code, scaled by max|block|

Embedding tables keep float32 moments, because rare tokens give gradients of very different size in one block;
so do vectors, which are small. Dettmers et al. 2022, arXiv:2110.02861, section 2 (blocks, code, the
embedding's states in 32 bits).
Departs from the paper: blocks end with the row; the stable embedding layer's normalisation is a matter of the
model and not done; betas and decay default to those of `adamw`, so that the two differ in their states alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.budget.cost import Cost
from modicum.train.optimizers import Optimizer, is_embedding
from modicum.train.optimizers import adamw as plain
from modicum.train.optimizers._moments import Adam, check_adam, check_bits, flat, parted
from modicum.train.parallel import local, rows_like, shard_like

CLAIM = {
    "figure": "32-bit performance at a small fraction of the optimizer states' memory",
    "where": "abstract",
    "scale": "language models to 1.5B parameters, GLUE, WMT'14",
}
SWEEP = {"embedding_bits": (32,)}
SLICE = 1 << 20  # values decoded at once


@dataclass(frozen=True, kw_only=True)
class Config:
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    block: int = 2048  # values that share a scale, within a row
    embedding_bits: int = 32  # of an embedding table's moments: 32 or 8

    def __post_init__(self) -> None:
        check_adam(self.beta1, self.beta2, self.eps, self.weight_decay)
        check_bits(self.embedding_bits, self.block)


class AdamW8bit(Optimizer):
    """State: `NAME:exp_avg`, `NAME:exp_avg_sq` (uint8), their `_scale` per row and block, and `NAME:step`."""

    config: Config
    conflicts = frozenset()

    def __init__(self, config: Config, named: Iterable[tuple[str, Tensor]], *, lr: float = 1e-3):
        super().__init__(config, named, lr=lr)
        self.adam = Adam(beta1=config.beta1, beta2=config.beta2, eps=config.eps, bits=8, block=config.block)
        self.low = {name for name, p in self.named.items() if _is_low(config, name, p.ndim)}
        self.moments: dict[str, dict[str, Tensor]] = {}  # this process's rows
        self.steps: dict[str, int] = {}
        rest = [(name, p) for name, p in self.named.items() if name not in self.low]
        self.rest = plain.AdamW(_plain(config), rest, lr=lr) if rest else None

    @torch.no_grad()
    def step(self, scales: Mapping[str, float]) -> None:
        if self.rest:
            self.rest.step(scales)
        for group in self.split:
            rate = self.lr * group.rate * scales["lr"]
            for name, p in group.named.items():
                if name in self.low and p.grad is not None:
                    self._update(name, local(p), local(p.grad), rate, group.weight_decay)

    def _update(self, name: str, p: Tensor, g: Tensor, rate: float, decay: float) -> None:
        p_RC, g_RC = p.flatten(1), g.flatten(1)
        if name not in self.moments:
            self.moments[name] = self.adam.fresh((p_RC.shape[0], p_RC.shape[1]), p.device)
            self.steps[name] = 0
        self.steps[name] += 1
        rows = max(1, SLICE // max(p_RC.shape[1], 1))
        for first in range(0, len(p_RC), rows):
            part = slice(first, first + rows)
            buffers = {field: value[part] for field, value in self.moments[name].items()}
            ratio = self.adam.ratio(g_RC[part], buffers, self.steps[name])
            p_RC[part].mul_(1 - rate * decay).add_(ratio, alpha=-rate)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.rest.state_dict() if self.rest else {}
        whole = {
            name: {field: rows_like(value, self.named[name]) for field, value in buffers.items()}
            for name, buffers in self.moments.items()
        }
        return state | flat(whole, self.steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        buffers, self.steps, rest = parted(state, self.low)
        self.moments = {
            name: {field: local(shard_like(value, self.named[name])) for field, value in fields.items()}
            for name, fields in buffers.items()
        }
        if self.rest:
            self.rest.load_state_dict(rest)

    @classmethod
    def cost(cls, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        adam = Adam(beta1=config.beta1, beta2=config.beta2, eps=config.eps, bits=8, block=config.block)
        low = {name: shape for name, shape in shapes.items() if _is_low(config, name, len(shape))}
        state_bytes = sum(adam.nbytes((shape[0], math.prod(shape[1:]))) for shape in low.values())
        rest = plain.AdamW.cost(_plain(config), {n: s for n, s in shapes.items() if n not in low})
        count = sum(math.prod(shape) for shape in low.values())
        return Cost(
            peak_bytes=state_bytes + rest.peak_bytes,
            flops=26 * count + rest.flops,
            parameters=count + rest.parameters,
        )


def _is_low(config: Config, name: str, ndim: int) -> bool:
    return ndim >= 2 and (config.embedding_bits == 8 or not is_embedding(name))


def _plain(config: Config) -> plain.Config:
    return plain.Config(beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
