"""random: keep entries of the prompt by lot, per head; all that is generated stays.

The control of every other policy: what it loses is what a cache of this size loses for being small, and a method that
is no better has learnt nothing of the prompt.

    score[g, s] ~ uniform(0, 1), from a seed and the layer

No paper. The same prompt keeps the same entries in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.serve.kv import ScorePolicy, check_budget


@dataclass(frozen=True, kw_only=True)
class Config:
    budget: float = 0.5  # entries of the prompt that stay; up to 1: a share of the prompt
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget("random", self.budget)


TOY = Config(budget=12)
SWEEP = {"budget": (0.2,)}


class Random(ScorePolicy):
    config: Config

    def score(self, layer: int, q_HWE: Tensor, k_GSE: Tensor, v_GSE: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.config.seed + layer)
        return torch.rand(k_GSE.shape[:2], generator=generator).to(k_GSE.device)
