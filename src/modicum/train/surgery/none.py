"""none: the model stays as it is.

The baseline: the same dense model from the first step to the last.

    model(step) = model(0)

No paper. Departs from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.train.surgery import Surgery


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Nothing(Surgery):
    conflicts = frozenset()
    config: Config
