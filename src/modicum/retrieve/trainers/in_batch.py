"""in-batch: softmax over the passages of the batch.

Every query should prefer its passage to all other passages of the batch, positives and negatives of others included:

    L = - mean over i of ln ( e^{s(q_i, p_i)} / sum over j of (e^{s(q_i, p_j)} + e^{s(q_i, n_j)}) )

s = `scale` times the cosine. Henderson et al. 2017, arXiv:1705.00652, section 4.4; with one hard negative for each
query as Karpukhin et al. 2020, arXiv:2004.04906. The loss of `MultipleNegativesRankingLoss` in sentence-transformers.
Departs: another occurrence of a query's own passage in the batch is left out of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.retrieve.trainers import Batch, RetrieverTrainer


@dataclass(frozen=True, kw_only=True)
class Config:
    scale: Annotated[float, Field(gt=0)] = 20.0  # 1 / temperature


class InBatch(RetrieverTrainer):
    config: Config
    unit = True

    def on_vectors(self, queries_BD: Tensor, positives_BD: Tensor, negatives_BD: Tensor, batch: Batch) -> Tensor:
        passages_PD = F.normalize(torch.cat([positives_BD, negatives_BD]), dim=-1)
        logits_BP = self.config.scale * F.normalize(queries_BD, dim=-1) @ passages_PD.T
        rows_P = np.concatenate([batch.positive_B, batch.negative_B])
        again_BP = rows_P[None] == batch.positive_B[:, None]
        np.fill_diagonal(again_BP, False)
        logits_BP = logits_BP.masked_fill(torch.from_numpy(again_BP).to(logits_BP.device), float("-inf"))
        return F.cross_entropy(logits_BP, torch.arange(len(queries_BD), device=logits_BP.device))
