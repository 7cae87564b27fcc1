"""Log-likelihoods: what a model thinks of given text, in batches by length.

Shapes: B rows, T tokens, D width, V vocabulary, S scored positions. Nats throughout (natural logarithm).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.core.errors import UserError

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer

BATCH_TOKENS = 8192  # tokens of one forward pass, padding included
PAD = 128  # rows of logits are computed by as many
HEAD_VALUES = {"cpu": 2 << 20, "cuda": 64 << 20}  # logits at once (positions x vocabulary): a CPU's cache holds them

Row = tuple[Sequence[int], int]  # tokens, and how many of the last of them are scored
Advance = Callable[[int], Any]  # called with the number of tokens done


@dataclass(frozen=True)
class LogLikelihood:
    """Of one continuation given its context: log-probability in nats, whether greedy decoding gives it."""

    nats: float
    greedy: bool
    tokens: int
    nbytes: int


def context_limit(model: Any) -> int:
    """Tokens of the longest sequence the model was made for."""
    return int(model.config.context_length)


@torch.inference_mode()
def score_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    pad_id: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row the log-probabilities (float64) of its last tokens, and whether each was the most likely.

    Rows are sorted by length and padded on the right, which a causal model does not see. Memory: one
    batch of `batch_tokens`, and logits in pieces of HEAD_VALUES.
    """
    results: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0, bool))] * len(rows)
    check_ids(model, max((max(tokens) for tokens, scored in rows if scored), default=0))
    training = model.training
    model.eval()
    try:
        for picked in _batches(rows, batch_tokens):
            width = max(len(rows[i][0]) for i in picked) - 1
            tokens_BT = torch.full((len(picked), width), pad_id, dtype=torch.long)
            target_S, position_S, sizes = [], [], []
            for b, i in enumerate(picked):
                tokens, scored = rows[i]
                tokens_BT[b, : len(tokens) - 1] = torch.tensor(tokens[:-1], dtype=torch.long)
                position_S.append(torch.arange(len(tokens) - 1 - scored, len(tokens) - 1) + b * width)
                target_S.append(torch.tensor(tokens[len(tokens) - scored :], dtype=torch.long))
                sizes.append(scored)
            h_BTD = model.hidden(tokens_BT.to(model.device))
            h_SD = h_BTD.reshape(-1, h_BTD.shape[-1])[torch.cat(position_S).to(h_BTD.device)]
            nats_S, greedy_S = chosen(model, h_SD, torch.cat(target_S).to(h_BTD.device))
            for i, nats, greedy in zip(picked, nats_S.cpu().split(sizes), greedy_S.cpu().split(sizes), strict=True):
                results[i] = nats.double().numpy(), greedy.numpy()
            if advance:
                advance(sum(sizes))
    finally:
        model.train(training)
    return results


def chosen(model: Any, h_SD: Tensor, target_S: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(head(h))[target], in float32 at least, and whether the target is the argmax."""
    nats, greedy = [], []
    step = max(128, HEAD_VALUES.get(h_SD.device.type, HEAD_VALUES["cuda"]) // model.config.vocab_size)
    for start in range(0, len(target_S), step):
        part_SD = h_SD[start : start + step]
        n = len(part_SD)
        # Few different shapes: the CPU's matrix library keeps something for every one it has met.
        logits_SV = model.head(F.pad(part_SD, (0, 0, 0, -n % PAD)))[:n]
        logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
        target = target_S[start : start + step, None]
        nats.append(logits_SV.gather(1, target)[:, 0] - logits_SV.logsumexp(1))
        greedy.append(logits_SV.argmax(1) == target[:, 0])
    return torch.cat(nats), torch.cat(greedy)


def _batches(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Indices of rows, longest first (so that too large a batch fails at once), under `batch_tokens` each."""
    order = sorted((i for i, row in enumerate(rows) if row[1]), key=lambda i: -len(rows[i][0]))
    batches: list[list[int]] = []
    width = 0
    for i in order:
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = max(len(rows[i][0]) - 1, 1)
        batches[-1].append(i)
    return batches


def check_ids(model: Any, highest: int) -> None:
    """Refuse token ids that the model has no embedding for."""
    if highest >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer gave the id {highest}, the model knows 0 to {model.config.vocab_size - 1}; "
            "they do not belong together, give the tokenizer the model was trained with"
        )


def safe_pad(model: Any, tokenizer: Tokenizer) -> int:
    """An id to fill rows with (never looked at): the tokenizer's pad, where the model has it."""
    return tokenizer.pad_id if tokenizer.pad_id < model.config.vocab_size else 0


def prefix_ids(tokenizer: Tokenizer, prefix: str) -> list[int]:
    """What stands before a prompt: "auto" is what the tokenizer puts there (as in serving), "start" bos or else eos."""
    if prefix not in ("auto", "start", "none"):
        raise UserError(f"prefix={prefix!r} is not known; allowed: auto, start, none")
    if prefix == "start":
        return [tokenizer.start_id]
    if prefix == "none":
        return []
    alone, whole = tokenizer.encode("a"), tokenizer.encode("a", add_special=True)
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(alone)] == alone), [])


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation, cut where the context's own tokens end.

    As lm-evaluation-harness does it: spaces that end the context belong to the continuation, both are
    encoded as one text, and the first len(encode(context)) tokens are the context's.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:
        return [], tokenizer.encode(continuation)
    whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
    if len(whole) <= len(alone):  # a merge ate the whole continuation: score it from its own tokens
        return alone, tokenizer.encode(continuation)
    return whole[: len(alone)], whole[len(alone) :]


def loglikelihood(
    model: Any,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    prefix: str = "auto",
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance | None = None,
) -> list[LogLikelihood]:
    """log p(continuation | context) for each (context, continuation), in the given order.

    A context too long for `max_length` (default: the model's) loses its beginning. Raises UserError for an
    empty continuation, or one that alone does not fit.
    """
    limit = max_length or context_limit(model)
    front = prefix_ids(tokenizer, prefix)
    rows: list[Row] = []
    for context, continuation in pairs:
        if not continuation:
            raise UserError(f"an empty continuation (of {context[-40:]!r}) has no likelihood; give it text")
        before, after = split_pair(tokenizer, context, continuation)
        before = (front + before) or [tokenizer.start_id]
        if len(after) > limit:
            raise UserError(
                f"a continuation of {len(after)} tokens exceeds the model's {limit}; score it as a text "
                "(bits_per_byte), which reads it in windows"
            )
        # inputs are all tokens but the last
        tokens = (before + after)[-(limit + 1) :]
        rows.append((tokens, len(after)))
    scored = score_rows(model, rows, pad_id=safe_pad(model, tokenizer), batch_tokens=batch_tokens, advance=advance)
    return [
        LogLikelihood(float(nats.sum()), bool(greedy.all()), len(nats), len(text.encode("utf-8", "surrogatepass")))
        for (nats, greedy), (_, text) in zip(scored, pairs, strict=True)
    ]
