"""Who sees whom, and how it is computed: the `attend` that a decoder's layers call after RoPE.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads (G divides H), E head_dim.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.model import fused
from modicum.model.attention import ALL, AttentionPattern
from modicum.model.attention.causal import Causal
from modicum.model.attention.causal import Config as CausalConfig
from modicum.model.attention.sliding import Config as SlidingConfig
from modicum.model.attention.sliding import Sliding
from modicum.model.tiled import tiled_attention


class Attend(Protocol):
    """Called once per layer with that layer's new queries, keys and values.

    `window`: keys a query sees, itself included (None: all); `scale` multiplies scores; `softcap` bounds them
    by softcap * tanh(score / softcap). `pattern`, given only by layers that have one, narrows what is seen. An attend
    that knows where a sequence goes on (a cache) also has
    `next_positions(tokens_BT) -> positions_BT`, which the decoder asks when it is given no positions.
    """

    def __call__(
        self,
        layer: int,
        q_BHTE: Tensor,
        k_BGSE: Tensor,
        v_BGSE: Tensor,
        /,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        pattern: AttentionPattern | None = None,
    ) -> Tensor:
        """Returns out_BHTE."""
        ...


def pattern_of(window: int | None) -> AttentionPattern:
    return Causal(CausalConfig()) if window is None else Sliding(SlidingConfig(window=window))


def attention(
    q_BHTE: Tensor,
    k_BGSE: Tensor,
    v_BGSE: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """softmax(softcap(q k^T * scale) + mask) v, by the fastest way this machine has.

    `mask` is bool (True: seen) or additive and broadcasts to BHTS. `causal`: queries are the last T positions
    and see no key after them; `window`: nor any before the last `window`. Given with a mask, these must be
    true of it already and merely allow work to be left out. Without a mask, causal needs S = T, and a window
    causal.
    """
    groups, T = q_BHTE.shape[1] // k_BGSE.shape[1], q_BHTE.shape[2]
    if T > 1 or softcap is not None:
        half = q_BHTE.dtype in (torch.bfloat16, torch.float16)
        narrow = window is not None and 2 * window < T
        if (
            softcap is not None
            or (window is not None and mask is None)
            or (
                q_BHTE.device.type == "cpu"
                and T > 1
                and (narrow or (half and not _fused_in_half(q_BHTE, k_BGSE, v_BGSE)))
            )
        ):
            return tiled_attention(
                q_BHTE, k_BGSE, v_BGSE, scale=scale, mask=mask, causal=causal, window=window, softcap=softcap
            )
    elif groups > 1 and (mask is None or mask.shape[1] == 1):
        # One query: the heads that share a key/value head become its queries, and nothing is copied.
        B, H, _, E = q_BHTE.shape
        out = F.scaled_dot_product_attention(
            q_BHTE.reshape(B, H // groups, groups, E), k_BGSE, v_BGSE, attn_mask=mask, scale=scale
        )
        return out.reshape(B, H, 1, E)
    return F.scaled_dot_product_attention(
        q_BHTE, k_BGSE, v_BGSE, attn_mask=mask, scale=scale, is_causal=causal and mask is None, enable_gqa=groups > 1
    )


FEW = 64  # queries up to which the library's fused kernel in bfloat16 is quicker on any CPU


def _fused_in_half(*qkv: Tensor) -> bool:
    """Whether the library's fused kernel for half precision on the CPU is to be taken.

    Its backward pass is slow. Forward it is 3 to 5.6 times as fast as `tiled` where the processor has AMX (128 to 2048
    tokens); without (Zen 4) it takes 1.2 to 1.4 times as long from 128 tokens on, and less up to 64.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
        return False
    return qkv[0].shape[2] <= FEW or _has_amx()


@functools.cache
def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def _readable(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: on the CPU, and no planner's stand-in without data."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor


class DenseAttend:
    """Causal attention within one call: the decoder's default, made once per forward.

    `documents_BT`: a query sees only keys with its own number (packed batches). `mask_BT`: True for real
    tokens (padding on any side). With neither of them and no window, the kernel's own causal path runs and no mask
    exists; otherwise one additive mask per window and pattern is built at its first use and shared by the layers. A
    pattern alone visits its own blocks only.
    """

    def __init__(self, documents_BT: Tensor | None = None, mask_BT: Tensor | None = None):
        # A mask costs kernels time, so one that says nothing is dropped (looking is free only on the CPU).
        if documents_BT is not None and _readable(documents_BT):
            documents_BT = None if (documents_BT == documents_BT[:, :1]).all() else documents_BT
        if mask_BT is not None and _readable(mask_BT) and mask_BT.all():
            mask_BT = None
        self.documents_BT, self.mask_BT = documents_BT, mask_BT
        self._masks: dict[tuple[int | None, AttentionPattern | None], Tensor | None] = {}
        self._blocks: dict[AttentionPattern, Attend] = {}
        self._first: dict[int | None, Tensor | None] = {}

    def first_keys(self, T: int, window: int | None) -> Tensor | None:
        """The first key that each query sees of those up to itself (`fused.first_keys`); None if that is not all."""
        if self.mask_BT is not None:
            return None
        if window not in self._first:
            self._first[window] = fused.first_keys(T, window, self.documents_BT)
        return self._first[window]

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
        T = q_BHTE.shape[2]
        window = None if window is None or window >= T else window
        if pattern is None and softcap is None and fused.ready(q_BHTE) and q_BHTE.shape[2] == k_BGSE.shape[2]:
            first_BT = self.first_keys(T, window)
            if first_BT is not None:
                return fused.attend(q_BHTE, k_BGSE, v_BGSE, first_BT, scale)
        if pattern is not None and self.documents_BT is None and self.mask_BT is None:
            if pattern not in self._blocks:
                self._blocks[pattern] = pattern_attend(pattern, q_BHTE.device)
            attend = self._blocks[pattern]
            return attend(layer, q_BHTE, k_BGSE, v_BGSE, window=window, scale=scale, softcap=softcap)
        if (window, pattern) not in self._masks:
            self._masks[window, pattern] = self._mask(T, window, pattern, q_BHTE)
        mask = self._masks[window, pattern]
        return attention(q_BHTE, k_BGSE, v_BGSE, scale=scale, softcap=softcap, mask=mask, causal=True, window=window)

    def _mask(self, T: int, window: int | None, pattern: AttentionPattern | None, like: Tensor) -> Tensor | None:
        """Additive, B1TT or 11TT in the queries' dtype; None when plain causal attention says it all."""
        if self.documents_BT is None and self.mask_BT is None and window is None:
            return None
        row = torch.arange(T, device=like.device)
        position = row[None] if pattern is None else default_positions(row[None], self.documents_BT, self.mask_BT)
        seen = pattern_of(window).allowed(row[:, None], row[None, :])[None]
        if pattern is not None:  # it counts from the start of each document
            seen = seen & pattern.allowed(position[:, :, None], position[:, None, :])
        if self.documents_BT is not None:
            seen = seen & (self.documents_BT[:, :, None] == self.documents_BT[:, None, :])
        if self.mask_BT is not None:
            # A padded query sees itself, so that its softmax is defined; nobody reads the outcome.
            seen = (seen & self.mask_BT.bool()[:, None, :]) | (row[:, None] == row[None, :])
        additive = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        return additive.masked_fill_(~seen, float("-inf"))[:, None]


def default_positions(tokens_BT: Tensor, documents_BT: Tensor | None = None, mask_BT: Tensor | None = None) -> Tensor:
    """Positions from 0 (1T or BT): restarting with each document, and not counting padding."""
    T = tokens_BT.shape[1]
    index_1T = torch.arange(T, device=tokens_BT.device)[None]
    if documents_BT is not None:
        starts = torch.ones_like(documents_BT, dtype=torch.bool)
        starts[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        return index_1T - torch.where(starts, index_1T, 0).cummax(dim=1).values
    if mask_BT is not None:
        return (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
    return index_1T


def pattern_attend(pattern: AttentionPattern, device: torch.device | str, size: int = 128) -> Attend:
    """The faster way to attend under `pattern`: FlexAttention on CUDA, blocks of scaled dot products elsewhere.

    On a CPU the compiled kernel took 1.9 to 3 times as long for the causal and the sliding pattern (2,048 tokens,
    8 heads, one thread), 0.8 times for the lambda pattern, and 10 to 50 seconds to compile.
    """
    if torch.device(device).type == "cuda":
        from modicum.model.flex import FlexAttend

        return FlexAttend(pattern, size)
    return BlockAttend(pattern, size)


class BlockAttend:
    """Attention under a pattern that never touches the blocks of which it allows nothing.

    For each row of `size` queries only the key blocks that the pattern's block mask names are gathered, so
    time and memory follow the pattern: O(T * window) for a sliding one. One sequence per row, no padding.
    """

    def __init__(self, pattern: AttentionPattern, size: int = 128):
        self.pattern, self.size = pattern, size
        self._plans: dict[tuple[int, int, int | None], list[tuple[Tensor | slice, Tensor | None]]] = {}

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
        if (T, S, window) not in self._plans:
            self._plans[T, S, window] = self._plan(T, S, window, q_BHTE.device)
        outs = []
        for row, (keys, mask) in enumerate(self._plans[T, S, window]):
            q = q_BHTE[:, :, row * self.size : (row + 1) * self.size]
            outs.append(attention(q, k_BGSE[:, :, keys], v_BGSE[:, :, keys], scale=scale, softcap=softcap, mask=mask))
        return torch.cat(outs, dim=2)

    def _plan(
        self, T: int, S: int, window: int | None, device: torch.device
    ) -> list[tuple[Tensor | slice, Tensor | None]]:
        """Per row of blocks: which keys, and the mask among them (None if all are seen)."""
        blocks = self.pattern.blocks(T, S, self.size)
        layer_pattern = pattern_of(window)
        if window is not None:
            blocks = torch.minimum(blocks, layer_pattern.blocks(T, S, self.size))
        plan: list[tuple[Tensor | slice, Tensor | None]] = []
        position = torch.arange(S, device=device)
        for row, kinds in enumerate(blocks):
            wanted = kinds.nonzero()[:, 0]
            first, last = int(wanted[0]), int(wanted[-1])
            keys: Tensor | slice = slice(first * self.size, (last + 1) * self.size)
            if last - first + 1 != len(wanted):
                offsets = wanted.to(device)[:, None] * self.size + torch.arange(self.size, device=device)
                keys = offsets.flatten()[offsets.flatten() < S]
            if bool((kinds[wanted] == ALL).all()):
                plan.append((keys, None))
                continue
            q_pos = position[S - T + row * self.size : S - T + min((row + 1) * self.size, T), None]
            seen = self.pattern.allowed(q_pos, position[keys]) & layer_pattern.allowed(q_pos, position[keys])
            plan.append((keys, seen[None, None]))
        return plan
