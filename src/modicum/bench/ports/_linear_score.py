"""Scoring a model on sequences of held-out text: bits per byte, and how far its predictions are from another's.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.bench import fixtures
from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.model.decoder import Decoder


def sequences(texts: Sequence[str], tokenizer: Tokenizer, count: int, length: int, seed: int) -> Tensor:
    """tokens_BT: `count` sequences of `length` tokens of the texts put together; the seed picks where they begin."""
    tokens = [t for text in texts for t in [tokenizer.start_id, *tokenizer.encode(text, specials=False)]]
    if len(tokens) <= length:
        raise UserError(
            f"the held-out side has {len(tokens)} tokens of this domain, less than a sequence of {length}; give "
            "--scale heldout_bytes=... or a shorter score_length"
        )
    starts = torch.randint(len(tokens) - length, (count,), generator=fixtures.seeded(seed)).tolist()
    return torch.tensor([tokens[start : start + length] for start in starts])


@torch.inference_mode()
def score(
    model: Decoder, tokens_BT: Tensor, tokenizer: Tokenizer, against: list[Tensor] | None = None
) -> tuple[dict[str, float], list[Tensor]]:
    """bits_per_byte; with `against` also kl (nats a token from there to the model) and top1 (equal likeliest tokens).

    The second result, log-probabilities of each sequence in float16, is what a later call takes as `against`.
    """
    nats = kl = 0.0
    same = size = 0
    made = []
    for i, tokens_T in enumerate(tokens_BT.to(model.device)):
        logp_TV = model(tokens_T[None])[0, :-1].float().log_softmax(-1)
        nats -= float(logp_TV.gather(1, tokens_T[1:, None]).sum())
        size += len(tokenizer.decode(tokens_T[1:].tolist()).encode("utf-8", "surrogatepass"))
        if against is not None:
            p_TV = against[i].float()
            kl += float((p_TV.exp() * (p_TV - logp_TV)).sum())
            same += int((p_TV.argmax(-1) == logp_TV.argmax(-1)).sum())
        else:
            made.append(logp_TV.half())
    scores = {"bits_per_byte": nats / math.log(2) / max(1, size)}
    if against is not None:
        positions = tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)
        scores |= {"kl": kl / positions, "top1": same / positions}
    return scores, made
