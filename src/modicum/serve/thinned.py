"""Attention over sequences whose heads keep entries of their own choice (see `serve.kv`).

Shapes as in `serve.attend`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.model.attend import attention
from modicum.serve.pages import Storage
from modicum.serve.work import Work, by_policy


class Thinned:
    """Single tokens of sequences whose heads hold entries of their own choice; neighbours in the step's row.

    Either all of them attend by one and the same policy object, or none does by its policy.
    """

    def __init__(self, works: Sequence[Work], storage: Storage):
        self.storage = storage
        self.policy = works[0].sample.policy if by_policy(works[0]) else None
        self.first, self.last = works[0].at, works[-1].at + 1
        pages = [w.sample.pages for w in works if w.sample.pages is not None]
        width = max(p.table_LGN.shape[2] for p in pages)
        table_LGBN = torch.zeros((storage.layers, storage.heads, len(pages), width), dtype=torch.int64)
        for b, p in enumerate(pages):
            table_LGBN[:, :, b, : p.table_LGN.shape[2]] = p.table_LGN
        self._table_LGBN = table_LGBN.to(storage.device)
        self._count_LGB = torch.stack([p.count_LG + 1 for p in pages], dim=2).to(storage.device)
        self._position_B = torch.tensor([w.start for w in works], device=storage.device)

    def __call__(self, layer: int, q_GRBE: Tensor, window: int | None, scale: float, softcap: float | None) -> Tensor:
        """Returns out_BGRE."""
        table_GBN = self._table_LGBN[layer]
        k_GBSE, v_GBSE = (
            x.flatten(0, 2)[table_GBN].flatten(2, 3) for x in (self.storage.k_LGNPE, self.storage.v_LGNPE)
        )
        k_GBSE, v_GBSE = k_GBSE.to(q_GRBE.dtype), v_GBSE.to(q_GRBE.dtype)
        place_S = torch.arange(k_GBSE.shape[2], device=q_GRBE.device)
        seen_GBS = place_S < self._count_LGB[layer][:, :, None]
        if self.policy is not None:
            position_GBS = self.storage.position_AP[table_GBN].flatten(2)
            out_GBRTE = self.policy.attend(
                layer,
                q_GRBE.transpose(1, 2)[:, :, :, None],
                k_GBSE,
                v_GBSE,
                self._position_B[:, None],
                position_GBS,
                seen_GBS,
                scale=scale,
                softcap=softcap,
            )
            return out_GBRTE[:, :, :, 0].transpose(0, 1)
        if window is not None:
            seen_GBS &= self.storage.position_AP[table_GBN].flatten(2) > self._position_B[:, None] - window
        mask = _weighted(self.storage, table_GBN, seen_GBS, q_GRBE.dtype)[:, :, None]
        out_GBRE = attention(q_GRBE.transpose(1, 2), k_GBSE, v_GBSE, scale=scale, softcap=softcap, mask=mask)
        return out_GBRE.transpose(0, 1)


def _weighted(storage: Storage, table_XN: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask `seen` (..., S), with log(n) for entries that stand for n tokens."""
    if storage.weight_AP is None:
        return seen
    bias_XS = storage.weight_AP[table_XN].flatten(-2).log().to(dtype)
    return torch.where(seen, bias_XS if seen.dim() == bias_XS.dim() else bias_XS.unsqueeze(-2), float("-inf"))


def piece_of_pages(
    storage: Storage, layer: int, w: Work, window: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values (G, S, E) and mask (G, 1, T, S) for several tokens of a thinned sequence."""
    k_GSE, v_GSE, position_GS, held_GS = entries_of_piece(storage, layer, w)
    query_T1 = torch.arange(w.start, w.start + w.n, device=storage.device)[:, None]
    seen_GTS = held_GS[:, None] & (position_GS[:, None] <= query_T1)
    if window is not None:
        seen_GTS &= position_GS[:, None] > query_T1 - window
    assert w.sample.pages is not None
    table_GN = w.sample.pages.table_LGN[layer].to(storage.device)
    return k_GSE, v_GSE, _weighted(storage, table_GN, seen_GTS, dtype)[:, None]


def entries_of_piece(storage: Storage, layer: int, w: Work) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values (G, S, E), places and whether held (G, S) of a thinned sequence, this step's tokens included."""
    pages = w.sample.pages
    assert pages is not None
    table_GN = pages.table_LGN[layer].to(storage.device)
    k_GSE, v_GSE = (x.flatten(0, 2)[table_GN].flatten(1, 2) for x in (storage.k_LGNPE, storage.v_LGNPE))
    position_GS = storage.position_AP[table_GN].flatten(1)
    count_G1 = (pages.count_LG[layer] + w.n).to(storage.device)[:, None]
    held_GS = torch.arange(position_GS.shape[1], device=storage.device) < count_G1
    return k_GSE, v_GSE, position_GS, held_GS
