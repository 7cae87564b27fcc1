"""compacter++: compacter after the feed-forward blocks alone.

Half the adapters of `compacter`, which is what an adapter is, on the ground that those after attention add little:

    y = h + U(gelu(D(h))) after the last matrix of every feed-forward block; slow matrices shared, norms trained

Karimi Mahabadi et al. 2021, arXiv:2106.04647, section 3.3 and Table 1.
Departs from the paper: as `compacter` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.model.forms import compacter

CLAIM = {"figure": "on par with full fine-tuning training 0.047% of the parameters", "where": "abstract; Table 1",
         "scale": "T5-base 222M"}
SWEEP = ("bottleneck=24", "bottleneck=48")


@dataclass(frozen=True, kw_only=True)
class Config(compacter.Config):
    """The knobs of compacter."""


class CompacterPP(compacter.Compacter):
    places = compacter.FEED_FORWARD
