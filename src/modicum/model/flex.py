"""Attention patterns through FlexAttention: one fused kernel that visits only the blocks a pattern allows.

Shapes as in `model.attend`. The kernel is compiled for the pattern at its first use (seconds), for CUDA by Triton
and for the CPU by a C++ compiler; `attend.pattern_attend` takes it where it is the faster way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from modicum.model.attention import ALL, SOME, AttentionPattern
from modicum.model.attention.sliding import Config as SlidingConfig
from modicum.model.attention.sliding import Sliding


@functools.cache
def _kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


class FlexAttend:
    """An `attend` for the decoder that sees what `pattern` allows, and of that what each layer's window leaves.

    One sequence per row, no padding. `compiled=False` computes the same without a kernel, slowly.
    """

    def __init__(self, pattern: AttentionPattern, size: int = 128, *, compiled: bool = True):
        self.pattern, self.size, self.compiled = pattern, size, compiled
        self._masks: dict[tuple[int, int, int | None], Any] = {}

    def __call__(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BGSE: Tensor,
        v_BGSE: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        pattern: AttentionPattern | None = None,
    ) -> Tensor:
        if pattern is not None:
            raise ValueError("attends under a pattern of its own, and the layer has another")
        T, S = q_BHTE.shape[2], k_BGSE.shape[2]
        window = None if window is None or window >= S else window
        if (T, S, window) not in self._masks:
            self._masks[T, S, window] = self.block_mask(T, S, window, q_BHTE.device)

        cap = softcap or 1.0

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

        out: Tensor = _kernel(self.compiled)(
            q_BHTE,
            k_BGSE,
            v_BGSE,
            score_mod=None if softcap is None else capped,
            block_mask=self._masks[T, S, window],
            scale=scale,
            enable_gqa=q_BHTE.shape[1] != k_BGSE.shape[1],
        )
        return out

    def block_mask(self, T: int, S: int, window: int | None, device: torch.device) -> Any:
        """The pattern's blocks as FlexAttention's BlockMask: whole blocks are not masked elementwise."""
        from torch.nn.attention.flex_attention import BlockMask

        patterns = [self.pattern] + ([] if window is None else [Sliding(SlidingConfig(window=window))])
        kinds = torch.stack([p.blocks(T, S, self.size) for p in patterns]).amin(0)
        some, every = (_listed(kinds == kind, device) for kind in (SOME, ALL))

        def allowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = patterns[0].allowed(q + (S - T), k)
            for p in patterns[1:]:
                seen = seen & p.allowed(q + (S - T), k)
            return seen

        return BlockMask.from_kv_blocks(*some, *every, BLOCK_SIZE=self.size, mask_mod=allowed, seq_lengths=(T, S))


def _listed(chosen_QK: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(how many (1, 1, Q), which first (1, 1, Q, K)) blocks of keys each row of blocks reads."""
    order = torch.argsort(chosen_QK.to(torch.int32), dim=1, descending=True, stable=True).to(torch.int32)
    return chosen_QK.sum(1, dtype=torch.int32)[None, None].to(device), order[None, None].contiguous().to(device)
