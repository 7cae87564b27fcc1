"""port linear: how one linear layer holds, computes and trains its weight.

A form stands where an `nn.Linear` stood: y_BTO = x_BTI @ W_OI.T + b_O, with W held in the method's own way. There
are three protocols: `LinearForm`; `_adapter.Adapter`, which sits on a frozen form; `_elastic.Elastic`, of which any
first part is a coarser weight. `model.attach` puts forms into a module by pattern and takes them out again.

Shapes: B batch, T time, I in_features, O out_features, N any number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modicum.budget.cost import Cost
from modicum.core.callback import Callback
from modicum.core.registry import Method
from modicum.model.linear._module import LinearModule, LinearShape, check_rank, unique_tensors

__all__ = ["BASELINE", "LinearForm", "LinearShape", "check_rank", "unique_tensors"]
BASELINE = "dense"


class LinearForm(Method, LinearModule):
    """Made empty as `cls(config, shape)`, then `fit` or loaded. All state lies in parameters and buffers that
    `__init__` allocates with `_empty`, from config and shape alone (`layout` aside).

    Capabilities (`core.compose`): `fit` takes over given weights; `trainable`; `merge` is linear in x, so that
    `dense` is the whole truth; `adapter_base` passes gradients on to x; `embedding` has cheap `rows`; `factors`
    trains NAME.A and NAME.B with W = B A (+ more). A form conflicts with `fsdp` unless it says otherwise.
    """

    conflicts: ClassVar[frozenset[str]] = frozenset({"fsdp"})
    target_modules: ClassVar[tuple[str, ...]] = ("*",)  # where its paper puts it: globs over module names
    fit_error: ClassVar[float | None] = 0.0  # largest ||dense() - W|| / ||W|| after `fit`; None: it starts afresh

    def forward(self, x: Tensor) -> Tensor:
        """x_BTI (any leading dimensions) to y_BTO in the dtype of x."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight_OI that `forward` multiplies with, in the module's dtype; without `merge`, an error."""
        raise NotImplementedError

    def take(self, weight_OI: Tensor, calibration_NI: Tensor | None, generator: torch.Generator | None) -> None:
        """Take over a weight. calibration_NI: sample inputs, if there are any; generator: source of randomness."""
        raise NotImplementedError

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that training changes; one that several forms share is listed by one of them."""
        return []

    def rows(self, index: Tensor) -> Tensor:
        """Rows of `dense()`: index (...) to (..., I)."""
        return self.dense()[index]

    def layout(self) -> dict[str, Any]:
        """JSON facts beyond config, shape and tensors that the form goes on from (a rank that has grown, ...)."""
        return {}

    def set_layout(self, layout: dict[str, Any]) -> None:
        """Take over a stored `layout`, allocating what it asks for, before tensors are loaded."""
        if layout:
            raise ValueError(f"{type(self).__name__} has no variable layout, got {layout}")

    @classmethod
    def after_attach(cls, model: nn.Module, forms: dict[str, LinearForm]) -> None:
        """Called with all forms of this class in `model`, by module name: share parameters, unfreeze norms."""

    @classmethod
    def callback(cls, forms: Mapping[str, LinearForm]) -> Callback | None:
        """What acts in the training loop for all forms of this class in a model, if anything does."""
        return None

    # for whoever uses a form ----------------------------------------------------------------------

    @torch.no_grad()
    def fit(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None = None,
        *,
        calibration_NI: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Take over a weight and a bias; an adapter, whose base holds them already, starts as a no-op."""
        self.take(weight_OI.detach(), calibration_NI, generator)
        if self.bias is not None:
            self.bias.copy_(bias_O if bias_O is not None else torch.zeros_like(self.bias))
        return self

    @classmethod
    def cost(cls, config: Any, shape: LinearShape | tuple[int, int], tokens: float = 0) -> Cost:
        """Forecast for one layer: trained parameters, stored bytes, forward FLOPs; of an adapter, its own.

        shape: a tuple is (out_features, in_features) in bfloat16.
        """
        if isinstance(shape, tuple):
            shape = LinearShape(out_features=shape[0], in_features=shape[1], dtype=torch.bfloat16)
        form = cls(config, dataclasses.replace(shape, device="meta"))
        trained = sum(p.numel() for p in form.trainable())
        flops = 2.0 * tokens * shape.in_features * shape.out_features
        return Cost(tokens=tokens, parameters=trained, disk_bytes=form.nbytes(), flops=flops)
