"""Adapters: a trained update on a frozen base form, which keeps the weight.

Shapes: R rank; otherwise see `modicum.model.linear`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.budget.cost import Cost
from modicum.core import registry
from modicum.model.linear import LinearForm, LinearShape


class Adapter(LinearForm):
    """Made as `cls(config, shape, base)`; provides `adapter`. `take` makes it start as a no-op.

    One that is s B A on top of its base says so in `low_rank`: it then merges, and is written in PEFT's LoRA format.
    """

    base: LinearForm

    def __init__(self, config: Any, shape: LinearShape, base: LinearForm):
        super().__init__(config, shape, bias=False)
        self.base = base

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """(A_RI, B_OR, s) if `dense()` is that of the base plus s B A."""
        return None

    def settled(self) -> Adapter:
        """What to keep once training is over: this adapter, or one on the same base that computes the same with less
        (without ranks that were reserved, ...)."""
        return self

    def dense(self) -> Tensor:
        a_RI, b_OR, scaling = self._low_rank()
        weight = self.base.dense()
        return weight + (scaling * (b_OR @ a_RI)).to(weight.dtype)

    def rows(self, index: Tensor) -> Tensor:
        a_RI, b_OR, scaling = self._low_rank()
        rows = self.base.rows(index)
        return rows + (scaling * F.embedding(index, b_OR) @ a_RI).to(rows.dtype)

    def _low_rank(self) -> tuple[Tensor, Tensor, float]:
        factors = self.low_rank()
        if factors is None:
            raise NotImplementedError(
                f"{type(self).__name__} is no low-rank update: it gives `dense` and `rows` itself"
            )
        return factors

    def bias_value(self) -> Tensor | None:
        return self.base.bias_value()

    @classmethod
    def cost(cls, config: Any, shape: LinearShape | tuple[int, int], tokens: float = 0) -> Cost:
        if isinstance(shape, tuple):
            shape = LinearShape(out_features=shape[0], in_features=shape[1], dtype=torch.bfloat16)
        shape = dataclasses.replace(shape, device="meta")
        base: LinearForm = registry.build("linear", "dense", shape)
        form = cls(config, shape, base)
        trained = sum(p.numel() for p in form.trainable())
        own = form.nbytes() - base.nbytes()
        return Cost(tokens=tokens, parameters=trained, disk_bytes=own, flops=2.0 * tokens * trained)
