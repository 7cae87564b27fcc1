"""hqq: zero points moved until the error has few large entries, without data.

Half-quadratic quantisation minimises sum |W - W_q|^p, p < 1, over the zero points alone, by alternating between an
error E that may be large in a few places and the zero point that fits the rest. With u = 1 / s and W ~ (q - v) / u,

    q = clamp(round(W u + v)),   E = shrink(W - (q - v) / u),   v <- mean over the group of (q - (W - E) u),
    shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0),   beta <- kappa beta.

Scales stay those of round-to-nearest, and so do the bytes. It stops when the mean |W - W_q| rises. Badri and Shaji
2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog), with the defaults
of mobiusml/hqq `hqq/core/optimize.py`. Departs: the best zero point that was evaluated is kept, where the authors keep
the one after; it is evaluated as it is stored, z = s (2^(b-1) - v) in `scale_dtype`; and with round-to-nearest as the
first candidate, no group's mean absolute error is larger than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from modicum.compress.compressors import Codes, Compressor, Statistics
from modicum.compress.compressors._affine import AffineConfig, Grid, grid, groups, width


@dataclass(frozen=True, kw_only=True)
class Config(AffineConfig):
    p: Annotated[float, Field(gt=0, lt=1)] = 0.7  # of the norm
    beta: Annotated[float, Field(gt=0)] = 10.0  # how strongly E is held to the error, at first
    kappa: Annotated[float, Field(ge=1)] = 1.01  # what beta is multiplied with at each iteration
    iterations: Annotated[int, Field(ge=0)] = 20


CLAIM = {"figure": "Llama-2-70B at 2 bits better than Llama-2-13B in full precision; over 50 times as fast as GPTQ",
         "where": "blog post, introduction", "scale": "70B parameters"}  # fmt: skip
SWEEP = ("bits=2,group=64", "bits=3,group=64")


class Hqq(Compressor):
    config: Config

    def fit(self, weight_OI: Tensor, statistics: Statistics) -> Codes:
        c, inputs = self.config, weight_OI.shape[1]
        weight_OGi = groups(weight_OI, width(c, inputs))
        start = grid(weight_OGi, c)
        step = torch.where(start.scale == 0, 1, start.scale)
        zero, best = start.zero, start
        least = (weight_OGi - start.nearest(weight_OGi)).abs().mean(-1, keepdim=True)
        last, beta = least.mean(), c.beta
        for _ in range(c.iterations):
            now = Grid(start.scale, zero, c)
            codes = now.codes(weight_OGi)
            error = shrink(weight_OGi - now.decode(codes), c.p, beta)
            v = (codes - (weight_OGi - error) / step).mean(-1, keepdim=True)
            zero = (start.scale * (c.middle - v)).to(c.dtype).to(weight_OI.dtype)
            beta *= c.kappa
            candidate = Grid(start.scale, zero, c)
            reached = (weight_OGi - candidate.nearest(weight_OGi)).abs().mean(-1, keepdim=True)
            better = reached < least
            best = Grid(start.scale, torch.where(better, zero, best.zero), c)
            least = torch.where(better, reached, least)
            if reached.mean() > last:
                break
            last = reached.mean()
        codes_OI = best.codes(weight_OGi).flatten(1)[:, :inputs]
        return Codes.of(codes_OI, best.scale[..., 0], best.zero[..., 0], c)


def shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """What minimises |e|^p + beta / 2 (x - e)^2 to first order."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-12) ** (p - 1) / beta).clamp_min(0)
