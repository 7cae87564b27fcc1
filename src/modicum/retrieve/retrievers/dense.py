"""dense: any encoder's vectors in any index.

    score(q, d) = <e(q), e(d)>        e: a method of port encoder; nearest vectors by a method of port index

Karpukhin et al. 2020, arXiv:2004.04906. An encoder with statistics of the passages (`lsa`, `decoder`) takes them from
the first ones added; `build` a large part at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.retrieve.encoders import Encoder, load_encoder, make_encoder
from modicum.retrieve.indexes import Hits, Index, open_index
from modicum.retrieve.retrievers import Retriever


@dataclass(frozen=True, kw_only=True)
class Config:
    encoder: str = "lsa"  # KEY:knob=value or a model, as `modicum index --encoder` takes it
    index: str = "exact"  # KEY:knob=value of port index


SWEEP = ("encoder=lsa", "encoder=minilm")


class Dense(Retriever):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        from modicum.core.registry import build

        self.encoder: Encoder = make_encoder(config.encoder, device=device)
        self.index: Index = build("index", config.index)

    def _add(self, texts: list[str]) -> None:
        first = len(self.alive_N)
        if not first:
            self.encoder.count(texts)
            pooled_NE = self.encoder.pool(texts)
            self.encoder.fit([pooled_NE])
            vectors_ND = self.encoder.finish(pooled_NE)
        else:
            vectors_ND = self.encoder.encode(texts)
        self.index.add(np.arange(first, first + len(texts)), vectors_ND)

    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        return self.index.search(self.encoder.encode_queries(queries), k, rows_S)

    def nbytes(self) -> int:
        return self.index.nbytes()

    def _write(self, folder: Path) -> None:
        self.index.save(folder / "index")
        self.encoder.save(folder / "encoder")

    def _read(self, folder: Path) -> None:
        self.index = open_index(folder / "index")
        self.encoder = load_encoder(folder / "encoder", device=self.device)
