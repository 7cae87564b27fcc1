"""none: the weights of the last step.

The baseline: nothing is averaged and nothing is kept.

    w = theta_T

No paper. Departs from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modicum.train.averaging import Averaging


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class LastWeights(Averaging):
    config: Config

    def coefficient(self, step: int, total: int, count: int) -> None:
        return None

    def start(self, trainer: Any) -> None:
        """No copy."""

    def after_step(self, trainer: Any) -> None:
        """No copy."""
