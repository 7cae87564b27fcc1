"""Greedy generation, the plain reference; `modicum.serve` is the fast engine."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.cache import ContiguousCache
from modicum.model.decoder import Decoder


@torch.inference_mode()
def greedy(
    model: Decoder,
    tokens_BT: Tensor,
    max_new_tokens: int,
    *,
    mask_BT: Tensor | None = None,
    eos_ids: Collection[int] | None = None,
    pad_id: int | None = None,
) -> Tensor:
    """The most likely next token, again and again: prompt and continuation, (B, T + new).

    `mask_BT` marks real tokens of prompts padded on the left. A row ends at one of `eos_ids` (default: the
    model's own; give () for none) and is filled with `pad_id`; generation stops when all rows have ended.
    """
    B, T = tokens_BT.shape
    config = model.config
    if config.position == "learned" and T + max_new_tokens > config.context_length:
        raise UserError(
            f"{T} + {max_new_tokens} tokens exceed the model's {config.context_length} "
            "positions; shorten the prompt or ask for fewer new tokens"
        )
    padding_B = None
    if mask_BT is not None:
        real = mask_BT.bool()
        if (real[:, :-1] & ~real[:, 1:]).any():
            raise UserError("prompts must be padded on the left, with mask_BT True for real tokens")
        padding_B = (~real).sum(dim=1)
    eos = torch.tensor(
        sorted(config.eos_ids if eos_ids is None else eos_ids), dtype=torch.long, device=tokens_BT.device
    )
    pad = next((i for i in (pad_id, config.pad_id, *config.eos_ids) if i is not None), 0)

    def fresh() -> ContiguousCache:
        return ContiguousCache(
            config, B, T + max_new_tokens, dtype=model.dtype, device=tokens_BT.device, padding_B=padding_B
        )

    cache, sequence, new = fresh(), tokens_BT, tokens_BT
    ended = torch.zeros(B, dtype=torch.bool, device=tokens_BT.device)
    # longrope turns to other frequencies when a sequence outgrows the original context, which rotates every
    # key anew: the cache is filled again at that point.
    switch = None
    if config.rope.kind == "longrope":
        switch = config.rope.options.get("original_max_position_embeddings")
    for _ in range(max_new_tokens):
        if switch is not None and cache.length <= switch < sequence.shape[1]:
            cache, new = fresh(), sequence
        logits_BV = model.head(model.hidden(new, attend=cache)[:, -1])
        new = torch.where(ended, pad, logits_BV.argmax(dim=-1))[:, None]
        sequence = torch.cat([sequence, new], dim=1)
        ended = ended | torch.isin(new[:, 0], eos)
        if bool(ended.all()):
            break
    return sequence
