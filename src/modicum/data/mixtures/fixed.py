"""fixed: weights that the user gives, whatever the domains' sizes.

    w[d] = weights[d] / sum of weights        fixed:weights={prose: 3, code: 1}

A domain that is not named is not drawn. Small domains are then repeated: Muennighoff et al. 2023
(arXiv:2305.16264) find up to about 4 epochs nearly as good as new text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from modicum.core.errors import UserError, unknown
from modicum.data.mixtures import Mixture


@dataclass(frozen=True, kw_only=True)
class Config:
    weights: dict[str, float] = field(default_factory=dict)  # empty: equal weights


class Fixed(Mixture):
    def __init__(self, config: Config, sizes: Mapping[str, int]):
        super().__init__(config, sizes)
        for domain, weight in config.weights.items():
            if domain not in self.sizes:
                raise unknown("domain in mixture weights", domain, self.sizes)
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"mixture weight {domain}={weight} must be a number that is not negative")
        self._weights = dict(config.weights) or dict.fromkeys(self.sizes, 1.0)
        if sum(self._weights.values()) <= 0:
            raise UserError("all mixture weights are 0; give at least one domain a weight above 0")

    def weights(self, done: float, total: float | None) -> dict[str, float]:
        return self._weights
