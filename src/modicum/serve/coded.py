"""Keys, or values, of the whole cache in a cache form: tensors of codes, (L, G, N, P or 1, width) each.

Shapes: L layers, G KV heads, N blocks, P block_size, E head dimension; a row is an entry, `layer`'s blocks or all of
them taken as one row.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.serve.cacheforms import CacheForm
from modicum.serve.cacheforms._fitted import FittedForm


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on the CPU take memory only where they are touched (`torch.zeros` writes all of them).

    In small pages, on purpose: a block is a few KiB in each layer and head, and with pages of 2 MiB the first
    block of a model with 30 layers and 3 heads would take 360 MiB. Raises RuntimeError or OSError.
    """
    if device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


class Coded:
    """`which`: "k" or "v". Entries are written one by one only where the form is rowwise."""

    def __init__(self, form: CacheForm, which: str, shape: Sequence[int], device: torch.device):
        self.form, self.which = form, which
        L, G, N, P, E = shape
        one = form.encode(which, torch.zeros(P, E, dtype=form.dtype))
        self.codes = tuple(lazy_zeros((L, G, N, *part.shape), part.dtype, device) for part in one)

    def _decoded(self, codes: Sequence[Tensor]) -> Tensor:
        return self.form.decode(self.which, tuple(codes))

    def blocks(self, layer: int, index: slice | Tensor) -> Tensor:
        """x_GNPE of some blocks; a view where the form is plain and the index a slice."""
        if isinstance(index, slice):
            return self._decoded([part[layer][:, index] for part in self.codes])
        return self._decoded([part[layer].index_select(1, index) for part in self.codes])

    def pages(self, table_X: Tensor) -> Tensor:
        """x_XPE of pages: blocks of all layers and heads taken as one row."""
        return self._decoded([part.flatten(0, 2)[table_X] for part in self.codes])

    def write(self, layer: int, rows_T: Tensor, x_GTE: Tensor) -> None:
        for part, new in zip(self.codes, self.form.encode(self.which, x_GTE), strict=True):
            part[layer].flatten(1, 2).index_copy_(1, rows_T, new)

    def write_flat(self, rows_X: Tensor, x_XE: Tensor) -> None:
        """Rows of all layers and heads."""
        for part, new in zip(self.codes, self.form.encode(self.which, x_XE), strict=True):
            part.view(-1, part.shape[-1]).index_copy_(0, rows_X, new)

    def write_blocks(self, layer: int, index_N: Tensor, first_N: Tensor, x_GNPE: Tensor) -> None:
        """Whole blocks. first_N: positions of their first entries."""
        for part, new in zip(self.codes, self.form.encode(self.which, x_GNPE), strict=True):
            part[layer].index_copy_(1, index_N, new)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Rows to other rows, in all layers and heads."""
        for part in self.codes:
            rows = part.flatten(2, 3)
            rows.index_copy_(2, target, rows.index_select(2, source))

    def zero(self, rows: Tensor) -> None:
        for part in self.codes:
            part.flatten(2, 3).index_fill_(2, rows, 0)

    def wipe(self, blocks: Tensor) -> None:
        for part in self.codes:
            part.index_fill_(2, blocks, 0)

    def wipe_pages(self, pages: Tensor) -> None:
        for part in self.codes:
            part.flatten(0, 2).index_fill_(0, pages, 0)


class CodedByLayer(Coded):
    """Of a `FittedForm`: a layer's heads lie in one row of codes, whose width is the layer's own, (N, P or 1, width).

    It has no pages: such a form conflicts with eviction.
    """

    form: FittedForm

    def __init__(self, form: FittedForm, which: str, shape: Sequence[int], device: torch.device):
        self.form, self.which = form, which
        L, G, N, P, E = shape
        self.first_N = lazy_zeros((N,), torch.int64, device)
        self.layers: list[tuple[Tensor, ...]] = []
        for layer in range(L):
            one = form.encode_layer(
                which, layer, torch.zeros(G, 1, P, E, dtype=form.dtype), self.first_N.new_zeros(1, P)
            )
            self.layers.append(tuple(lazy_zeros((N, *part.shape[1:]), part.dtype, device) for part in one))

    @property
    def codes(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(part for parts in self.layers for part in parts)

    def _positions(self, first_N: Tensor, n: int) -> Tensor:
        return first_N[:, None] + torch.arange(n, device=first_N.device)

    def blocks(self, layer: int, index: slice | Tensor) -> Tensor:
        parts = tuple(part[index] for part in self.layers[layer])
        return self.form.decode_layer(
            self.which, layer, parts, self._positions(self.first_N[index], self.form.entries(parts))
        )

    def write(self, layer: int, rows_T: Tensor, x_GTE: Tensor) -> None:
        new = self.form.encode_layer(self.which, layer, x_GTE[:, None], rows_T[None])
        for part, one in zip(self.layers[layer], new, strict=True):
            part.flatten(0, 1).index_copy_(0, rows_T, one[0])

    def write_blocks(self, layer: int, index_N: Tensor, first_N: Tensor, x_GNPE: Tensor) -> None:
        self.first_N[index_N] = first_N
        new = self.form.encode_layer(self.which, layer, x_GNPE, self._positions(first_N, x_GNPE.shape[2]))
        for part, one in zip(self.layers[layer], new, strict=True):
            part.index_copy_(0, index_N, one)

    def move(self, source: Tensor, target: Tensor) -> None:
        for part in self.codes:
            rows = part.flatten(0, 1)
            rows.index_copy_(0, target, rows.index_select(0, source))

    def zero(self, rows: Tensor) -> None:
        for part in self.codes:
            part.flatten(0, 1).index_fill_(0, rows, 0)

    def wipe(self, blocks: Tensor) -> None:
        for part in self.codes:
            part.index_fill_(0, blocks, 0)


def coded(form: CacheForm, which: str, shape: Sequence[int], device: torch.device) -> Coded:
    """Memory for keys ("k") or values ("v") in a form; shape (L, G, N, P, E)."""
    return (CodedByLayer if isinstance(form, FittedForm) else Coded)(form, which, shape, device)  # type: ignore[arg-type]
