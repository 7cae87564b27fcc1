"""compacter++: compacter after the feed-forward blocks alone.

Half the adapters of `compacter`, which is what an adapter is, on the ground that those after attention add little:

    y = h + U(gelu(D(h))) after the last matrix of every feed-forward block; slow matrices shared, norms trained

Karimi Mahabadi et al. 2021, arXiv:2106.04647, section 3.3 and Table 1.
Departs from the paper: as `compacter` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from modicum.model.linear import compacter

CLAIM = {
    "figure": "on par with full fine-tuning training 0.047% of the parameters",
    "where": "abstract; Table 1",
    "scale": "T5-base 222M",
}
SWEEP = {"bottleneck": (48,)}


@dataclass(frozen=True, kw_only=True)
class Config(compacter.Config):
    n: Annotated[int, Field(ge=1)] = 4  # Kronecker products in a sum; divides bottleneck and features
    bottleneck: Annotated[int, Field(ge=1)] = 24  # d
    rank: Annotated[int, Field(ge=1)] = 1  # of the fast factors
    slow_std: Annotated[float, Field(gt=0)] = 1e-4  # the slow matrices start from N(0, slow_std^2)
    norms: bool = True  # the model's layer norms train, too


class CompacterPP(compacter.Compacter):
    provides = frozenset({"adapter", "fit", "trainable"})
    target_modules = compacter.FEED_FORWARD
