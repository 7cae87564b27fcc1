"""Backend torch: the decoder's own forward pass, attention over a plan's segments. The truth; runs every plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.model.attend import Attend
from modicum.model.decoder import Decoder
from modicum.serve.backends.planned import PlannedAttend
from modicum.serve.plan import AttentionPlan
from modicum.serve.uneven import attend_for
from modicum.serve.work import positions_of, tokens_of


class Torch:
    name = "eager"

    def __init__(self, model: Decoder):
        self.model = model
        self.routing: Any = None  # a `routed.Routing`, for a model with routers

    def cannot(self, plan: AttentionPlan) -> str | None:
        return None

    def __call__(self, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        device = self.model.device
        given = torch.tensor([tokens_of(plan.works), positions_of(plan.works)], device=device)
        tokens_1T, positions_1T = given.split(1)
        if self.routing is not None:
            self._h_TD = self.routing.hidden(plan, tokens_1T, positions_1T)
            return self.logits(rows) if len(rows) else None
        if self.model.config.source_layer is not None and (few := plan.of_rows(rows)) is not None:
            return self._early(plan, few, rows, tokens_1T, positions_1T)
        self._h_TD = self.model.hidden(tokens_1T, positions_BT=positions_1T, attend=self.attend(plan))[0]
        if not len(rows):
            return None
        return self.model.head(self._h_TD) if len(rows) == len(self._h_TD) else self.logits(rows)

    def attend(self, plan: AttentionPlan) -> Attend:
        """How the layers of a step attend."""
        return attend_for(PlannedAttend(plan), self.model.config)

    def _early(
        self, plan: AttentionPlan, few: AttentionPlan, rows: Sequence[int], tokens_1T: Tensor, positions_1T: Tensor
    ) -> Tensor | None:
        """Of a model whose later layers make their keys of one earlier output (mixer swiftkv): all rows up to there,
        their later keys, and only the rows whose logits are wanted further on."""
        model, attend = self.model, PlannedAttend(plan)
        x_1TD = model.embedded(tokens_1T, positions_1T)
        rotations = model.rotations(positions_1T, x_1TD.dtype)
        own = (model.config.source_layer or 0) + 1
        x_1TD, source_1TD = model.run_layers(x_1TD, rotations, attend, 0, own)
        assert source_1TD is not None
        for layer in range(own, model.config.layers):
            attention: Any = model.layers[layer].get_submodule("attention")
            k_1GTE, v_1GTE = attention.keys_values(source_1TD, rotations[layer])
            attend.write(layer, k_1GTE[0], v_1GTE[0])
        if not len(rows):
            return None
        row_of = {w.sample.id: w.at + w.n - 1 for w in plan.works}
        order = torch.tensor([row_of[w.sample.id] for w in few.works], device=model.device)
        turned = model.rotations(positions_1T[:, order], x_1TD.dtype)
        x_1RD, source_1RD = x_1TD[:, order], source_1TD[:, order]
        x_1RD, _ = model.run_layers(x_1RD, turned, PlannedAttend(few), own, source_BTD=source_1RD)
        logits_RV = model.head(model.normed(x_1RD)[0])
        where = {int(row): i for i, row in enumerate(order.tolist())}
        return logits_RV[torch.tensor([where[row] for row in rows], device=model.device)]

    def logits(self, rows: Sequence[int]) -> Tensor:
        return self.model.head(self._h_TD[torch.tensor(list(rows), device=self._h_TD.device)])
