"""none: the served model alone.

    logits = those of the model

No paper. The baseline, which loads nothing and costs nothing. No departures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modicum.serve.guides import Guide


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Unguided(Guide):
    conflicts: ClassVar[frozenset[str]] = frozenset()
    config: Config

    def combine(self, main_RV: Tensor, beside: Sequence[Tensor]) -> Tensor:
        return main_RV
