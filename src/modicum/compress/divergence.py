"""How far a changed model's predictions are from the original's: KL per token and nats, sequence by sequence.

Shapes: N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.model.decoder import Decoder

BATCH = 4  # sequences whose logits exist at a time


@dataclass(frozen=True)
class Score:
    """Of one sequence: KL(original || model) per token in nats, and the model's nats of all its tokens."""

    kl: float
    nats: float


@torch.inference_mode()
def original(model: Decoder, tokens_NT: Tensor) -> tuple[Tensor, list[float]]:
    """Log-probabilities of each next token (N, T - 1, V) in float16, and the nats of each sequence."""
    made, nats = [], []
    for logp_NTV, tokens in zip(_predictions(model, tokens_NT), tokens_NT.split(BATCH), strict=True):
        nats += (-logp_NTV.gather(2, tokens[:, 1:, None].to(logp_NTV.device)).sum((1, 2))).tolist()
        made.append(logp_NTV.half())
    return torch.cat(made), nats


@torch.inference_mode()
def scores(model: Decoder, tokens_NT: Tensor, against_NTV: Tensor | None = None) -> list[Score]:
    """A score for each sequence; without log-probabilities of the `original` kl is 0."""
    made: list[Score] = []
    for logp_NTV in _predictions(model, tokens_NT):
        for logp_TV in logp_NTV:
            tokens_T = tokens_NT[len(made)].to(logp_TV.device)
            nats, kl = -float(logp_TV.gather(1, tokens_T[1:, None]).sum()), 0.0
            if against_NTV is not None:
                p_TV = against_NTV[len(made)].float()
                kl = float((p_TV.exp() * (p_TV - logp_TV)).sum()) / len(logp_TV)
            made.append(Score(kl, nats))
    return made


def _predictions(model: Decoder, tokens_NT: Tensor) -> Iterator[Tensor]:
    for tokens in tokens_NT.split(BATCH):
        yield model(tokens.to(model.device))[:, :-1].float().log_softmax(-1)
