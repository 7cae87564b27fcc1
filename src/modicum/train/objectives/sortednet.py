"""sortednet: a model whose prefixes are models: fewer layers, fewer heads, narrower MLPs, trained together.

    depths x groups x mlp: the list of sub-models;  a micro-batch draws one, uniformly;  loss = its next-token loss

The sub-model of depth n is the first n layers, with the shared final norm and head; groups and mlp take the first
key/value groups and MLP channels of each layer. Gradients of several micro-batches, of several sub-models that is, make
one update. Before the first step channels and groups are sorted by importance, which changes no output: a pretrained
model's first half is no good half otherwise. `modicum compress RUN/model --with sortednet:layers=4` takes one out; it
is a plain model, so its products are saved in any program.

Valipour et al. 2023, arXiv:2309.00255, section 3; of a pretrained model (SoFT): Kavehzadeh et al. 2023,
arXiv:2309.08968. Departs: none known; from memory of both papers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import nn

from modicum.core.errors import UserError
from modicum.model.submodel import Submodel, hidden, sort_by_importance
from modicum.train.loss import cross_entropy, token_loss
from modicum.train.objectives import Loss, Objective, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    depths: tuple[float, ...] = (0.5, 0.75, 1.0)  # layers from the first on, as fractions
    groups: tuple[float, ...] = (1.0,)  # key/value groups of each layer
    mlp: tuple[float, ...] = (0.5, 1.0)  # MLP channels of each layer
    draws: int = 1  # sub-models for each micro-batch
    sort: bool = True  # by importance, when the run begins

    def __post_init__(self) -> None:
        for name in ("depths", "groups", "mlp"):
            values = getattr(self, name)
            if not values or not all(0 < v <= 1 for v in values):
                raise ValueError(f"{name}={list(values)} must be fractions above 0, at most 1")
        if self.draws < 1:
            raise ValueError(f"draws={self.draws} must be at least 1")


TOY = Config(depths=(1.0,), mlp=(1.0,), draws=2)
CLAIM = {
    "figure": "up to 160 sub-models at once, at least 96% of the main model's performance",
    "where": "abstract",
    "scale": "BERT base, LLaMA-2-13B",
}


class SortedNet(Objective):
    config: Config
    random = True
    conflicts = frozenset({"fsdp", "linear"})

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        decoder: Any = model
        submodels(decoder, self.config)  # refuses a model that has none
        if self.config.sort:
            sort_by_importance(decoder)
        return model

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        decoder: Any = model
        choices = submodels(decoder, self.config)
        random = Random(f"{step.seed}/{step.index}/{step.micro}/{step.rank}")
        totals = []
        for sub in random.choices(choices, k=self.config.draws):
            if sub.whole(decoder.config):
                total, count = token_loss(model, batch)
            else:
                options = {"positions_BT": batch.positions_BT, "documents_BT": batch.documents_BT}
                h_BTD = hidden(decoder, sub, batch.tokens_BT, **options)
                total, count = cross_entropy(h_BTD, batch.targets_BT, decoder.head)
            totals.append(total)
        return Loss(torch.stack(totals).mean() if len(totals) > 1 else totals[0], count)


def submodels(model: Any, config: Config) -> list[Submodel]:
    """The list that is drawn from."""
    if not hasattr(model, "layers") or not hasattr(model, "config"):
        raise UserError(f"sortednet trains a decoder of modicum, and {type(model).__name__} is none")
    L = model.config.layers
    made = [
        Submodel.of(model.config, range(max(1, round(depth * L))), groups, mlp)
        for depth, groups, mlp in itertools.product(config.depths, config.groups, config.mlp)
    ]
    return list(dict.fromkeys(made))
