"""snapkv: keep the prompt's entries that its last tokens look at, per head; all that is generated stays.

The queries of the prompt's last `window` tokens vote for the entries before them. Votes are pooled over
neighbouring places, so that whole clusters survive and not single tokens, and averaged over the query
heads that share a KV head. The prompt is compressed once, right after it has been computed.

    vote[g, s] = mean over r in g of pool_kernel( sum over w of softmax_s(q[r, w] k[g, s]) )
    kept[g]    = top (budget - window) of vote[g]  +  the window  +  everything generated

Li et al. 2024, arXiv:2404.14469, section 4.1 and listing 1. Departs: the paper votes per query head after
repeating the keys; here a KV head is stored once, so its query heads vote together. The budget may be a
share of the prompt; where it is smaller than the window, half of it goes to the window. In layers with a
sliding window nothing outside of it gets votes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.core.errors import UserError, unknown
from modicum.serve.kv import CacheShape, Entries, Keep, KVPolicy, check_budget, entries_of

SCORES = 1 << 24  # votes held at once: KV heads are taken together as long as they stay below


@dataclass(frozen=True, kw_only=True)
class Config:
    budget: float = 1024  # entries of the prompt that stay, window included; up to 1: a share of the prompt
    window: int = 32  # last tokens of the prompt, whose queries vote and which stay themselves
    kernel: int = 5  # places that are pooled, odd
    pooling: str = "mean"  # or max

    def __post_init__(self) -> None:
        check_budget("snapkv", self.budget)
        if self.window < 1 or (self.budget > 1 and self.budget <= self.window):
            raise UserError(
                f"snapkv: window={self.window} must be at least 1 and below budget={self.budget:g}, which it is part of"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"snapkv: kernel={self.kernel} must be an odd number of places, 1 for no pooling")
        if self.pooling not in ("mean", "max"):
            raise unknown("snapkv: pooling", self.pooling, ("mean", "max"))


TOY = Config(budget=12, window=4, kernel=3)
CLAIM = {
    "figure": "comparable accuracy on 16 long-context sets; decoding 3.6 times as fast with 8.2 times less memory",
    "where": "abstract",
    "scale": "7B models, prompts of 16K tokens",
}
SWEEP = ("budget=0.5", "budget=0.3", "budget=0.2", "budget=0.1", "budget=0.05")


class SnapKV(KVPolicy):
    config: Config
    observes = True

    def __init__(self, config: Config, shape: CacheShape):
        super().__init__(config, shape)
        self.tail = config.window

    def begin(self, prompt: int) -> KVPolicy:
        policy = SnapKV(self.config, self.shape)
        policy.prompt = prompt
        policy.capacity = min(prompt, entries_of(self.config.budget, prompt))
        policy.window = self.config.window if policy.capacity > self.config.window else max(1, policy.capacity // 2)
        policy.queries = {}
        return policy

    prompt: int
    capacity: int  # entries of the prompt that stay
    window: int
    queries: dict[int, Tensor]  # layer -> (H, up to window, E)

    def allow(self, layer: int, n_tokens: int) -> int:
        return n_tokens if n_tokens < self.prompt else self.capacity + n_tokens - self.prompt

    def wants(self, start: int, n: int) -> bool:
        if self.capacity == self.prompt:
            return False
        return start < self.prompt and start + n > self.prompt - self.window

    def observe(self, layer: int, start: int, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor) -> None:
        first = max(0, self.prompt - self.window - start)
        new_HTE = q_HTE[:, first : self.prompt - start]
        if layer in self.queries and start > self.prompt - self.window:
            new_HTE = torch.cat([self.queries[layer], new_HTE], dim=1)
        self.queries[layer] = new_HTE.clone()  # not a view that would hold the whole step

    def keep(self, layer: int, entries: Entries) -> Keep:
        W, G, n = self.window, self.shape.kv_heads, entries.counts[0]
        q_HWE = self.queries.pop(layer)
        old = self.prompt - W  # entries that are voted on; the others stay
        window = self.shape.windows[layer]
        place_S = torch.arange(self.prompt, device=q_HWE.device)
        at_W1 = place_S[old:, None]
        hidden_WS = place_S > at_W1
        if window is not None:
            hidden_WS |= place_S <= at_W1 - window
        R = q_HWE.shape[0] // G
        votes = []
        together = max(1, SCORES // (R * W * self.prompt))
        for g in range(0, G, together):
            k_GSE = entries.k_GSE[g : g + together, : self.prompt]
            q_GXE = q_HWE[g * R : g * R + len(k_GSE) * R].unflatten(0, (-1, R)).flatten(1, 2)
            scores_GRWS = self.shape.scores(layer, q_GXE, k_GSE).unflatten(1, (R, W))
            scores_GRWS.masked_fill_(hidden_WS, float("-inf"))
            votes.append(pooled(scores_GRWS.softmax(-1)[..., :old].sum(2), self.config).mean(1))
        top_GC = torch.cat(votes).topk(self.capacity - W).indices.sort(dim=-1).values
        rest_GS = torch.arange(old, n, device=top_GC.device).expand(G, -1)
        return Keep(list(torch.cat([top_GC, rest_GS], dim=1)))


def pooled(votes_GRS: Tensor, config: Config) -> Tensor:
    """Each place's mean or maximum over `kernel` neighbours; the ends are padded with zeros (mean)."""
    if config.kernel == 1:
        return votes_GRS
    pool = F.avg_pool1d if config.pooling == "mean" else F.max_pool1d
    return pool(votes_GRS, config.kernel, stride=1, padding=config.kernel // 2)
