"""The three products of a linear layer in bfloat16, by kernels where those are quicker than the library's.

They are on a processor that multiplies bfloat16 pairs in vectors and has no matrix unit (AMX, which the library uses):
packing is done once and in parallel, and the gradient of a weight, a sum over all rows, needs no transposed copy.
On a processor without any products of bfloat16 (AVX2), PyTorch's take 10 to 60 times as long as those of float32: there
both factors are widened, a part of the weight at a time, and the result is rounded once (`wide`; `model.wide` does the
same for the modules of a decoder). Everything else (other dtypes, odd sizes, few rows) goes to PyTorch.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from modicum.core import compiled
from modicum.model import native

LEAST_ROWS = 128  # fewer do not pay for the packing of the weight
LEAST_WIDE = 8  # rows of a product in float32: fewer do not pay for widening the weight
WIDENED = 2**22  # numbers of a weight that are in float32 at a time
LINE = 16  # numbers of a packed line: what the columns of a result divide into
BY_ROWS, BY_COLUMNS, OVER_ROWS = range(3)  # as in products.h


def forward(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T."""
    (N, inputs), outputs = x_NI.shape, len(weight_OI)
    if wide(x_NI, weight_OI) and N >= LEAST_WIDE:
        x_NI, y_NO = x_NI.float(), x_NI.new_empty(N, outputs)
        for part in _parts(outputs, inputs):
            y_NO[:, part] = x_NI @ weight_OI[part].float().t()
        return y_NO
    if N < LEAST_ROWS or outputs % LINE or inputs % 2 or not _may(x_NI, weight_OI):
        return x_NI @ weight_OI.t()
    return _product(BY_ROWS, x_NI, weight_OI, N, outputs, inputs)


def backward(grad_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """grad W: the gradient of the input."""
    (N, outputs), inputs = grad_NO.shape, weight_OI.shape[1]
    if wide(grad_NO, weight_OI):
        first, *others = _parts(outputs, inputs)
        total_NI = grad_NO[:, first].float() @ weight_OI[first].float()
        for part in others:
            total_NI.addmm_(grad_NO[:, part].float(), weight_OI[part].float())
        return total_NI.to(grad_NO.dtype)
    if N < LEAST_ROWS or inputs % LINE or outputs % 2 or not _may(grad_NO, weight_OI):
        return grad_NO @ weight_OI
    return _product(BY_COLUMNS, grad_NO, weight_OI, N, inputs, outputs)


def weight_gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """grad^T x, (O, I)."""
    (N, outputs), inputs = grad_NO.shape, x_NI.shape[1]
    if wide(grad_NO, x_NI):
        x_NI, made_OI = x_NI.float(), x_NI.new_empty(outputs, inputs)
        for part in _parts(outputs, max(N, inputs)):
            made_OI[part] = grad_NO[:, part].float().t() @ x_NI
        return made_OI
    if N < LEAST_ROWS or outputs % LINE or inputs % LINE or not _may(grad_NO, x_NI):
        return grad_NO.t() @ x_NI
    return _product(OVER_ROWS, grad_NO, x_NI, outputs, inputs, N)


def add(y_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """y += x W^T, in place."""
    if wide(y_NO, x_NI, weight_OI):
        return y_NO.add_(x_NI.float() @ weight_OI.float().t())
    return y_NO.addmm_(x_NI, weight_OI.t())


@functools.cache
def lacking() -> bool:
    """Whether this processor, or the library under PyTorch on it, has no products of bfloat16."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def wide(*matrices: Tensor) -> bool:
    """Whether products of these are better computed in float32. Tensors without data, of a planner, are asked too."""
    return lacking() and all(
        type(m) in _kinds() and m.dtype == torch.bfloat16 and m.device.type == "cpu" for m in matrices
    )


@functools.cache
def _kinds() -> tuple[type, ...]:
    from torch._subclasses.fake_tensor import FakeTensor  # not at once: it takes a twentieth of a second

    return Tensor, torch.nn.Parameter, FakeTensor


def _parts(outputs: int, inputs: int) -> list[slice]:
    """Outputs by parts whose rows of `inputs` make at most WIDENED numbers."""
    step = max(1, WIDENED // max(1, inputs))
    return [slice(o, min(o + step, outputs)) for o in range(0, outputs, step)]


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
