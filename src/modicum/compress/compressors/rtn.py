"""rtn: every weight rounded to the nearest of the codes between its group's least and largest.

    s = (max W - min W) / (2^b - 1),   z = min W + 2^(b-1) s,   W ~ s (round((W - z) / s)) + z

Round-to-nearest, asymmetric, weight only: the zero line of post-training quantisation (the RTN of Frantar et al. 2022,
arXiv:2210.17323, section 4, with groups). It reads no text. With `clip` the range of each group is shrunk in 20 steps
to half, and the one kept whose error is least when each input is weighed by its mean square,

    r* = argmin_r ||(W - Q_r(W)) diag(sqrt(E x^2))||,

which is the clipping search of AWQ (Lin et al. 2023, arXiv:2306.00978) by a diagonal instead of a sample of outputs;
that reads text. Departs: scales and zero points are rounded to their stored dtype before the codes are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.compress.compressors import Codes, Compressor, Statistics
from modicum.compress.compressors._affine import AffineConfig, grid, groups, rounded, width
from modicum.core.registry import Capabilities

STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Config(AffineConfig):
    clip: bool = False  # search each group's range by the error at its inputs; reads text


SWEEP = ("bits=2,group=64", "bits=3,group=64")


class Rtn(Compressor):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if config.clip:
            self.needs = frozenset({"squares"})  # type: ignore[misc]

    @classmethod
    def capabilities(cls, config: Any) -> Capabilities:
        return Capabilities(requires=frozenset({"calibration_text"}) if config.clip else frozenset())

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Codes:
        if not self.config.clip:
            return rounded(weight_OI, self.config)
        return rounded(weight_OI, self.config, clipping(weight_OI, statistics.mean_square, self.config))


def clipping(weight_OI: Tensor, mean_square_I: Tensor, config: AffineConfig) -> Tensor:
    """shrink_OG: by how much each group's range is best shrunk."""
    group = width(config, weight_OI.shape[1])
    weight_OGi = groups(weight_OI, group)
    padding = -weight_OI.shape[1] % group
    weigh_Gi = torch.nn.functional.pad(mean_square_I.to(weight_OI.dtype), (0, padding)).view(-1, group)
    best = torch.full(weight_OGi.shape[:-1], torch.inf, dtype=weight_OI.dtype, device=weight_OI.device)
    clip_OG = torch.ones_like(best)
    for step in range(STEPS):
        shrink = 1 - 0.5 * step / STEPS
        left = weight_OGi - grid(weight_OGi, config, shrink).nearest(weight_OGi)
        error = (left.square() * weigh_Gi).sum(-1)
        clip_OG, best = torch.where(error < best, shrink, clip_OG), torch.minimum(error, best)
    return clip_OG
