"""none: tokens as they are stored.

The baseline: every token of a document is predicted from those before it, and weighs the same.

    loss = - sum over t of log p(x_t | x_<t)

No paper. Departs from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.data.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Unchanged(Transform):
    config: Config
