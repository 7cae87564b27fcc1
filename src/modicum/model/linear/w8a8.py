"""w8a8: weights and inputs in eight bits, one step for all inputs of a layer, and a float product for what it cuts off.

    q = clip(round(x / s), -127, 127),   r = x - s q  where |x / s| > 127.5, else 0
    y = s s_w (q W_int8) + r_C W_C       C the columns in which the call cut something off

s is a number of the layer, the `percentile` of |x| on calibration data over 127, so that the integer product is one of
whole tensors (what neural processing units do fast); few columns are cut off, and the second product, the shadow, puts
back what they lost. Without it (`shadow` 0) this is plain per-tensor W8A8. It is the *residual* that is multiplied, not
the column, which the first product has already. s = 0: not calibrated, the largest |x| of each call is taken.

Xu et al. 2024, arXiv:2407.05858, section 3.3 (shadow outlier execution). Departs: W_C is the decoded int8 weight, where
the paper keeps float columns; the integer product is carried out in float32, exact up to 1,040 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from modicum.model.linear import LinearForm, LinearShape
from modicum.model.linear._quantised import round_up

NOT_MEASURABLE = "its inputs are rounded too, by steps of calibration data: bench compressor mllm-npu measures it"
LEVELS = 127


@dataclass(frozen=True, kw_only=True)
class Config:
    percentile: Annotated[float, Field(gt=0, le=1)] = 0.999  # of |x| that the step does not cut off


class W8A8(LinearForm):
    provides = frozenset({"fit"})
    fit_error = 0.02
    config: Config
    codes: Tensor
    scale: Tensor
    step: Tensor
    shadow: Tensor

    def __init__(self, config: Config, shape: LinearShape):
        super().__init__(config, shape)
        self.register_buffer("codes", self._empty(shape.out_features, shape.in_features, dtype=torch.int8))
        self.register_buffer("scale", self._empty(shape.out_features, 1, dtype=torch.float32))
        self.register_buffer("step", self._empty(1, dtype=torch.float32))
        self.register_buffer("shadow", self._empty(1, dtype=torch.uint8))

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        codes, scale = weight_codes(weight_OI.to(self.codes.device, torch.float32))
        self.codes.copy_(codes)
        self.scale.copy_(scale)
        self.shadow.fill_(1)
        self.step.zero_()
        if calibration_NI is not None:
            self.step.fill_(step_of(calibration_NI, self.config.percentile))

    def dense(self) -> Tensor:
        """The decoded weight; what is multiplied with it is rounded, so merging is not the same."""
        return (self.codes.float() * self.scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x_NI = x.reshape(-1, self.in_features).float()
        step = torch.where(self.step > 0, self.step, x_NI.abs().max().clamp(min=1e-12) / LEVELS)
        q_NI, residual_NI = split(x_NI.detach(), step)
        if torch.is_grad_enabled() and x.requires_grad:  # straight through the rounding
            kept_NI = step * q_NI + (residual_NI if bool(self.shadow) else 0.0)
            y_NO = (x_NI + (kept_NI - x_NI).detach()) @ self.dense().float().t()
            y = y_NO.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        weight_IO = self.codes.t().float()
        y_NO = (q_NI @ weight_IO) * (step * self.scale[:, 0])
        if bool(self.shadow):
            columns = residual_NI.any(0).nonzero()[:, 0]
            if len(columns):
                y_NO = y_NO + (residual_NI[:, columns] @ weight_IO[columns]) * self.scale[:, 0]
        y = y_NO.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def weight_codes(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and their scales (O, 1): symmetric, one for each output."""
    scale_O1 = round_up(weight_OI.abs().amax(1, keepdim=True) / LEVELS, torch.float32)
    codes_OI = (weight_OI / torch.where(scale_O1 == 0, 1, scale_O1)).round().clamp(-LEVELS, LEVELS)
    return codes_OI.to(torch.int8), scale_O1


def step_of(x: Tensor, percentile: float) -> float:
    """The step under which the part `percentile` of |x| is not cut off."""
    flat = x.detach().abs().float().flatten()
    k = max(1, min(flat.numel(), round(percentile * flat.numel())))
    return float(flat.kthvalue(k).values) / LEVELS


def split(x_NI: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    """Codes within the levels, and what was cut off beyond them; rounding within the levels is no residual."""
    scaled = (x_NI / step).round()
    q_NI = scaled.clamp(-LEVELS, LEVELS)
    return q_NI, torch.where(scaled.abs() > LEVELS, x_NI - step * q_NI, 0.0)
