"""h2o: keep the entries that have received most attention so far, and the latest ones.

Every query adds its attention weights to the scores of the entries it sees. Half of the budget goes to the heavy
hitters, the entries with the largest sums, and half to the latest entries. Generated tokens count, add to the sums and
push others out, so the cache stays within its budget.

    score[g, s] = sum over queries t so far of mean over r in g of softmax_s(q[r, t] k[g, s])
    kept[g]     = top (budget - recent) of score[g] among the older entries  +  the latest `recent`

Zhang et al. 2023, arXiv:2306.14048, section 4.2 and algorithm 1. Departs: the query heads of a KV head sum together;
entries go a block at a time and not one by one. Sums over all of a prompt's queries need all of them computed, so it
does not go with the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.serve.kv import Entries, Keep, KVPolicy, SelectPolicy, check_budget


@dataclass(frozen=True, kw_only=True)
class Config:
    budget: float = 0.2  # entries that stay; up to 1: a share of the tokens
    recent: float = 0.5  # of the budget, for the latest entries

    def __post_init__(self) -> None:
        check_budget("h2o", self.budget)
        if not 0 < self.recent < 1:
            raise UserError(f"h2o: recent={self.recent:g} must be a fraction of the budget between 0 and 1")


TOY = Config(budget=12)
CLAIM = {
    "figure": "accuracy of the full cache at 20% of it; up to 29 times the throughput",
    "where": "abstract",
    "scale": "OPT, LLaMA and GPT-NeoX of 6.7B to 66B parameters",
}
SWEEP = {"budget": (0.2,)}


class H2O(SelectPolicy):
    config: Config
    conflicts = frozenset({"prefix_cache"})
    bounded = True
    marks = "sum"
    mass: dict[int, Tensor]  # layer -> (G, S), in the order of the entries

    def begin(self, prompt: int) -> KVPolicy:
        policy = super().begin(prompt)
        assert isinstance(policy, H2O)
        policy.mass = {}
        return policy

    def mark(self, layer: int, mass_GS: Tensor) -> None:
        if (old_GS := self.mass.get(layer)) is not None:
            mass_GS[:, : old_GS.shape[1]] += old_GS
        self.mass[layer] = mass_GS

    def keep(self, layer: int, entries: Entries) -> Keep:
        n = entries.counts[0]
        most = min(n, self.allow(layer, int(entries.position_GS[0, n - 1]) + 1))
        recent = min(most, max(1, round(self.config.recent * most)))
        mass_GS = self.mass[layer]
        heavy_GC = mass_GS[:, : n - recent].topk(most - recent).indices.sort(dim=-1).values
        recent_GC = torch.arange(n - recent, n, device=heavy_GC.device).expand(len(heavy_GC), -1)
        kept_GC = torch.cat([heavy_GC, recent_GC], dim=1)
        self.mass[layer] = mass_GS.gather(1, kept_GC)
        return Keep(list(kept_GC))
