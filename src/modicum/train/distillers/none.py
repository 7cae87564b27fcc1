"""none: no teacher.

The baseline: the run learns from its objective alone.

    total = objective

No paper. Departs from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modicum.train.distillers import Distiller
from modicum.train.distillers._teacher import Watched


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class NoTeacher(Distiller):
    conflicts: ClassVar[frozenset[str]] = frozenset()
    config: Config

    def prepare(self, model: nn.Module, state: dict[str, Any] | None) -> nn.Module:
        return model

    def start(self, trainer: Any) -> None:
        """The objective stays as it is."""

    def loss(self, objective: Any, model: Any, batch: Any, step: Any) -> Any:
        return objective.loss(model, batch, step)

    def terms(self, student: Any, seen: Watched, taught: Watched, mask_BT: Tensor) -> dict[str, Tensor]:
        return {}
