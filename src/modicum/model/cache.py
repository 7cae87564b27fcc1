"""Keys and values kept between calls, in one block of memory per layer.

Shapes: B batch, T new tokens, S kept tokens, G key/value heads, E head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.attend import attention, pattern_of
from modicum.model.attention import AttentionPattern
from modicum.model.config import DecoderConfig


class ContiguousCache:
    """An `Attend` for a batch whose rows grow together, up to `capacity` tokens.

    Pass it as `attend=` to every call with only the new tokens. Rows of unequal prompts are padded on the
    left: `padding_B` counts those tokens. The last layer of a call moves `length` on. Memory: 2 * B * kv_heads *
    capacity * head_dim values of each layer. Not for training.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        padding_B: Tensor | None = None,
    ):
        shapes = [(batch, layer.kv_heads, capacity, layer.head_dim) for layer in config.per_layer]
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.config, self.capacity, self.length = config, capacity, 0
        self.padding_B = None if padding_B is None or not bool(padding_B.any()) else padding_B.to(device)

    def next_positions(self, tokens_BT: Tensor) -> Tensor:
        """Positions of the tokens that come next, not counting padding."""
        index_1T = torch.arange(self.length, self.length + tokens_BT.shape[1], device=tokens_BT.device)[None]
        return index_1T if self.padding_B is None else (index_1T - self.padding_B[:, None]).clamp(min=0)

    def __call__(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BGTE: Tensor,
        v_BGTE: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        pattern: AttentionPattern | None = None,
    ) -> Tensor:
        T, start = q_BHTE.shape[2], self.length
        end = start + T
        if end > self.capacity:
            raise UserError(f"the cache holds {self.capacity} tokens and {end} are needed; make it with capacity={end}")
        self.k[layer][:, :, start:end] = k_BGTE
        self.v[layer][:, :, start:end] = v_BGTE
        first = 0 if window is None or pattern is not None or T > 1 else max(0, end - window)
        mask = self._mask(start, end, first, window, pattern, q_BHTE.device)
        causal = mask is None and T > 1
        out = attention(
            q_BHTE,
            self.k[layer][:, :, first:end],
            self.v[layer][:, :, first:end],
            scale=scale,
            softcap=softcap,
            mask=mask,
            causal=causal,
        )
        if layer == self.config.layers - 1:
            self.length = end
        return out

    def _mask(
        self,
        start: int,
        end: int,
        first: int,
        window: int | None,
        pattern: AttentionPattern | None,
        device: torch.device,
    ) -> Tensor | None:
        """Bool, B1TS or 11TS; None where every kept key is seen (one token) or causality says it all."""
        T = end - start
        window = None if window is None or window >= end else window
        if self.padding_B is None and pattern is None and (T == 1 or (start == 0 and window is None)):
            return None
        q_pos = torch.arange(start, end, device=device)[:, None]
        k_pos = torch.arange(first, end, device=device)[None]
        seen = pattern_of(window).allowed(q_pos, k_pos)[None]
        if pattern is not None:  # it counts from the start of the sequence
            padding = 0 if self.padding_B is None else self.padding_B[:, None, None]
            seen = seen & pattern.allowed((q_pos[None] - padding).clamp(min=0), (k_pos[None] - padding).clamp(min=0))
        if self.padding_B is not None:
            seen = (seen & (k_pos[None] >= self.padding_B[:, None, None])) | (q_pos == k_pos)
        return seen[:, None]
