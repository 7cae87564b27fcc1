"""knorm: keep the prompt's entries whose keys are short, per head; all that is generated stays.

In trained decoders a key of small norm tends to be one that queries look at much. So nothing is observed: the score
of an entry is the norm of its key, which is known without any query, whatever will be asked later.

    score[g, s] = -|k[g, s]|

Devoto et al. 2024, arXiv:2406.11430, section 3. Departs: the paper leaves the first two layers of a model whole; here
all layers have one budget, as in the comparison of other methods by scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from modicum.serve.kv import ScorePolicy, check_budget


@dataclass(frozen=True, kw_only=True)
class Config:
    budget: float = 0.5  # entries of the prompt that stay; up to 1: a share of the prompt

    def __post_init__(self) -> None:
        check_budget("knorm", self.budget)


TOY = Config(budget=12)
CLAIM = {
    "figure": "half the cache without a loss in language modelling; 90% on passkey retrieval",
    "where": "abstract",
    "scale": "7B and 8B models",
}
SWEEP = {"budget": (0.2,)}


class KNorm(ScorePolicy):
    config: Config

    def score(self, layer: int, q_HWE: Tensor, k_GSE: Tensor, v_GSE: Tensor) -> Tensor:
        return -k_GSE.float().norm(dim=-1)
