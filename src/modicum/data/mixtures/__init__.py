"""port mixture: how much of each domain to train on, as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modicum.core.registry import Method

BASELINE = "natural"


class Mixture(Method):
    """Constructed as `cls(config, sizes)`, sizes = {domain: predictions one epoch of it offers}.

    The stream draws deterministically (deficit round robin): always from the domain furthest behind its weight,
    so the proportions are exact at every moment to within one document.
    """

    def __init__(self, config: Any, sizes: Mapping[str, int]):
        self.config, self.sizes = config, dict(sizes)

    def weights(self, done: float, total: float | None) -> dict[str, float]:
        """Weights by domain, at least 0, in any scale; a domain left out has 0.

        done: predictions drawn so far; total: how many the run will make, None if unknown,
        which a mixture that changes with the run's progress refuses.
        """
        raise NotImplementedError
