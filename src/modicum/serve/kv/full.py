"""full: keep every key and value.

The exact cache: attention at step t reads all t entries of every layer and head.

    kept[l, g] = {0, ..., t - 1}      bytes = 2 * layers * kv_heads * head_dim * bytes(dtype) * t

Paged as in Kwon et al. 2023, arXiv:2309.06180. No departures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modicum.serve.kv import Entries, Keep, KVPolicy


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Full(KVPolicy):
    config: Config
    provides = frozenset({"attention_pattern", "uneven_layers"})
    drops = False

    def allow(self, layer: int, n_tokens: int) -> int:
        return n_tokens

    def keep(self, layer: int, entries: Entries) -> Keep:
        return Keep([torch.arange(n) for n in entries.counts])
