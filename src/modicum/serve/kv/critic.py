"""critic: keep the prompt's entries that matter by attention received, by entropy, and by a gradient; in every head.

Of the prompt's last `window` tokens the queries are known. With A their softmax weights in every head, o the output of
the last one and o' of the one before,

    attention[s] = sum over heads and queries of A[s]               entropy[s] = mean over heads of the entropy of row s
    gradient[s]  = |d/dK[s]| + |d/dV[s]| of mean (o - o')^2         I = w_a attention + w_e entropy + w_g gradient

each part brought to [0, 1] over the tokens by its smallest and largest value, the weights to a sum of 1. Of n > m
tokens min(max(m, floor((1 - r) n)), n - 1) stay. CRITIC, the cache policy beside PORAG and ATLAS of arXiv:2504.01281
(2025), section 3.

Departs: attention is what a token receives (the paper's formula sums softmax rows, which is 1 for all); rows before
the window are not known, and have entropy 0; the ratio r does not rise with the memory in use, which is the engine's
affair; the prompt is compressed once, at its end, and its last token stays. The weights are not published: equal here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from modicum.serve.kv import CacheShape, ScorePolicy


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5  # r: entries of the prompt that are dropped, as a fraction
    least: Annotated[int, Field(ge=1)] = 16  # m: a prompt of no more tokens keeps all
    window: Annotated[int, Field(ge=2)] = 128  # last tokens of the prompt whose rows are known
    attention: Annotated[float, Field(ge=0)] = 1.0  # w_a
    entropy: Annotated[float, Field(ge=0)] = 1.0  # w_e
    gradient: Annotated[float, Field(ge=0)] = 1.0  # w_g; 0 spares the backward pass

    def __post_init__(self) -> None:
        if not self.attention + self.entropy + self.gradient:
            raise ValueError("attention, entropy and gradient are all 0, so no entry is worth more; raise one of them")


TOY = Config(least=4, window=4)
CLAIM = {
    "figure": "part of a system with 65.4 exact match on HotpotQA where retrieval alone has 52.1",
    "where": "Table 1",
    "scale": "Qwen2.5-3B",
}
SWEEP = {"ratio": (0.8,)}


class Critic(ScorePolicy):
    config: Config
    observes = True

    def capacity(self, layer: int) -> int:
        n, c = self.prompt, self.config
        return n if n <= c.least else min(max(c.least, int((1 - c.ratio) * n)), n - 1)

    def score(self, layer: int, q_HWE: Tensor, k_GSE: Tensor, v_GSE: Tensor) -> Tensor:
        c = self.config
        parts = importance(self.shape, layer, q_HWE, k_GSE, v_GSE, gradient=c.gradient > 0)
        weights = (c.attention, c.entropy, c.gradient)
        total_S = sum((w * unit(part) for w, part in zip(weights, parts, strict=True)), torch.zeros(()))
        total_S = total_S / sum(weights)
        total_S[-1] = torch.inf  # what is generated next goes on from it
        return total_S.expand(len(k_GSE), -1)


def importance(
    shape: CacheShape, layer: int, q_HWE: Tensor, k_GSE: Tensor, v_GSE: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(attention_S, entropy_S, gradient_S), float32, before they are brought to one scale."""
    (G, S, _), (H, W, _) = k_GSE.shape, q_HWE.shape
    q_GRWE = q_HWE.float().unflatten(0, (G, H // G))
    position_S = torch.arange(S, device=q_HWE.device)
    at_W1 = position_S[S - W :, None]
    hidden_WS = position_S > at_W1
    if (window := shape.windows[layer]) is not None:
        hidden_WS |= position_S <= at_W1 - window

    def weights(k_GSE: Tensor, rows: slice) -> Tensor:
        scores_GRWS = shape.scores(layer, q_GRWE[:, :, rows].flatten(1, 2), k_GSE).unflatten(1, (H // G, -1))
        return scores_GRWS.masked_fill(hidden_WS[rows], -torch.inf).softmax(-1)

    a_GRWS = weights(k_GSE, slice(None))
    entropy_S = torch.zeros(S, device=q_HWE.device)
    entropy_S[S - W :] = torch.special.entr(a_GRWS).sum(-1).mean((0, 1))
    attention_S = a_GRWS.sum((0, 1, 2))
    if not gradient or W < 2:
        return attention_S, entropy_S, torch.zeros_like(attention_S)
    with torch.inference_mode(False), torch.enable_grad():
        k, v = (x.detach().clone().float().requires_grad_() for x in (k_GSE, v_GSE))
        q_GRWE, hidden_WS = q_GRWE.clone(), hidden_WS.clone()  # what was made in inference mode has no gradients
        before = (weights(k, slice(W - 2, W - 1)) @ v[:, None]).detach()
        now = weights(k, slice(W - 1, W)) @ v[:, None]
        grads = torch.autograd.grad((now - before).pow(2).mean(), (k, v))
    return attention_S, entropy_S, sum((g.abs().sum((0, 2)) for g in grads), torch.zeros_like(attention_S))


def unit(part_S: Tensor) -> Tensor:
    """Between 0 and 1 by the smallest and the largest value; zeros where all are equal."""
    low, high = part_S.min(), part_S.max()
    return (part_S - low) / (high - low).clamp(min=1e-12)
