"""expected-attention: keep the entries that queries still to come can be expected to look at.

Queries before their rotation are taken for draws of one normal distribution per head, whose mean and covariance are
those of the prompt's last `window` tokens. Turned by the rotation that the next `future` places have on average, they
give the attention to expect of each key in closed form; an entry counts by that and by how long its value is.

    q ~ N(m, C),  m' = R m,  C' = R C R^T,  R = mean rotation of places n .. n + future - 1
    score[g, s] = |v[s]| * mean over r in g of softmax_s( c k[s] m' + c^2 k[s] C' k[s] / 2 ),   c = attention scale

Devoto et al. 2025, arXiv:2510.00636, section 3. Departs: the moments are those of the last `window` tokens instead of
all, so that they do not depend on how much of the prompt was found in the prefix cache; a softcap is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.rope import rotate
from modicum.serve.kv import ScorePolicy, check_budget

if TYPE_CHECKING:
    from modicum.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Config:
    budget: float = 0.5  # entries of the prompt that stay; up to 1: a share of the prompt
    window: int = 512  # last tokens of the prompt whose queries are the sample
    future: int = 512  # places ahead over which the rotation is averaged
    sinks: int = 4  # first entries, which stay and whose own queries are left out

    def __post_init__(self) -> None:
        check_budget("expected-attention", self.budget)
        for name, low in (("window", 2), ("future", 1), ("sinks", 0)):
            if getattr(self, name) < low:
                raise UserError(f"expected-attention: {name}={getattr(self, name)} must be at least {low}")


TOY = Config(budget=12, window=8, future=16, sinks=2)
CLAIM = {
    "figure": "above the other query-agnostic scores at every ratio on RULER and LongBench",
    "where": "figures of section 4",
    "scale": "8B models, contexts of 4K tokens and more",
}
SWEEP = {"budget": (0.2,)}


class ExpectedAttention(ScorePolicy):
    config: Config
    observes = True
    angles: list[Tensor | None]  # per layer, rotary angles per place

    def prepare(self, model: Decoder, probe: Sequence[int] = ()) -> None:
        self.angles = [None if table is None else table.angles for table in model.rope_tables()]

    def score(self, layer: int, q_HWE: Tensor, k_GSE: Tensor, v_GSE: Tensor) -> Tensor:
        (G, S, E), sinks = k_GSE.shape, min(self.config.sinks, self.capacity(layer))
        position_W = torch.arange(S - q_HWE.shape[1], S, device=q_HWE.device)
        ours_W = (position_W >= sinks) | (position_W == S - 1)
        q_HWE, position_W = q_HWE[:, ours_W].float(), position_W[ours_W]
        angles = self.angles[layer]
        if angles is not None:
            angles = angles.to(q_HWE.device)
            back_WA = -position_W[:, None].float() * angles
            q_HWE = rotate(q_HWE, back_WA.cos(), back_WA.sin())
        mean_HE = q_HWE.mean(1)
        centred_HWE = q_HWE - mean_HE[:, None]
        cov_HEE = centred_HWE.transpose(1, 2) @ centred_HWE / q_HWE.shape[1]
        if angles is not None:
            ahead_FA = torch.arange(S, S + self.config.future, device=angles.device)[:, None] * angles
            turn = ahead_FA.cos().mean(0), ahead_FA.sin().mean(0)
            mean_HE = rotate(mean_HE, *turn)
            cov_HEE = rotate(rotate(cov_HEE, *turn).transpose(1, 2), *turn)
        c = self.shape.scales[layer] if self.shape.scales else E**-0.5
        k_G1SE = k_GSE[:, None, sinks:].float() * c
        mean_GR1E, cov_GREE = mean_HE.view(G, -1, 1, E), cov_HEE.view(G, -1, E, E)
        expected_GRS = (k_G1SE * mean_GR1E).sum(-1) + ((k_G1SE @ cov_GREE) * k_G1SE).sum(-1) / 2
        scores_GS = expected_GRS.softmax(-1).mean(1) * v_GSE[:, sinks:].float().norm(dim=-1)
        return torch.cat([scores_GS.new_full((G, sinks), float("inf")), scores_GS], dim=1)
