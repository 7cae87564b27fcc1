"""What holds for every linear form: shape, bias, state, dtype. Methods need not look in here.

Shapes: see `modicum.model.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modicum.core.choice import Choice
from modicum.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """What a form is made from: the layer it replaces, without its values."""

    in_features: int
    out_features: int
    bias: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None, device: str | None = None) -> LinearShape:
        return cls(
            in_features=weight_OI.shape[1],
            out_features=weight_OI.shape[0],
            bias=bias_O is not None,
            dtype=weight_OI.dtype,
            device=device or weight_OI.device,
        )


@dataclass(frozen=True)
class Products:
    """A forward pass that is x W^T, or x W^T + scale (x A^T) B^T, and nothing else."""

    weight_OI: Tensor
    down_RI: Tensor | None = None
    up_OR: Tensor | None = None
    scale: float = 1.0

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight_OI, self.down_RI, self.up_OR) if t is not None]


class LinearModule(nn.Module):
    """A linear layer that is not yet any: its shape and its bias."""

    #: Names of buffers whose dtype is part of the format: `model.to(dtype)` moves them, never rounds them.
    stored: ClassVar[frozenset[str]] = frozenset()

    choice: Choice | None = None  # set by `model.attach`: what `form_state.describe` records
    transposed: bool = False  # set by `model.attach`: stands where a transformers Conv1D stood
    bias: nn.Parameter | None
    _like: Tensor

    def __init__(self, config: Any, shape: LinearShape, *, bias: bool | None = None):
        super().__init__()
        self.config, self.shape = config, shape
        wanted = shape.bias if bias is None else bias
        self.bias = nn.Parameter(self._empty(shape.out_features), requires_grad=False) if wanted else None
        # Follows the module's dtype and device through `.to()`, also where no floating weight is left.
        self.register_buffer("_like", self._empty(0), persistent=False)

    def _empty(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a parameter or buffer, in the layer's dtype unless another is given."""
        return torch.empty(*sizes, dtype=dtype or self.shape.dtype, device=self.shape.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    def bias_value(self) -> Tensor | None:
        """The layer's bias, wherever it is kept."""
        return self.bias

    def products(self) -> Products | None:
        """The forward pass as matrix products that may be computed together with others'; None if it is more."""
        return None

    def nbytes(self) -> int:
        """Bytes of the state as stored, a base included; a tensor shared within the form counts once."""
        return sum(tensor.nbytes for tensor in unique_tensors(self).values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in self.stored}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.choice or type(self).__name__}, in={self.in_features}, out={self.out_features}"


def check_rank(method: str, rank: int, shape: LinearShape) -> None:
    """Raises `UserError` where a low-rank factor would be larger than the matrix."""
    small = min(shape.in_features, shape.out_features)
    if rank > small:
        raise UserError(
            f"{method}: rank={rank} is larger than the matrix {shape.out_features} x "
            f"{shape.in_features}; give rank <= {small}"
        )


def unique_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The module's persistent state by name, each tensor once under the first of its names."""
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(prefix=prefix, keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            buffers[name] = tensor.detach()
    return buffers
