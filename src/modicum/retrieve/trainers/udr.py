"""udr: demonstrations for in-context learning, ranked as a language model's feedback ranks them.

A candidate demonstration z of an input x has the reward ln p(y | z, x) of a frozen language model, of a class label
normalised over the labels (`retrieve.feedback`). Two losses on B queries with K candidates each:

    list-wise:  mean over pairs with reward i > j of  |1/r_i - 1/r_j| ln(1 + e^{-(s_i - s_j)})
    contrast:   -ln ( e^{s(x, z_best)} / sum over all B K candidates of e^{s(x, z)} )        L = factor list + contrast

r are the ranks by the encoder's own scores s, which are not differentiated; of the rewards only the order enters.
`mine` proposes new candidates from the whole bank with the encoder as it is, and has them scored, between rounds of
training. The bank is the task's training set; a query's own example is never its candidate.

Li et al. 2023, arXiv:2305.04320, section 3, and the authors' code (`lambda_mrr_loss`). Departs: s is divided by the
square root of the width or is `cosine` cosines, as in margin-mse, so that a small raw encoder can begin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.retrieve.encoders import unit
from modicum.retrieve.indexes import top_rows
from modicum.retrieve.pairs import Pairs, with_scores
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._candidates import CandidateTrainer as _CandidateTrainer

CLAMP = 50.0  # largest difference of scores that the loss distinguishes


@dataclass(frozen=True, kw_only=True)
class Config:
    candidates: Annotated[int, Field(ge=2)] = 8  # of a query in a step
    factor: Annotated[float, Field(ge=0)] = 1.0  # weight of the list-wise loss; the authors use 1 or 4
    cosine: Annotated[float, Field(ge=0)] = 0.0  # 0: inner products, as published; else scores are this many cosines


TOY = Config(candidates=4, cosine=10.0)


class UDR(_CandidateTrainer):
    config: Config
    needs = frozenset({"scores"})

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        self.unit = bool(config.cosine)

    def on_candidates(self, queries_BD: Tensor, keys_BKD: Tensor, rewards_BK: Tensor) -> Tensor:
        B, K = rewards_BK.shape
        if self.config.cosine:
            queries_BD, keys_BKD = F.normalize(queries_BD, dim=-1), F.normalize(keys_BKD, dim=-1)
        scale = self.config.cosine or queries_BD.shape[-1] ** -0.5
        scores_BP = scale * queries_BD @ keys_BKD.flatten(0, 1).T
        missing_P = (rewards_BK == -torch.inf).flatten()
        scores_BP = scores_BP.masked_fill(missing_P[None], -torch.inf)
        first_B = torch.arange(B, device=scores_BP.device) * K
        contrast = F.cross_entropy(scores_BP, first_B + rewards_BK.argmax(1))
        own_BK = scores_BP.gather(1, first_B[:, None] + torch.arange(K, device=scores_BP.device)[None])
        return self.config.factor * lambda_mrr(own_BK, rewards_BK) + contrast


def lambda_mrr(scores_BK: Tensor, rewards_BK: Tensor) -> Tensor:
    """The list-wise loss: LambdaRank with reciprocal ranks; a reward of -inf marks a missing candidate."""
    order_BK = scores_BK.detach().argsort(dim=1, descending=True, stable=True)
    inverse_BK = 1.0 / (order_BK.argsort(dim=1) + 1).to(scores_BK.dtype)  # 1 / predicted rank
    real_BK = rewards_BK > -torch.inf
    valid_BKK = (rewards_BK[:, :, None] > rewards_BK[:, None, :]) & real_BK[:, None, :]
    safe_BK = scores_BK.masked_fill(~real_BK, 0.0)
    margin_BKK = (safe_BK[:, :, None] - safe_BK[:, None, :]).clamp(-CLAMP, CLAMP)
    weight_BKK = (inverse_BK[:, :, None] - inverse_BK[:, None, :]).abs()
    terms = (weight_BKK * F.softplus(-margin_BKK))[valid_BKK]
    return terms.sum() / max(len(terms), 1)


def mine(
    pairs: Pairs, student: Student, score: Callable[[str, list[str]], Sequence[float]], depth: int, *, cosine: bool
) -> Pairs:
    """New candidates: the `depth` nearest of the bank by the encoder as it is, without the query's own example and
    its equals; `score` gives their rewards."""
    queries_QD, bank_PD = student.encode(pairs.queries), student.encode(pairs.passages)
    if cosine:
        queries_QD, bank_PD = unit(queries_QD), unit(bank_PD)
    rows_QK, _ = top_rows(queries_QD, bank_PD, min(depth + 8, len(pairs.passages)))
    fresh = []
    for q, rows in enumerate(rows_QK):
        own = pairs.passages[int(pairs.positive_Q[q])]
        fresh.append(np.array([r for r in rows if r >= 0 and pairs.passages[r] != own][:depth], np.int64))
    return with_scores(replace(pairs, negatives_Q=fresh, scores_Q=()), score)
