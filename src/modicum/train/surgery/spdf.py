"""spdf: trains with a fixed random part of each layer's weights at zero, then with all of them.

Before the first step the same share of the weights of every linear layer is drawn at random and removed.
They get no gradient and stay zero, so a sparse matrix product would cost `sparsity` less; embeddings, output
head, norms and biases stay dense. Afterwards the zeros are free to learn.

    W <- (1 - M) W,   dW <- (1 - M) dW      while pretraining,  |M| = sparsity |W| in each layer
    FLOPs = dense - 6 T |M|                 of a sequence of T tokens: attention scores and head count in full

Thangarasa et al. 2023, arXiv:2303.10464, section 2. Their dense fine-tuning is a run of its own: here any
later run without this surgery (`modicum pretrain --model RUN/model`, or a recipe's adapt stage, whose forms are
dense updates of all weights); within one run it is the last share `dense` of the steps. Departs from the
paper: the matrix products are executed dense, so FLOPs are counted, not saved; the masks do not follow the
run's seed but their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modicum.train.engine import TrainEngine
from modicum.train.surgery._masks import Masking, check_sparsity, prunable

CLAIM = {
    "figure": "2.5 times fewer pretraining FLOPs at 75% sparsity without a significant loss after dense fine-tuning",
    "where": "abstract",
    "scale": "GPT-3 XL, 1.3B parameters",
}
SWEEP = {"sparsity": (0.75,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    sparsity: float = 0.75  # share of each layer's weights removed; the paper measures 0.5 and 0.75
    dense: float = 0.0  # share of the run's steps, at its end, in which all weights train
    seed: int = 0  # of the masks

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if not 0 <= self.dense < 1:
            raise ValueError(f"dense={self.dense} must lie in [0, 1): 0 leaves dense training to a later run")


TOY = Config(dense=0.25)


class SparsePretraining(Masking):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.freed = False  # the dense phase has begun
        self.sparse_steps = 0

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        model = super().prepare(model, state)
        if state is not None:
            return model  # masks and weights come from the checkpoint
        generator = torch.Generator().manual_seed(self.config.seed)
        for name, p in prunable(model).items():
            order = torch.randperm(p.numel(), generator=generator)[: self._count(p.numel())].to(p.device)
            cut = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
            self.cut[name] = cut.index_fill_(0, order, True).view(p.shape)
            p.data.masked_fill_(self.cut[name], 0.0)
        return model

    def _count(self, weights: int) -> int:
        return round(self.config.sparsity * weights)

    def start(self, trainer: TrainEngine) -> None:
        super().start(trainer)
        self.sparse_steps = max(round((1 - self.config.dense) * trainer.config.total_steps), 1)

    def marks(self, trainer: TrainEngine) -> list[int]:
        return [self.sparse_steps] if self.sparse_steps < trainer.config.total_steps else []

    def removed(self, step: int) -> int:
        if self.freed or step >= self.sparse_steps:
            return 0
        return sum(self._count(size) for size in self.sizes.values())

    def after_step(self, trainer: TrainEngine) -> None:
        super().after_step(trainer)
        if self.config.dense and trainer.steps_done >= self.sparse_steps:
            self.cut, self.freed = {}, True

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"freed": self.freed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.freed = state["freed"]
