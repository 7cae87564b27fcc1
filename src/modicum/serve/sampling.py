"""Choosing the next token of many sequences at once.

Shapes: B sequences, R rows of them, V vocabulary, K candidates.

Every filter becomes one threshold per row: a token stays if its logit is not below it. top_k gives the
k-th largest logit; top_p the smallest logit of the nucleus (Holtzman et al. 2019, arXiv:1904.09751) among
what top_k left; min_p the largest logit plus log(min_p) (Nguyen et al. 2024, arXiv:2407.01082). The token is
then drawn by inverting the cumulative distribution at one uniform number of the sequence's own generator,
so neither its neighbours nor its place in the batch change the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.serve.request import Sample, SamplingParams, TokenLogprob
from modicum.serve.structured import masked

CANDIDATES = 1024  # first try for top_p; a row whose nucleus is larger makes the batch sort everything


@dataclass(slots=True)
class Choices:
    """tokens: B ids; finite: whether each row's logits were numbers; logprobs: for those that asked."""

    tokens: list[int]
    finite: list[bool]
    logprobs: dict[int, TokenLogprob]


def choose(logits_BV: Tensor, samples: Sequence[Sample]) -> Choices:
    """The next token of each sample; `samples[i]` belongs to row i. Draws one number per random row."""
    best_B, greedy_B = logits_BV.max(-1)
    params = [sample.params for sample in samples]
    if all(p.plain for p in params):
        return Choices(_given(greedy_B.tolist(), samples), torch.isfinite(best_B).tolist(), {})
    finite = torch.isfinite(best_B).tolist()
    raw_BV = logits_BV
    logits_BV = _adjusted(logits_BV.float(), samples)
    if logits_BV is not raw_BV:
        greedy_B = logits_BV.argmax(-1)
    rows = [i for i, p in enumerate(params) if not p.greedy]
    if rows:
        index_R = torch.tensor(rows, device=logits_BV.device)
        picked = [params[i] for i in rows]
        uniform = [samples[i].random.random() for i in rows]
        some_RV = logits_BV if len(rows) == len(samples) else logits_BV[index_R]
        greedy_B = greedy_B.index_copy(0, index_R, draw(some_RV, picked, uniform))
    tokens = _given(greedy_B.tolist(), samples)
    return Choices(tokens, finite, _logprobs(raw_BV, params, tokens))


def _given(tokens: list[int], samples: Sequence[Sample]) -> list[int]:
    """The tokens, those of samples that follow a given continuation replaced by its next one."""
    return [
        s.given[len(s.tokens) - len(s.request.prompt)] if s.given else token
        for token, s in zip(tokens, samples, strict=True)
    ]


def draw(logits_RV: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Tensor:
    """Tokens (R,) drawn at the numbers `uniform` in [0, 1)."""
    weights_RV = filtered(logits_RV, params).exp()
    cumulative_RV = weights_RV.cumsum(-1, dtype=torch.float64)
    uniform_R = torch.tensor(uniform, dtype=torch.float64, device=logits_RV.device)
    target_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    # right=True: the first place whose sum exceeds the target, which has a weight above zero.
    token_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
    return token_R.clamp_(max=logits_RV.shape[-1] - 1)


def filtered(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits over temperature, the largest at 0, those that the filters leave out at -inf. Shape (R, V)."""
    device = logits_RV.device
    knobs_R4 = torch.tensor([(p.temperature, p.top_p, p.min_p, float(p.top_k)) for p in params], device=device)
    scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / knobs_R4[:, :1]
    threshold_R = knobs_R4[:, 2].log()  # log(0) = -inf: no limit
    if any(p.top_k or p.top_p < 1 for p in params):
        threshold_R = torch.maximum(threshold_R, _nucleus(scaled_RV, params, knobs_R4[:, 1], knobs_R4[:, 3]))
    elif not any(p.min_p for p in params):
        return scaled_RV
    return scaled_RV.masked_fill(scaled_RV < threshold_R[:, None], float("-inf"))


def _nucleus(scaled_RV: Tensor, params: Sequence[SamplingParams], top_p_R: Tensor, top_k_R: Tensor) -> Tensor:
    """The smallest logit that top_k and then top_p leave in each row; -inf for rows with neither."""
    vocab = scaled_RV.shape[-1]
    size = max((p.top_k for p in params if p.top_k), default=0)
    if any(not p.top_k and p.top_p < 1 for p in params):
        size = max(size, CANDIDATES)
    size = min(size, vocab)
    limit_R1 = torch.where(top_k_R > 0, top_k_R, vocab)[:, None]
    whole_R1 = torch.logsumexp(scaled_RV, -1, keepdim=True)
    while True:
        best_RK = scaled_RV.topk(size).values
        best_RK = best_RK.masked_fill(torch.arange(size, device=best_RK.device) >= limit_R1, float("-inf"))
        total_R1 = torch.where(limit_R1 < vocab, torch.logsumexp(best_RK, -1, keepdim=True), whole_R1)
        probability_RK = (best_RK - total_R1).exp()
        sum_RK = probability_RK.cumsum(-1, dtype=torch.float64)
        reached_R = (sum_RK[:, -1] >= top_p_R) | (limit_R1[:, 0] <= size) | (top_p_R >= 1)
        if size == vocab or bool(reached_R.all()):
            break
        size = vocab
    kept_RK = (sum_RK - probability_RK < top_p_R[:, None]) & (best_RK > float("-inf"))
    last_R1 = kept_RK.sum(-1, keepdim=True).clamp_(min=1) - 1
    threshold_R = best_RK.gather(1, last_R1)[:, 0]
    unlimited_R = (top_p_R >= 1) & (limit_R1[:, 0] >= vocab)
    return threshold_R.masked_fill(unlimited_R, float("-inf"))


def _adjusted(logits_BV: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Logits after grammars, penalties and bias; the same tensor if nobody asks for any."""
    logits_BV = masked(logits_BV, samples)
    rows = [i for i, s in enumerate(samples) if s.penalties is not None]
    biased = [i for i, s in enumerate(samples) if s.params.logit_bias]
    if not rows and not biased:
        return logits_BV
    logits_BV = logits_BV.clone()
    if rows:
        device = logits_BV.device
        some_RV = logits_BV[rows]
        penalties_of = [samples[i].penalties for i in rows]
        knobs_R3 = torch.tensor(
            [
                (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
                for p in (samples[i].params for i in rows)
            ],
            device=device,
        )
        seen_RV = torch.stack([p.seen_V for p in penalties_of if p is not None])
        count_RV = torch.stack([p.count_V for p in penalties_of if p is not None])
        repetition_R1 = knobs_R3[:, :1]
        weaker_RV = torch.where(some_RV > 0, some_RV / repetition_R1, some_RV * repetition_R1)
        some_RV = torch.where(seen_RV, weaker_RV, some_RV)
        some_RV -= knobs_R3[:, 1:2] * (count_RV > 0) + knobs_R3[:, 2:] * count_RV
        logits_BV[rows] = some_RV
    for i in biased:
        bias = samples[i].params.logit_bias
        index = torch.tensor(list(bias), device=logits_BV.device)
        logits_BV[i, index] += torch.tensor(list(bias.values()), dtype=torch.float32, device=logits_BV.device)
    return logits_BV


def _logprobs(raw_BV: Tensor, params: Sequence[SamplingParams], tokens: list[int]) -> dict[int, TokenLogprob]:
    rows = [i for i, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return {}
    logprob_RV = torch.log_softmax(raw_BV[rows].float(), -1)
    most = min(max(p.logprobs or 0 for p in params), logprob_RV.shape[-1])
    best = logprob_RV.topk(most)
    values, indices = best.values.tolist(), best.indices.tolist()
    chosen = logprob_RV.gather(1, torch.tensor([[tokens[i]] for i in rows], device=raw_BV.device))[:, 0].tolist()
    return {
        i: TokenLogprob(tokens[i], chosen[r], list(zip(indices[r], values[r], strict=True))[: params[i].logprobs])
        for r, i in enumerate(rows)
    }
