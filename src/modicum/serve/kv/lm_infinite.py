"""lm-infinite: the first entries and a window of the latest ones, no distance beyond what was trained.

The attention mask has the shape of a lambda: every query sees the first `sinks` tokens and the latest `window`
ones, so that it never attends over more tokens than in training; and the distance to the first tokens stops
growing at a ceiling, so that rotary angles stay within what was trained. The cache is of constant size and a
stream may be of any length; entries of a prompt are evicted while it is computed.

    seen(q, k)     = k <= q  and  (q - k < window  or  k < sinks)
    distance(q, k) = min(q - k, ceiling)

Han et al. 2023, arXiv:2308.16137, sections 3.1 and 3.2. Departs: the paper's third device, attending to the
top k of the forgotten middle, needs the whole cache and is left out. Keys stay rotated as they were; the few
whose distance is capped are turned on when read (one query), or met by a second copy of the queries (several).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.model.attend import attention
from modicum.model.rope import rotate
from modicum.serve.kv import Entries, Keep, KVPolicy

if TYPE_CHECKING:
    from modicum.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Config:
    sinks: int = 10  # first entries that stay (the paper: 10 to 100)
    window: int | None = None  # latest entries that stay; None: the model's context length
    ceiling: int | None = None  # largest distance; None: the window

    def __post_init__(self) -> None:
        for name, low in (("sinks", 0), ("window", 1), ("ceiling", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"lm-infinite: {name}={value} must be at least {low}")
        if self.ceiling is not None and self.window is not None and self.ceiling < self.window - 1:
            raise UserError(
                f"lm-infinite: ceiling={self.ceiling} must be at least window - 1 = {self.window - 1}: within the "
                "window distances are true"
            )


TOY = Config(sinks=2, window=10)
CLAIM = {
    "figure": "fluent to 32K tokens, decoding 2.72 times as fast",
    "where": "abstract",
    "scale": "models with relative positions trained on 2K to 4K tokens",
}
SWEEP = {"window": (76,)}


class LMInfinite(KVPolicy):
    config: Config
    conflicts = frozenset({"sliding_window"})
    attends = True
    unbounded = True
    window: int  # known once the model is
    ceiling: int  # place that a query beyond it is turned to, to meet early keys at theirs
    angles: list[Tensor | None]  # per layer, R/2 rotary angles per step

    def prepare(self, model: Decoder, probe: Sequence[int] = ()) -> None:
        self.window = self.config.window or model.config.context_length
        self.ceiling = self.config.ceiling or self.window
        if self.ceiling < self.window - 1:
            raise UserError(
                f"lm-infinite: ceiling={self.ceiling} is within the window of {self.window}; give window= as well"
            )
        self.exact = min(self.config.sinks + self.window, self.ceiling + 1)
        self.look_at(model)

    def look_at(self, model: Decoder) -> None:
        """Keep what `attend` needs of the model."""
        self.angles = [None if table is None else table.angles for table in model.rope_tables()]
        self.pattern = registry.build("attention", f"lambda:window={self.window},sinks={self.config.sinks}")

    def early(self, position_GBF: Tensor) -> Tensor:
        """Places of the early keys, as queries beyond the ceiling see them."""
        return torch.zeros_like(position_GBF)

    def begin(self, prompt: int) -> KVPolicy:
        return self  # nothing is known of a sequence: all are attended together

    def allow(self, layer: int, n_tokens: int) -> int:
        return min(n_tokens, self.config.sinks + self.window)

    def keep(self, layer: int, entries: Entries) -> Keep:
        sinks, window = self.config.sinks, self.window
        heads = []
        for n in entries.counts:
            index = torch.arange(n)
            heads.append(index if n <= sinks + window else torch.cat([index[:sinks], index[n - window :]]))
        return Keep(heads)

    def attend(
        self,
        layer: int,
        q_GBRTE: Tensor,
        k_GBSE: Tensor,
        v_GBSE: Tensor,
        at_BT: Tensor,
        position_GBS: Tensor,
        kept_GBS: Tensor,
        *,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        G, B, R, T, E = q_GBRTE.shape
        at_BT1, sinks, angles = at_BT[:, :, None], self.config.sinks, self.angles[layer]
        seen_GBTS = kept_GBS[:, :, None] & self.pattern.allowed(at_BT1, position_GBS[:, :, None])
        first_GBF = position_GBS[:, :, :sinks]
        turn_GBF = self.early(first_GBF) - first_GBF
        beyond_GBTF = at_BT1 + turn_GBF[:, :, None] - self.ceiling  # how much too far
        if angles is not None and T == 1:
            cos, sin = _turn(beyond_GBTF[:, :, 0].clamp(min=0), angles, k_GBSE.dtype)
            k_GBSE = torch.cat([rotate(k_GBSE[:, :, :sinks], cos, sin), k_GBSE[:, :, sinks:]], dim=2)
        elif angles is not None and bool((beyond_GBTF > 0).any()):
            # A key's angle depends on its query here. So each early key stands there twice, as it is and turned
            # to its early place, where it meets queries turned to the ceiling; a mask chooses. The two kinds of
            # queries lie side by side in 2E dimensions, of which every key fills one half.
            turned_GBFE = rotate(k_GBSE[:, :, :sinks], *_turn(turn_GBF, angles, k_GBSE.dtype))
            ceiling_GBRTE = rotate(q_GBRTE, *(x[:, None] for x in _turn(self.ceiling - at_BT, angles, q_GBRTE.dtype)))
            q_GBRTE = torch.cat([q_GBRTE, ceiling_GBRTE], dim=-1)
            none_GBFE, none_GBSE = torch.zeros_like(turned_GBFE), torch.zeros_like(k_GBSE)
            k_GBSE = torch.cat([torch.cat([none_GBFE, turned_GBFE], -1), torch.cat([k_GBSE, none_GBSE], -1)], dim=2)
            v_GBSE = torch.cat([v_GBSE[:, :, :sinks], v_GBSE], dim=2)
            v_GBSE = torch.cat([v_GBSE, torch.zeros_like(v_GBSE)], dim=-1)
            far_GBTF, early_GBTF = beyond_GBTF > 0, seen_GBTS[..., :sinks]
            seen_GBTS = torch.cat([early_GBTF & far_GBTF, early_GBTF & ~far_GBTF, seen_GBTS[..., sinks:]], dim=-1)
        S = k_GBSE.shape[2]
        out = attention(
            q_GBRTE.flatten(0, 1),
            k_GBSE.flatten(0, 1)[:, None].expand(-1, R, -1, -1),
            v_GBSE.flatten(0, 1)[:, None].expand(-1, R, -1, -1),
            scale=scale,
            softcap=softcap,
            mask=seen_GBTS.expand(G, B, T, S).flatten(0, 1)[:, None],
        )
        return out[..., :E].unflatten(0, (G, B))


def _turn(steps: Tensor, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., R/2) for turning on by `steps` places; the lengths that a table may scale are left alone."""
    turned = steps[..., None].float() * angles.to(steps.device)
    return turned.cos().to(dtype), turned.sin().to(dtype)
