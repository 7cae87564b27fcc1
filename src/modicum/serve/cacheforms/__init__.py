"""port cacheform: how the entries of the cache are stored, in how many bits.

A form turns keys and values into tensors of codes and back; the cache holds these. One that codes each layer in its own
way, or is fitted on calibration data, derives from `_fitted.FittedForm`. Shapes: `...` any leading dimensions (layers,
heads, blocks), P entries of a block, E head dimension.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from modicum.core.registry import Method
from modicum.model.config import DecoderConfig

BASELINE = "plain"


class CacheForm(Method):
    """Base of the methods, constructed once per engine as `cls(config, head_dim, dtype)`; `dtype` is what comes back.

    The tensors of codes keep the leading dimensions; all zeros must decode to zeros. `rowwise`: each entry is coded by
    itself, so codes have a dimension P and `encode` may be given any number of entries. A form that codes a block's
    entries together sets it to False and a `residual`: each sequence's latest tokens, at least so many, are kept as
    they are, and blocks are coded when they have left them. `native`: the layout by which the kernels for the CPU read
    the codes; None: they do not.
    """

    rowwise: ClassVar[bool] = True
    native: ClassVar[str | None] = None
    residual: int = 0

    def __init__(self, config: Any, head_dim: int, dtype: torch.dtype):
        self.config, self.head_dim, self.dtype = config, head_dim, dtype

    def begin(self, shape: DecoderConfig) -> None:
        """Before the first entry: what depends on the model. Raises `UserError` for one that it does not fit."""

    def encode(self, which: str, x_PE: Tensor) -> tuple[Tensor, ...]:
        """Codes of keys (`which` is "k") or values ("v"), given as (..., P, E)."""
        raise NotImplementedError

    def decode(self, which: str, codes: tuple[Tensor, ...]) -> Tensor:
        """(..., P, E) in `dtype`."""
        raise NotImplementedError

    def bytes_of_layers(self, layers: int, heads: int, block_size: int) -> int:
        """Bytes of one block in all layers and KV heads."""
        return layers * heads * self.block_bytes(block_size)

    def block_bytes(self, block_size: int) -> int:
        """Bytes of the keys and values of one block in one layer and head."""
        x_PE = torch.zeros(block_size, self.head_dim, dtype=self.dtype)
        return sum(codes.nbytes for which in "kv" for codes in self.encode(which, x_PE))
