"""natural: every domain in proportion to its size, so that all end their epochs together.

    w[d] = tokens[d] / sum of tokens

The usual baseline (e.g. the proportional setting of Gao et al. 2020, arXiv:2101.00027, before their
up-weighting). Nothing departs from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.data.mixtures import Mixture


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Natural(Mixture):
    def weights(self, done: float, total: float | None) -> dict[str, float]:
        return {domain: float(size) for domain, size in self.sizes.items()}
