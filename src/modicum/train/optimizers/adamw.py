"""adamw: Adam with decoupled weight decay.

The first and second moments of each gradient are tracked and their ratio, corrected for starting at
zero, is the update; weight decay shrinks matrices directly instead of through the gradient.

    m = b1 m + (1 - b1) g                 v = b2 v + (1 - b2) g^2
    w = w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) - lr * decay * w

Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2. The arithmetic is torch.optim.AdamW's fused
kernel. Departs from the paper: betas, eps and decay default to what language-model pretraining settled on
(Touvron et al. 2023, arXiv:2302.13971, section 2.3), and decay is multiplied by the peak rate as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.budget.cost import Cost
from modicum.train.optimizers import Optimizer
from modicum.train.parallel import shard_like


@dataclass(frozen=True, kw_only=True)
class Config:
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must lie in [0, 1)")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError("eps must be positive and weight_decay must not be negative")


class AdamW(Optimizer):
    """8 bytes of state per parameter (two float32 moments) and one step count per tensor."""

    config: Config
    supports = frozenset({"accumulation", "clip", "masters", "fsdp"})

    def __init__(self, config: Config, named: Iterable[tuple[str, Tensor]], *, lr: float = 1e-3):
        super().__init__(config, named, lr=lr)
        groups = [{"params": list(g.named.values()), "weight_decay": g.weight_decay, "rate": g.rate}
                  for g in self.split]
        betas = (config.beta1, config.beta2)
        self.inner = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True)

    def step(self, scales: Mapping[str, float]) -> None:
        for group in self.inner.param_groups:
            group["lr"] = self.lr * group["rate"] * scales["lr"]
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Per parameter `NAME:exp_avg` and `NAME:exp_avg_sq` (of its shape) and `NAME:step` (a scalar)."""
        return {f"{name}:{key}": value for name, p in self.named.items()
                for key, value in self.inner.state.get(p, {}).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.state.clear()
        for key, value in state.items():
            name, _, field = key.rpartition(":")
            p = self.named[name]
            if field == "step":
                self.inner.state[p][field] = value.to(p.device, torch.float32, copy=True)
            else:
                self.inner.state[p][field] = shard_like(value.to(torch.float32), p)

    @classmethod
    def cost(cls, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        parameters = sum(math.prod(shape) for shape in shapes.values())
        return Cost(peak_bytes=8 * parameters + 4 * len(shapes), flops=14 * parameters, parameters=parameters)
