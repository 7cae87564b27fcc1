"""int8: weights in eight bits with one scale per output channel or per group of inputs.

    q = round(W / s) in -127..127,   s = max |W| over the channel or group / 127,   W ~ s q

Symmetric round-to-nearest, weight only: activations keep their dtype (the vector-wise scheme of Dettmers
et al. 2022, arXiv:2208.07339, section 2.1, applied to weights alone). Stored: one byte per entry and one
`scale_dtype` number per channel or group. The scale is rounded (up) before the codes are computed, so
rounding it adds no error of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from modicum.model.linear import LinearShape
from modicum.model.linear._quantised import SCALE_DTYPES, QuantisedForm, round_up


@dataclass(frozen=True, kw_only=True)
class Config:
    group: Annotated[int, Field(ge=0)] = 0  # inputs that share a scale; 0: the whole channel
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


TOY = Config(group=32)


class Int8(QuantisedForm):
    provides = frozenset({"adapter_base", "embedding", "fit", "merge"})
    stored = frozenset({"scale"})
    fit_error = 0.02
    config: Config
    codes: Tensor
    scale: Tensor

    def __init__(self, config: Config, shape: LinearShape):
        super().__init__(config, shape)
        self.group = min(config.group or shape.in_features, shape.in_features)
        self.n_groups = -(-shape.in_features // self.group)
        self.register_buffer("codes", self._empty(shape.out_features, shape.in_features, dtype=torch.int8))
        self.register_buffer(
            "scale", self._empty(shape.out_features, self.n_groups, dtype=SCALE_DTYPES[config.scale_dtype])
        )

    def _grouped(self, weight_OI: Tensor) -> Tensor:
        """(O, I) to (O, groups, group), a short last group filled with zeros."""
        padded = F.pad(weight_OI, (0, self.n_groups * self.group - self.in_features))
        return padded.view(weight_OI.shape[0], self.n_groups, self.group)

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        weight_OGi = self._grouped(weight_OI.to(self.codes.device, torch.float32))
        scale_OG = round_up(weight_OGi.abs().amax(-1) / 127, self.scale.dtype)
        step_OG = torch.where(scale_OG == 0, 1, scale_OG.float())
        codes_OGi = (weight_OGi / step_OG[..., None]).round().clamp(-127, 127)
        self.scale.copy_(scale_OG)
        self.codes.copy_(codes_OGi.flatten(1)[:, : self.in_features])

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self._decode(self.codes, self.scale, dtype)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.flatten()
        rows = self._decode(self.codes[flat], self.scale[flat], self.dtype)
        return rows.view(*index.shape, self.in_features)

    def _decode(self, codes_NI: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
        if self.n_groups == 1:
            return codes_NI.to(dtype) * scale_NG.to(dtype)
        return codes_NI.to(dtype) * scale_NG.to(dtype).repeat_interleave(self.group, 1)[:, : self.in_features]

    def _kernel(self, x_NI: Tensor) -> Tensor | None:
        if self.n_groups != 1:
            return None
        return torch._weight_int8pack_mm(x_NI, self.codes, self.scale[:, 0].to(x_NI.dtype))
