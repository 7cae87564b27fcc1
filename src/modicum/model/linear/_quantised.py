"""What weight-only quantised forms share: the layer computed from a weight that is decoded when needed.

`_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` of PyTorch multiply with the codes directly. On
CPUs they are vectorised for bfloat16 alone, and faster than decoding and multiplying only for few rows,
which is what generating token by token is; elsewhere the plain path runs. It is also the truth.

Shapes: see `modicum.model.linear`; N rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.model.linear import LinearForm
from modicum.model.wide import widened

KERNEL_ROWS = 16  # up to here the fused kernels beat decoding the weight (measured on an AVX-512 CPU)
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _Decoded(torch.autograd.Function):
    """y = x W^T with W decoded again in the backward pass, so that no dense weight lives in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: QuantisedForm) -> Tensor:
        ctx.form = form
        return F.linear(x, form.decode(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        with widened(grad):
            return grad @ ctx.form.decode(grad.dtype), None


class QuantisedForm(LinearForm):
    """A frozen weight in codes and scales. Methods give `take`, `decode`, `rows` and maybe `_kernel`."""

    def decode(self, dtype: torch.dtype) -> Tensor:
        """weight_OI in `dtype`."""
        raise NotImplementedError

    def _kernel(self, x_NI: Tensor) -> Tensor | None:
        """y_NO without bias by a fused kernel, or None where there is none for this layout."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        y = None
        few = x.numel() <= KERNEL_ROWS * self.in_features
        if (
            few
            and x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and not (torch.is_grad_enabled() and x.requires_grad)
        ):
            y = self._kernel(x.reshape(-1, self.in_features).contiguous())
        if y is None:
            y = _Decoded.apply(x, self)
        else:
            y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        return self.decode(self.dtype)


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` (not negative) in `dtype`, rounded up, so that a scale never makes its largest entry clip."""
    near = value.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.to(value.dtype) < value, above, near)
