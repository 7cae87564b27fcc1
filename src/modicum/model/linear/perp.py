"""perp: a low-rank update of a pruned weight that leaves its zeros zero, so that few parameters heal it.

The base's zeros are the mask M. Only A, B and the model's norms train:

    mask (MaskLoRA):    W' = W + s (B A) * M,     s = alpha / r,  B = 0 at the start
    scale (ScaleLoRA):  W' = W * (B A),           B A = 1 at the start

in the forward pass and when merged alike, so the merged weight is as sparse as the base, at the same entries; a plain
LoRA would fill the zeros when it is merged. The mask is kept as bits beside A and B: a weight that lives may pass
through zero. Train with `modicum adapt --form perp` or `modicum pretrain --model PRUNED --form perp`; the compressor
`perp` trains the same update block by block.

Zimmer et al. 2023, arXiv:2312.15230, section 3. Departs: without lora-prune, which changes the function when it is
merged. ScaleLoRA as published starts all ranks equal, so that they stay equal and its rank stays 1: here A starts with
noise that sums to zero over the ranks. B A is made densely in each pass, of one layer at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.model.linear import LinearForm, LinearShape, check_rank
from modicum.model.linear._adapter import Adapter
from modicum.model.norms import RMSNorm

CLAIM = {"figure": "0.27 to 0.35% of the parameters retrained match full retraining after pruning", "where": "abstract",
         "scale": "OPT 2.7B to 30B"}  # fmt: skip
NOT_MEASURABLE = "it heals a pruned model: bench compressor perp measures the update on pruned weights"
NOISE = 0.01  # of A in mode scale, times 1 / sqrt(r)


@dataclass(frozen=True, kw_only=True)
class Config:
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    mode: Literal["mask", "scale"] = "mask"
    norms: bool = True  # the model's norms train, too


TOY = Config(rank=4, alpha=8.0, norms=False)


class Perp(Adapter):
    provides = frozenset({"adapter", "fit", "merge", "trainable"})
    target_modules = ("layers.*",)
    stored = frozenset({"live"})
    config: Config
    live: Tensor

    def __init__(self, config: Config, shape: LinearShape, base: LinearForm):
        check_rank("perp", config.rank, shape)
        super().__init__(config, shape, base)
        self.A = nn.Parameter(self._empty(config.rank, shape.in_features))
        self.B = nn.Parameter(self._empty(shape.out_features, config.rank))
        self.register_buffer("live", self._empty(shape.out_features, -(-shape.in_features // 8), dtype=torch.uint8))
        self.scaling = config.alpha / config.rank
        self.norms: list[nn.Parameter] = []  # of the model, listed by one form

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        self.live.copy_(pack(weight_OI != 0))
        root = 1 / math.sqrt(self.config.rank)
        if self.config.mode == "mask":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.B)
        else:
            noise_RI = torch.randn(self.A.shape, generator=generator) * NOISE * root
            self.A.copy_(root + noise_RI - noise_RI.mean(0))
            nn.init.constant_(self.B, root)

    def mask(self) -> Tensor:
        """mask_OI, True where the base was not pruned."""
        return unpack(self.live, self.in_features)

    def dense(self) -> Tensor:
        weight_OI = self.base.dense()
        product_OI = (self.B @ self.A).to(weight_OI.dtype)
        if self.config.mode == "scale":
            return weight_OI * product_OI
        return weight_OI + self.scaling * product_OI * self.mask()

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias_value()
        return F.linear(x, self.dense().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def rows(self, index: Tensor) -> Tensor:
        return self.dense()[index]

    def trainable(self) -> list[nn.Parameter]:
        return [self.A, self.B, *self.norms]

    @classmethod
    def after_attach(cls, model: nn.Module, forms: dict[str, LinearForm]) -> None:
        first = next(iter(forms.values()))
        if first.config.norms and isinstance(first, Perp):
            norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | RMSNorm)]
            first.norms = [p for norm in norms for p in norm.parameters()]


def pack(mask_OI: Tensor) -> Tensor:
    """Bits of a mask, eight columns to a byte."""
    padded = F.pad(mask_OI.to(torch.uint8), (0, -mask_OI.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, device=mask_OI.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """The mask that `pack` was given."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).flatten(1)[:, :columns].bool()
