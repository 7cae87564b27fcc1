"""kivi: keys in few bits per channel, values in few bits per token, the latest tokens as they are.

Keys have channels that are large in all tokens, so a channel's numbers over a block of tokens share a scale and a zero;
values have none, so each token's numbers do, in groups of channels. The latest `residual` tokens, which matter most and
are read in full precision while a prompt is computed, are coded only when their block has left that window.

    zero = min x,  scale = (max x - min x) / (2^bits - 1),  codes = round((x - zero) / scale)
    over the tokens of a block for each channel of a key; over `group` channels for each token of a value

Liu et al. 2024, arXiv:2402.02750, section 4. Departs: groups of keys are the cache's blocks (16 tokens by default, the
paper: 32; give the engine block_size=32), four bits by default (the paper: 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.serve.cacheforms import CacheForm


@dataclass(frozen=True, kw_only=True)
class Config:
    bits: int = 4  # 2 or 4
    group: int = 32  # channels of a value that share a scale
    residual: int = 128  # latest tokens that are kept as they are, at least

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise UserError(f"kivi: bits={self.bits} must be 2 or 4")
        if self.group < 1 or self.residual < 0:
            raise UserError(f"kivi: group={self.group} must be at least 1, residual={self.residual} at least 0")


TOY = Config(group=4, residual=8)
CLAIM = {
    "figure": "2.6 times less peak memory, almost the same quality with 2 bits",
    "where": "abstract",
    "scale": "Llama, Falcon and Mistral models of 7B parameters and more",
}
SWEEP = ("bits=4", "bits=2")


class Kivi(CacheForm):
    config: Config
    conflicts = frozenset({"eviction", "speculative_decoding"})
    rowwise = False

    def __init__(self, config: Config, head_dim: int, dtype: torch.dtype):
        super().__init__(config, head_dim, dtype)
        self.residual = config.residual
        if head_dim % config.group or head_dim % (8 // config.bits):
            raise UserError(f"kivi: group={config.group} does not divide this model's {head_dim} dimensions of a head")

    def encode(self, which: str, x_PE: Tensor) -> tuple[Tensor, ...]:
        levels, per_byte = 2**self.config.bits - 1, 8 // self.config.bits
        # Numbers that share a scale lie along the last dimension: a channel's tokens, or some channels of a token.
        x_XS = x_PE.float().transpose(-1, -2) if which == "k" else x_PE.float().unflatten(-1, (-1, self.config.group))
        zero_X1 = x_XS.amin(-1, keepdim=True).to(torch.bfloat16)
        scale_X1 = ((x_XS.amax(-1, keepdim=True) - zero_X1.float()) / levels).to(torch.bfloat16)
        step_X1 = torch.where(scale_X1 > 0, scale_X1, 1).float()
        codes_XS = ((x_XS - zero_X1.float()) / step_X1).round().clamp(0, levels).to(torch.uint8)
        codes_PE = codes_XS.transpose(-1, -2) if which == "k" else codes_XS.flatten(-2)
        packed = torch.zeros_like(codes_PE[..., ::per_byte])
        for i in range(per_byte):
            packed |= codes_PE[..., i::per_byte] << (i * self.config.bits)
        return packed, scale_X1.transpose(-1, -2), zero_X1.transpose(-1, -2)

    def decode(self, which: str, codes: tuple[Tensor, ...]) -> Tensor:
        bits = self.config.bits
        packed, scale, zero = codes
        parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        codes_PE = torch.stack(parts, dim=-1).flatten(-2).float()
        if which == "k":  # scale and zero (..., 1, E)
            return (codes_PE * scale.float() + zero.float()).to(self.dtype)
        x_PGS = codes_PE.unflatten(-1, (-1, self.config.group))  # scale and zero (..., P, 1, E / group)
        x_PGS = x_PGS * scale.float().transpose(-1, -2) + zero.float().transpose(-1, -2)
        return x_PGS.flatten(-2).to(self.dtype)
