"""m2-bert: cosines of matching pairs go to 1 and of others to 0, each pair by itself.

    L = mean over queries and pairs of  (1 - cos(q, d+))^2  and  cos(q, d-)^2

No other text of the batch takes part, so a batch may be one query whose documents are as long as memory allows, and
gradients of eight batches of one add up to that of one batch of eight, which no softmax over the batch has. Negatives
are pushed to be orthogonal, not opposite. Saad-Falcon et al. 2024 (M2-BERT), arXiv:2402.07440, section 4.2, where it
is called orthogonal projection loss; `CosineSimilarityLoss` of sentence-transformers. Departs: the published encoder
is a Monarch mixer for 32 thousand tokens; this is its loss for any encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.retrieve.trainers._candidates import CandidateTrainer as _CandidateTrainer


@dataclass(frozen=True, kw_only=True)
class Config:
    candidates: Annotated[int, Field(ge=2)] = 2  # pairs of a query in a step: the positive, and negatives


class OrthogonalProjection(_CandidateTrainer):
    config: Config
    unit = True

    def on_candidates(self, queries_BD: Tensor, keys_BKD: Tensor, rewards_BK: Tensor) -> Tensor:
        cosine_BK = (F.normalize(queries_BD, dim=-1)[:, None] * F.normalize(keys_BKD, dim=-1)).sum(-1)
        real_BK = (rewards_BK > -float("inf")).to(cosine_BK.dtype)
        target_BK = cosine_BK.new_zeros(cosine_BK.shape)
        target_BK[:, 0] = 1
        error_BK = (cosine_BK - target_BK).pow(2) * real_BK
        return (error_BK.sum(1) / real_BK.sum(1)).mean()
