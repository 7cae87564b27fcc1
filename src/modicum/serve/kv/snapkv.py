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
from modicum.serve.kv import CacheShape, KVPolicy, ScorePolicy, check_budget

SCORES = 1 << 24  # votes held at once: KV heads are taken together as long as they stay below


@dataclass(frozen=True, kw_only=True)
class Config:
    budget: float = 1024  # entries of the prompt that stay, window included; up to 1: a share of the prompt
    window: int = 32  # last tokens of the prompt, whose queries vote and which stay themselves
    kernel: int = 5  # places that are pooled, odd
    pooling: str = "mean"  # or max

    def __post_init__(self) -> None:
        check("snapkv", self)


def check(method: str, config: Config) -> None:
    """Raise `UserError` for knobs that cannot be."""
    check_budget(method, config.budget)
    if config.window < 1 or (config.budget > 1 and config.budget <= config.window):
        raise UserError(
            f"{method}: window={config.window} must be at least 1 and below budget={config.budget:g}, which it is "
            "part of"
        )
    if config.kernel < 1 or config.kernel % 2 == 0:
        raise UserError(f"{method}: kernel={config.kernel} must be an odd number of places, 1 for no pooling")
    if config.pooling not in ("mean", "max"):
        raise unknown(f"{method}: pooling", config.pooling, ("mean", "max"))


TOY = Config(budget=12, window=4, kernel=3)
CLAIM = {
    "figure": "comparable accuracy on 16 long-context sets; decoding 3.6 times as fast with 8.2 times less memory",
    "where": "abstract",
    "scale": "7B models, prompts of 16K tokens",
}
SWEEP = {"budget": (0.2,)}


class SnapKV(ScorePolicy):
    config: Config
    observes = True

    def begin(self, prompt: int) -> KVPolicy:
        policy = super().begin(prompt)
        assert isinstance(policy, SnapKV)
        least = min(policy.capacity(layer) for layer in range(self.shape.layers))
        if least <= self.config.window:
            policy.window = max(1, least // 2)
        return policy

    def score(self, layer: int, q_HWE: Tensor, k_GSE: Tensor, v_GSE: Tensor) -> Tensor:
        return votes(self.shape, layer, q_HWE, k_GSE, self.config)


def votes(shape: CacheShape, layer: int, q_HWE: Tensor, k_GSE: Tensor, config: Config) -> Tensor:
    """votes_GS of the window's queries for the entries before them."""
    (G, S, _), W = k_GSE.shape, q_HWE.shape[1]
    old, R, window = S - W, q_HWE.shape[0] // G, shape.windows[layer]
    position_S = torch.arange(S, device=q_HWE.device)
    at_W1 = position_S[old:, None]
    hidden_WS = position_S > at_W1
    if window is not None:
        hidden_WS |= position_S <= at_W1 - window
    chosen = []
    together = max(1, SCORES // (R * W * S))
    for g in range(0, G, together):
        some_GSE = k_GSE[g : g + together]
        q_GXE = q_HWE[g * R : (g + len(some_GSE)) * R].unflatten(0, (-1, R)).flatten(1, 2)
        scores_GRWS = shape.scores(layer, q_GXE, some_GSE).unflatten(1, (R, W))
        scores_GRWS.masked_fill_(hidden_WS, float("-inf"))
        chosen.append(pooled(scores_GRWS.softmax(-1)[..., :old].sum(2), config).mean(1))
    return torch.cat(chosen)


def pooled(votes_GRS: Tensor, config: Config) -> Tensor:
    """Each place's mean or maximum over `kernel` neighbours; the ends are padded with zeros (mean)."""
    if config.kernel == 1:
        return votes_GRS
    pool = F.avg_pool1d if config.pooling == "mean" else F.max_pool1d
    return pool(votes_GRS, config.kernel, stride=1, padding=config.kernel // 2)
