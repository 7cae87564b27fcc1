"""A step of a model whose layers have routers (objective `first`): each layer computes only the rows that need it.

A prompt's rows go through all layers, and a layer's router is averaged over them; once the prompt is complete, the
layer takes further rows of the sequence or none. What a layer computes is a plan of its own over those rows: its keys
go where they would, and it reads only what it has written.

Shapes: T rows of the step, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modicum.model.decoder import Decoder
from modicum.serve.backends.planned import PlannedAttend
from modicum.serve.plan import AttentionPlan
from modicum.serve.work import Work, arrange


def has_routers(model: Decoder) -> bool:
    return any(layer.router for layer in model.config.per_layer)


class Routing:
    """Which rows of a step the layers compute. `computed`, `left_out`: rows, summed over layers."""

    def __init__(self, model: Decoder):
        self.model = model
        self.computed = self.left_out = 0

    def hidden(self, plan: AttentionPlan, tokens_1T: Tensor, positions_1T: Tensor) -> Tensor:
        """h_TD of the step's rows."""
        model = self.model
        x_1TD = model.embedded(tokens_1T, positions_1T)
        rotations, whole = model.rotations(positions_1T, x_1TD.dtype), PlannedAttend(plan)
        parts: dict[tuple[int, ...], tuple[Tensor, list[Any], PlannedAttend] | None] = {}
        for index, module in enumerate(model.layers):
            layer: Any = module
            counts = tuple(w.n for w in plan.works)
            if getattr(layer, "router", None) is not None:
                p_T = layer.router(x_1TD)[0]
                counts = tuple(_rows(w, index, p_T) for w in plan.works)
            self.computed += sum(counts)
            self.left_out += x_1TD.shape[1] - sum(counts)
            if sum(counts) == x_1TD.shape[1]:
                x_1TD = layer(x_1TD, rotations[index], whole)
                continue
            if counts not in parts:
                parts[counts] = self._part(plan, counts, positions_1T, x_1TD.dtype)
            if (part := parts[counts]) is not None:
                rows_X, turned, attend = part
                x_1TD = x_1TD.index_copy(1, rows_X, layer(x_1TD[:, rows_X], turned[index], attend))
        return model.normed(x_1TD)[0]

    def _part(
        self, plan: AttentionPlan, counts: tuple[int, ...], positions_1T: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, list[Any], PlannedAttend] | None:
        """The first `counts` rows of each of the step's works: their indices, rotations and attention."""
        at = {w.sample.id: w.at for w in plan.works}
        works = [
            Work(w.sample, w.start, n, tree=w.tree if n == w.n else None)
            for w, n in zip(plan.works, counts, strict=True)
            if n
        ]
        if not works:
            return None
        arrange(works)
        rows_X = torch.cat([torch.arange(w.n) + at[w.sample.id] for w in works]).to(self.model.device)
        turned = self.model.rotations(positions_1T[:, rows_X], dtype)
        return rows_X, turned, PlannedAttend(AttentionPlan(works, plan.storage, plan.table))


def _rows(w: Work, layer: int, p_T: Tensor) -> int:
    """How many of a work's rows a layer computes, the first ones: those of the prompt, and the answer's or none."""
    sample, context = w.sample, len(w.sample.request.prompt)
    mine = min(max(context - w.start, 0), w.n)
    if mine:
        votes = 0.0 if w.start == 0 else sample.votes.get(layer, 0.0)
        sample.votes[layer] = votes + float(p_T[w.at : w.at + mine].sum())
    return w.n if mine == w.n or sample.votes[layer] > context / 2 else mine
