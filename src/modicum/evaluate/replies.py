"""Greedy replies to prompts, in batches by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from modicum.core.errors import UserError
from modicum.evaluate.score import BATCH_TOKENS, Advance, check_ids, context_limit, prefix_ids, safe_pad

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer


def greedy_replies(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int] = 32,
    stop: Sequence[Sequence[str]] | None = None,
    prefix: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, cut before the first of its stop strings.

    stop: stop strings of each prompt. A prompt that leaves no room in the model's context loses its
    beginning. Replies do not depend on the batch: prompts are padded on the left and masked.
    """
    from modicum.model.generate import greedy

    limit, front = context_limit(model), prefix_ids(tokenizer, prefix)
    budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    stops = [list(s) for s in stop] if stop is not None else [[] for _ in prompts]
    rows = []
    for prompt, budget in zip(prompts, budgets, strict=True):
        if budget >= limit:
            raise UserError(f"max_new_tokens={budget} leaves no room for a prompt in {limit} positions; ask for fewer")
        ids = front + tokenizer.encode(prompt)
        rows.append((ids or [tokenizer.start_id])[-(limit - budget) :])
    check_ids(model, max((max(row) for row in rows), default=0))
    replies = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        order = sorted(range(len(rows)), key=lambda i: (budgets[i], len(rows[i])))
        while order:
            picked = [order.pop()]  # the longest of the largest budget
            budget = budgets[picked[0]]
            width = len(rows[picked[0]]) + budget
            while order and budgets[order[-1]] == budget and (len(picked) + 1) * width <= batch_tokens:
                picked.append(order.pop())
            for i, text in zip(
                picked, _batch(model, tokenizer, [rows[i] for i in picked], budget, greedy), strict=True
            ):
                replies[i] = cut(text, stops[i])
            if advance:
                advance(len(picked))
    finally:
        model.train(training)
    return replies


def _batch(model: Any, tokenizer: Tokenizer, rows: list[list[int]], budget: int, greedy: Any) -> list[str]:
    width = max(len(row) for row in rows)
    tokens_BT = torch.full((len(rows), width), safe_pad(model, tokenizer), dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for b, row in enumerate(rows):
        tokens_BT[b, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask_BT[b, width - len(row) :] = True
    out_BT = greedy(
        model,
        tokens_BT.to(model.device),
        budget,
        mask_BT=mask_BT.to(model.device),
        eos_ids=tokenizer.stop_ids,
        pad_id=safe_pad(model, tokenizer),
    )
    texts = []
    for row in out_BT[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in tokenizer.stop_ids), len(row))
        texts.append(tokenizer.decode(row[:end]))
    return texts


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the earliest stop string."""
    places = [place for place in (text.find(s) for s in stops if s) if place >= 0]
    return text[: min(places)] if places else text
