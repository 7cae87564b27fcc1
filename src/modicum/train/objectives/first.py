"""first: routers learn which layers a sequence needs, and the engine leaves out the others when it answers.

Every layer but the first and the last has a router, p = sigmoid(w . x + b) of what the layer is given. While routers
are trained the model is frozen and a layer gives p layer(x) + (1 - p) x;

    loss = next-token loss + penalty * mean over layers of p + sharp * mean over layers of p (1 - p)

for each token. Served, all layers compute a prompt; a layer whose p over the whole prompt is 1/2 or less in the mean is
then left out for *every* token of the answer, so its cache has no holes: it gets no entries and is never read
(`serve.backends.routed`). Sequences of one batch may leave out different layers. `modicum adapt` afterwards trains LoRA
on the layers that are left.

Jain et al. 2024, arXiv:2410.12513 (Findings of EMNLP 2025; the frame from the abstract, details from memory). Departs:
the term that draws p to 0 or 1 is p (1 - p); routers do not depend on the task; LoRA is a run of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from modicum.core.errors import UserError
from modicum.model.layers import Router
from modicum.train.loss import NO_LOSS, token_loss
from modicum.train.objectives import Loss, Objective, Step


@dataclass(frozen=True, kw_only=True)
class Config:
    penalty: Annotated[float, Field(ge=0)] = 0.5  # of a layer's probability, nats
    sharp: Annotated[float, Field(ge=0)] = 0.1  # of its being neither 0 nor 1


class First(Objective):
    config: Config
    conflicts = frozenset({"fsdp", "linear"})

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        decoder: Any = model
        add_routers(decoder)
        for p in model.parameters():
            p.requires_grad_(False)
        for layer in routed(decoder):
            layer.router.soft = True
            layer.router.requires_grad_(True)
        return model

    def finish(self, trainer: Any) -> None:
        for layer in routed(trainer.model):
            layer.router.soft = False
        trainer.model.requires_grad_(True)

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Loss:
        total, count = token_loss(model, batch)
        mask_BT = batch.targets_BT != NO_LOSS
        used = [layer.router.last_BT for layer in routed(model) if layer.router.soft]
        if not used:
            return Loss(total, count)
        p_LBT = torch.stack(used).float()
        each_BT = (self.config.penalty * p_LBT + self.config.sharp * p_LBT * (1 - p_LBT)).mean(0)
        metrics = {"used": (p_LBT.detach().mean(0) * mask_BT).sum()}
        return Loss(total + (each_BT * mask_BT).sum(), count, metrics)


def routed(model: Any) -> list[Any]:
    """The layers that have a router."""
    return [layer for layer in getattr(model, "layers", ()) if getattr(layer, "router", None) is not None]


def add_routers(model: Any) -> None:
    """Give every layer but the first and the last a router that lets all through, in place."""
    if routed(model):
        return
    if not hasattr(model, "layers") or model.config.layers < 3:
        raise UserError("first needs a decoder of three layers or more: the first and the last are never left out")
    c = model.config
    before = c.overrides or ({},) * c.layers
    overrides = tuple(dict(o) | {"router": 0 < i < c.layers - 1} for i, o in enumerate(before))
    model.config = dataclasses.replace(c, overrides=overrides, family="modicum")
    for layer in model.layers[1:-1]:
        layer.router = Router(c.width).to(model.device, model.dtype)
