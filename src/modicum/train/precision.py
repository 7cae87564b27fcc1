"""bf16 weights that follow float32 masters.

The model computes forward and backward in bf16 (on two CPU cores with AVX512-BF16 about twice as fast as
float32, and slightly faster than autocast, which casts every weight in every pass). A bf16 weight has 8
bits of mantissa, so small updates would be lost: the optimizer works on float32 copies instead, and
gradients of several micro-batches are summed in float32 (Micikevicius et al. 2018, arXiv:1710.03740,
section 3.1). Each bf16 gradient is added to its master's and freed as soon as autograd has made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn


class Masters:
    """float32 copies of the trainable parameters; `named` is what the optimizer gets."""

    def __init__(self, trainable: Mapping[str, nn.Parameter]):
        self.low = dict(trainable)
        self.named = {name: nn.Parameter(p.detach().float().clone()) for name, p in trainable.items()}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._collector(self.named[name])) for name, p in trainable.items()
        ]

    @staticmethod
    def _collector(master: nn.Parameter) -> Callable[[Tensor], None]:
        def collect(low: Tensor) -> None:
            assert low.grad is not None
            if master.grad is None:
                master.grad = low.grad.float()
            else:
                master.grad.add_(low.grad)
            low.grad = None

        return collect

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model."""
        torch._foreach_copy_(list(self.low.values()), list(self.named.values()))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the model's parameters are the masters themselves, so that changes to them last."""
        low = {name: p.data for name, p in self.low.items()}
        for name, p in self.low.items():
            p.data = self.named[name].data
        try:
            yield
        finally:
            for name, p in self.low.items():
                p.data = low[name]
            self.write_back()

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
