"""Backend flex: chunks of prompts through PyTorch's FlexAttention, which needs no mask and skips unseen blocks.

A chunk that follows cached tokens, or lies in layers with windows, sees keys that no simple causal kernel describes.
The backend `torch` gives such a chunk a mask of all its queries and keys, with which fused kernels do without their
fastest way, and which grows with the context. FlexAttention computes who sees whom inside of one kernel. All other
rows of a step go the way that `torch` has for them.

The kernel is compiled at its first use, by Triton on a GPU, by a C++ compiler on the CPU. It is off unless
MODICUM_FLEX=1 (or `eager`: the same equations uncompiled, slow, for tests): its speed has not been measured on a GPU.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from modicum.core.errors import UserError
from modicum.model.attend import Attend, pattern_of
from modicum.model.attention import AttentionPattern
from modicum.model.decoder import Decoder
from modicum.model.flex import FlexAttend
from modicum.serve.backends import CannotRun
from modicum.serve.backends.planned import PlannedAttend
from modicum.serve.backends.torch import Torch
from modicum.serve.plan import BLOCKS, FRESH, AttentionPlan, Segment
from modicum.serve.uneven import attend_for

log = logging.getLogger("modicum.serve")


def wanted() -> str | None:
    """What MODICUM_FLEX asks for: None, "compiled" or "eager"."""
    given = os.environ.get("MODICUM_FLEX", "").lower()
    if given not in ("", "0", "1", "eager"):
        raise UserError(f"MODICUM_FLEX={given} is not known; write 1, eager or 0")
    return {"1": "compiled", "eager": "eager"}.get(given)


@functools.cache
def _kernel(compiled: bool) -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


class Flex(Torch):
    """For steps with a chunk that FlexAttention is for."""

    def __init__(self, model: Decoder, compiled: bool = True):
        super().__init__(model)
        self.name = "flex" if compiled else "flex, eager"
        self.compiled, self.failed = compiled, ""
        self._windows = [layer.window for layer in model.config.per_layer]

    def cannot(self, plan: AttentionPlan) -> str | None:
        if self.failed:
            return self.failed
        if plan.watched:  # it would see a step twice that fails on the way
            return "a policy that looks at the step"
        if plan.recent is not None:
            return "a cache that codes tokens by the block"
        if any(layer.attention for layer in self.model.config.per_layer) or self.model.config.source_layer is not None:
            return "layers of another kind"
        if not any(fits(segment, window) for segment in plan.segments for window in self._windows):
            return "no chunk behind cached tokens or in a window"
        return None

    def attend(self, plan: AttentionPlan) -> Attend:
        return attend_for(FlexPlanned(plan, self.compiled), self.model.config)

    def __call__(self, plan: AttentionPlan, rows: Sequence[int]) -> Tensor | None:
        try:
            return super().__call__(plan, rows)
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            self.failed = f"FlexAttention failed ({lines[0]})"
            log.warning("%s; prompts go on without it", self.failed)
            raise CannotRun(self.failed) from error


def fits(segment: Segment, window: int | None) -> bool:
    """Whether a segment's rows are one chunk that a causal kernel does not describe."""
    if segment.rows == 1 or segment.tree or segment.policy is not None or len(segment.works) > 1:
        return False
    return segment.source == BLOCKS or (segment.source == FRESH and window is not None)


class FlexPlanned(PlannedAttend):
    """The last T of S positions are a chunk's queries: the blocks of keys follow from T, S and the window."""

    def __init__(self, plan: AttentionPlan, compiled: bool):
        super().__init__(plan)
        self.kernel = _kernel(compiled)
        self._causal, self._block_masks = FlexAttend(pattern_of(None)), dict[tuple[int, int, int | None], Any]()

    def _unmasked(self, segment: Segment, window: int | None, pattern: AttentionPattern | None) -> bool:
        return fits(segment, window) or super()._unmasked(segment, window, pattern)

    def _mix(
        self,
        segment: Segment,
        q_GBRTE: Tensor,
        k_GBSE: Tensor,
        v_GBSE: Tensor,
        mask: Tensor | None,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        (G, _, R, T, _), S = q_GBRTE.shape, k_GBSE.shape[2]
        window = None if window is None or window >= S else window
        if not fits(segment, window):
            how = {"window": window, "scale": scale, "softcap": softcap}
            return super()._mix(segment, q_GBRTE, k_GBSE, v_GBSE, mask, **how)  # type: ignore[arg-type]
        key = (T, S, window)
        if key not in self._block_masks:
            self._block_masks[key] = self._causal.block_mask(T, S, window, q_GBRTE.device)
        cap = softcap or 1.0

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            return cap * (score / cap).tanh()

        out_1HTE: Tensor = self.kernel(
            q_GBRTE[:, 0].flatten(0, 1)[None],
            k_GBSE.transpose(0, 1),
            v_GBSE.transpose(0, 1),
            score_mod=None if softcap is None else capped,
            block_mask=self._block_masks[key],
            scale=scale,
            enable_gqa=R > 1,
        )
        return out_1HTE[0].unflatten(0, (G, R))[:, None]
