"""Attention weights that entries receive: what a KV policy that `marks` goes by.

Shapes: T queries of a sequence in this step, G KV heads, R query heads of each, S entries, E head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.serve.kv import Entries
from modicum.serve.plan import visible

SCORES = 1 << 24  # weights that exist at once


def received(
    q_GRTE: Tensor,
    entries: Entries,
    start: int,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    largest: bool = False,
) -> Tensor:
    """mass_GS: softmax weights of the T queries at positions `start` on, summed over them, averaged over R; or, with
    `largest`, the largest of both; float32."""
    G, R, T, _ = q_GRTE.shape
    S = entries.k_GSE.shape[1]
    device = q_GRTE.device
    valid_GS = torch.arange(S, device=device) < torch.tensor(entries.counts, device=device)[:, None]
    bias_GS = torch.zeros(valid_GS.shape, device=device) if entries.weight_GS is None else entries.weight_GS.log()
    bias_GS = bias_GS.masked_fill(~valid_GS, float("-inf"))
    keys_GES = entries.k_GSE.float().transpose(1, 2)
    mass_GS = torch.zeros(G, S, device=device)
    rows = max(1, SCORES // (G * R * S))
    for first in range(0, T, rows):
        some_GRTE = q_GRTE[:, :, first : first + rows].float()
        n = some_GRTE.shape[2]
        scores_GRTS = (some_GRTE.flatten(1, 2) @ keys_GES * scale).unflatten(1, (R, n))
        if softcap is not None:
            scores_GRTS = softcap * torch.tanh(scores_GRTS / softcap)
        at_T1 = torch.arange(start + first, start + first + n, device=device)[:, None]
        hidden_GTS = ~visible(at_T1, entries.position_GS[:, None], window)
        scores_GRTS = (scores_GRTS + bias_GS[:, None, None]).masked_fill_(hidden_GTS[:, None], float("-inf"))
        weights_GRTS = scores_GRTS.softmax(-1)
        mass_GS = (
            torch.maximum(mass_GS, weights_GRTS.amax((1, 2))) if largest else mass_GS + weights_GRTS.sum(2).mean(1)
        )
    return mass_GS
