"""llm-embedder: a language model's rewards order the candidates of a query, and each in turn is the positive.

A candidate's reward r is the log-likelihood of the wanted output given it (`retrieve.feedback`). With the n candidates
sorted by reward and w = softmax(r),

    L = distil sum over i of w_i CE_i + contrastive CE_label
    CE_i = -ln ( e^{s(q, d_i)} / sum over keys d of the batch of e^{s(q, d)} ), without the query's own d_1 ... d_{i-1}

so that no better candidate is a negative of a worse one, and keys of other queries always are. s = `scale` times the
cosine. One encoder serves several retrieval tasks (`feedback.TaskPairs`): an instruction for each is put before
queries and keys (`instructions`), and a batch is of one task.

Zhang et al. 2023, arXiv:2310.07554, section 3, and the authors' code (the stable distillation; their default of plain
KL over own candidates is not that). Departs: the definition of the reward is by the abstract and the code's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from modicum.retrieve.feedback import TaskPairs
from modicum.retrieve.pairs import Pairs
from modicum.retrieve.trainers import Batch
from modicum.retrieve.trainers._candidates import CandidateTrainer as _CandidateTrainer


@dataclass(frozen=True, kw_only=True)
class Config:
    candidates: Annotated[int, Field(ge=2)] = 8  # of a query in a step, the labelled passage included
    scale: Annotated[float, Field(gt=0)] = 100.0  # of cosines: 1 / temperature
    contrastive: Annotated[float, Field(ge=0)] = 0.2  # weight of the labelled passage's term
    distil: Annotated[float, Field(ge=0)] = 1.0  # weight of the rewards' terms
    homogeneous: bool = True  # batches of one task; False: of all


TOY = Config(candidates=4, scale=20.0)


def instructions(task: str) -> tuple[str, str]:
    """What is put before a query and before a key of a task; nothing where there is one task only."""
    return (f"Represent this {task} query for retrieval: ", f"Represent this {task} document: ") if task else ("", "")


class LLMEmbedder(_CandidateTrainer):
    config: Config
    needs = frozenset({"scores"})
    unit = True

    def __init__(self, config: Any, pairs: Pairs):
        super().__init__(config, pairs)
        names = pairs.tasks_Q if isinstance(pairs, TaskPairs) else [""] * len(pairs.queries)
        self.task_Q = np.array(names)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        tasks = sorted(set(self.task_Q.tolist()))
        if len(tasks) < 2 or not self.config.homogeneous:
            return super().batch(step, size, seed)
        rng = np.random.default_rng([seed, step])
        # Tasks are drawn by their number of queries, as if the batches of all epochs were shuffled.
        task = self.task_Q[int(rng.integers(len(self.task_Q)))]
        query_B = rng.permutation(np.flatnonzero(self.task_Q == task))[:size]
        return self.drawn(query_B, [int(rng.choice(self.pairs.negatives_Q[q])) for q in query_B], seed, step)

    def query_texts(self, batch: Batch) -> list[str]:
        return [instructions(self.task_Q[q])[0] + self.pairs.queries[q] for q in batch.query_B]

    def key_texts(self, rows: Sequence[int], batch: Batch) -> list[str]:
        task = str(self.task_Q[batch.query_B[0]])
        return [instructions(task)[1] + self.pairs.passages[r] for r in rows]

    def on_candidates(self, queries_BD: Tensor, keys_BKD: Tensor, rewards_BK: Tensor) -> Tensor:
        B, K = rewards_BK.shape
        real_BK = rewards_BK > -torch.inf
        unit_PD = F.normalize(keys_BKD.flatten(0, 1), dim=-1)
        logits_BP = self.config.scale * F.normalize(queries_BD, dim=-1) @ unit_PD.T
        logits_BP = logits_BP.masked_fill(~real_BK.flatten()[None], -torch.inf)
        own_B = torch.arange(B, device=logits_BP.device) * K  # column of each query's first candidate
        total = self.config.contrastive * F.cross_entropy(logits_BP, own_B)
        if not self.config.distil:
            return total
        order_BK = rewards_BK.argsort(dim=1, descending=True, stable=True)
        weight_BK = rewards_BK.softmax(1).gather(1, order_BK).to(logits_BP.dtype)
        for i in range(K):
            target_B = own_B + order_BK[:, i]
            here_B = real_BK.gather(1, order_BK[:, i : i + 1])[:, 0]
            if here_B.any():
                terms_B = F.cross_entropy(logits_BP[here_B], target_B[here_B], reduction="none")
                total = total + self.config.distil * (weight_BK[here_B, i] * terms_B).sum() / B
            logits_BP = logits_BP.scatter(1, target_B[:, None], -torch.inf)  # no negative of what comes after
        return total
