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
def log_probabilities(model: Decoder, tokens_NT: Tensor) -> Tensor:
    """(N, T - 1, V) in float16: what a model predicts of each next token."""
    return torch.cat([logp_NTV.half() for logp_NTV in _predictions(model, tokens_NT)])


@torch.inference_mode()
def scores(model: Decoder, tokens_NT: Tensor, against_NTV: Tensor | None = None) -> list[Score]:
    """A score for each sequence; without the original's `log_probabilities` kl is 0."""
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
