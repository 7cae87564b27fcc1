"""The three products of a linear layer in bfloat16, by kernels where those are quicker than the library's.

They are on a processor that multiplies bfloat16 pairs in vectors and has no matrix unit (AMX, which the library uses):
packing is done once and in parallel, and the gradient of a weight, a sum over all rows, needs no transposed copy.
Everything else (other dtypes, odd sizes, few rows) goes to PyTorch.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.core import compiled
from modicum.model import native

LEAST_ROWS = 128  # fewer do not pay for the packing of the weight
LINE = 16  # numbers of a packed line: what the columns of a result divide into
BY_ROWS, BY_COLUMNS, OVER_ROWS = range(3)  # as in products.h


def forward(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T."""
    (N, inputs), outputs = x_NI.shape, len(weight_OI)
    if N < LEAST_ROWS or outputs % LINE or inputs % 2 or not _may(x_NI, weight_OI):
        return x_NI @ weight_OI.t()
    return _product(BY_ROWS, x_NI, weight_OI, N, outputs, inputs)


def backward(grad_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """grad W: the gradient of the input."""
    (N, outputs), inputs = grad_NO.shape, weight_OI.shape[1]
    if N < LEAST_ROWS or inputs % LINE or outputs % 2 or not _may(grad_NO, weight_OI):
        return grad_NO @ weight_OI
    return _product(BY_COLUMNS, grad_NO, weight_OI, N, inputs, outputs)


def weight_gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """grad^T x, (O, I)."""
    (N, outputs), inputs = grad_NO.shape, x_NI.shape[1]
    if N < LEAST_ROWS or outputs % LINE or inputs % LINE or not _may(grad_NO, x_NI):
        return grad_NO.t() @ x_NI
    return _product(OVER_ROWS, grad_NO, x_NI, outputs, inputs, N)


def _may(*matrices: Tensor) -> bool:
    """Pairs are read as words of 32 bits, so rows begin at even numbers."""
    kernels = native.library()
    return (
        kernels is not None
        and "amx_bf16" not in compiled.abilities()
        and all(
            type(m) in (Tensor, torch.nn.Parameter)
            and m.dtype == torch.bfloat16
            and m.device.type == "cpu"
            and m.stride(1) == 1
            and m.stride(0) % 2 == 0
            and m.data_ptr() % 4 == 0
            for m in matrices
        )
        and bool(kernels.modicum_pairs())
    )


def _product(kind: int, a: Tensor, b: Tensor, rows: int, columns: int, inner: int) -> Tensor:
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    if native._call(
        *("product", kind, a, a.stride(0), b, b.stride(0), out, rows, columns, inner, torch.get_num_threads())
    ):
        raise MemoryError(f"no memory for the packed factor of a product of {rows} x {inner} x {columns}")
    return out
