"""int4: weights in four bits, two to a byte, with a scale and a zero point per group of inputs.

    s = (max W - min W) / 15,   z = min W + 8 s   over the group,
    q = round((W - z) / s) + 8 in 0..15,   W ~ s (q - 8) + z

Asymmetric round-to-nearest with groups, weight only: the usual baseline of 4-bit quantisation (for
instance RTN in Frantar et al. 2022, arXiv:2210.17323, with the grouping of its section 4). Stored: half a
byte per entry and two `scale_dtype` numbers per group, 4.5 bits per weight at group=64. Even inputs lie in
the low half of each byte. Scale and zero point are rounded before the codes are computed. Inputs that do
not fill the last group are padded, and the padding is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from modicum.model.linear import LinearShape
from modicum.model.linear._quantised import SCALE_DTYPES, QuantisedForm, round_up


@dataclass(frozen=True, kw_only=True)
class Config:
    group: Annotated[int, Field(ge=2, multiple_of=2)] = 64  # inputs that share scale and zero point
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


TOY = Config(group=16)


class Int4(QuantisedForm):
    provides = frozenset({"adapter_base", "embedding", "fit", "merge"})
    stored = frozenset({"scale", "zero"})
    fit_error = 0.13
    config: Config
    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, config: Config, shape: LinearShape):
        super().__init__(config, shape)
        self.group = min(config.group, shape.in_features + shape.in_features % 2)
        self.n_groups = -(-shape.in_features // self.group)
        dtype = SCALE_DTYPES[config.scale_dtype]
        sizes = (shape.out_features, self.n_groups)
        self.register_buffer("packed", self._empty(sizes[0], sizes[1] * self.group // 2, dtype=torch.uint8))
        self.register_buffer("scale", self._empty(*sizes, dtype=dtype))
        self.register_buffer("zero", self._empty(*sizes, dtype=dtype))
        self._kernel_weight: tuple[Tensor, Tensor] | None = None

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        weight = weight_OI.to(self.packed.device, torch.float32)
        # Pad by repeating the last input: zeros would widen the last group's range.
        missing = self.n_groups * self.group - self.in_features
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
        weight_OGi = weight.view(self.out_features, self.n_groups, self.group)
        low, high = weight_OGi.amin(-1), weight_OGi.amax(-1)
        scale = round_up((high - low) / 15, self.scale.dtype)
        zero = (low + 8 * scale.float()).to(self.zero.dtype)
        step = torch.where(scale == 0, 1, scale.float())
        codes = ((weight_OGi - zero.float()[..., None]) / step[..., None]).round().add(8).clamp(0, 15)
        codes = codes.to(torch.uint8).flatten(1)
        self.packed.copy_(codes[:, 0::2] | codes[:, 1::2] << 4)
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        self._kernel_weight = None

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self._decode(self.packed, self.scale, self.zero, dtype)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.flatten()
        rows = self._decode(self.packed[flat], self.scale[flat], self.zero[flat], self.dtype)
        return rows.view(*index.shape, self.in_features)

    def _codes(self, packed: Tensor) -> Tensor:
        """packed_NP to codes (N, 2P) in 0..15."""
        return torch.stack([packed & 15, packed >> 4], -1).flatten(1)

    def _decode(self, packed: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
        codes = self._codes(packed).view(-1, self.n_groups, self.group).to(dtype) - 8
        weight = torch.addcmul(zero.to(dtype)[..., None], codes, scale.to(dtype)[..., None])
        return weight.flatten(1)[:, : self.in_features]

    def _kernel(self, x_NI: Tensor) -> Tensor | None:
        padded = self.n_groups * self.group
        if padded != self.in_features or self.out_features % 16 or self.group not in (32, 64, 128, 256):
            return None
        if self._kernel_weight is None:
            # The kernel's own order of the same codes, which depends on the CPU and so is not what is stored.
            order = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self._codes(self.packed).int(), 1)
            scales = torch.stack([self.scale.T, self.zero.T], -1).to(x_NI.dtype).contiguous()
            self._kernel_weight = (order, scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_NI, self._kernel_weight[0], self.group, self._kernel_weight[1]
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kernel_weight = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kernel_weight = None
        return super()._apply(fn, recurse)
