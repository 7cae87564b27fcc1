"""adamw: Adam with decoupled weight decay.

The first and second moments of each gradient are tracked and their ratio, corrected for starting at
zero, is the update; weight decay shrinks matrices directly instead of through the gradient.

    m = b1 m + (1 - b1) g                 v = b2 v + (1 - b2) g^2
    w = w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) - lr * decay * w

Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2. The arithmetic is PyTorch's fused
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
from torch.optim.adamw import adamw  # the function: torch.optim's classes import the compiler, seconds

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
    """Two moments in the parameter's dtype (float32 unless masters=false), one step count per tensor."""

    config: Config
    conflicts = frozenset()

    def __init__(self, config: Config, named: Iterable[tuple[str, Tensor]], *, lr: float = 1e-3):
        super().__init__(config, named, lr=lr)
        self.state: dict[str, dict[str, Tensor]] = {}  # by parameter: exp_avg, exp_avg_sq, step

    @torch.no_grad()
    def step(self, scales: Mapping[str, float]) -> None:
        for group in self.split:
            named = {name: p for name, p in group.named.items() if p.grad is not None}
            for name, p in named.items():
                if name not in self.state:
                    self.state[name] = {
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                        "step": torch.zeros((), device=p.device),
                    }
            states = [self.state[name] for name in named]
            adamw(
                [*named.values()],
                [p.grad for p in named.values() if p.grad is not None],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                lr=self.lr * group.rate * scales["lr"],
                weight_decay=group.weight_decay,
            )

    def state_dict(self) -> dict[str, Any]:
        """Per parameter `NAME:exp_avg` and `NAME:exp_avg_sq` (of its shape) and `NAME:step` (a scalar)."""
        return {f"{name}:{key}": value for name, state in self.state.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = {}
        for key, value in state.items():
            name, _, field = key.rpartition(":")
            p = self.named[name]
            self.state.setdefault(name, {})[field] = (
                value.to(p.device, copy=True) if field == "step" else shard_like(value, p)
            )

    @classmethod
    def cost(cls, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        parameters = sum(math.prod(shape) for shape in shapes.values())
        return Cost(peak_bytes=8 * parameters + 4 * len(shapes), flops=14 * parameters, parameters=parameters)
