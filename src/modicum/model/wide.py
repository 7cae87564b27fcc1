"""A decoder's products of bfloat16 on a processor that has none: in float32, rounded once.

PyTorch's own take 10 to 60 times as long there (AVX2). The fused layers of training call `native.products` themselves;
everything else, modules in inference, adapters, mixers, passes through here: layers and heads run in `widened()`, which
catches linear layers and matrix products. On other processors, and for other dtypes, it does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modicum.model import fused
from modicum.model.native import products

MATRIX_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}


def widened(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """In which products of bfloat16 go through float32, if `x`, a tensor that takes part in them, calls for it.

    A step of one token of a sequence, say, has too few rows to pay for it.
    """
    called_for = products.wide(x) and _rows(x) >= products.LEAST_WIDE and not torch.compiler.is_compiling()
    return _Widened() if called_for else contextlib.nullcontext()


class _Widened(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and len(args) > 1 and products.wide(*args[:2]):
            return _linear(*args, **(kwargs or {}))
        plain = func in MATRIX_PRODUCTS and len(args) == 2 and not kwargs  # no `out`
        if plain and products.wide(*args) and _rows(args[0]) >= products.LEAST_WIDE:
            return torch.matmul(args[0].float(), args[1].float()).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    if _rows(x) < products.LEAST_WIDE:
        return F.linear(x, weight_OI, bias_O)
    y = fused.linear(x, weight_OI)
    return y if bias_O is None else y + bias_O


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])
