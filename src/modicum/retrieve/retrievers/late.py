"""late: one vector for each token, compared by the best match of every query token.

    score(q, d) = sum over query tokens i of max over passage tokens j of <q_i, d_j>

Khattab and Zaharia 2020, arXiv:2004.12832, section 3. Token states are those of any encoder that has them, kept as
float16; a search compares all passages, or the `depth` best by the mean of their tokens when that is fewer. Departs:
no query augmentation with mask tokens and no projection, which need a model trained for them (`colberter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.retrieve.encoders import make_encoder
from modicum.retrieve.indexes import Hits
from modicum.retrieve.pairs import max_sim
from modicum.retrieve.retrievers import Retriever


@dataclass(frozen=True, kw_only=True)
class Config:
    encoder: str = "minilm"  # one that gives token states
    depth: Annotated[int, Field(ge=1)] = 200  # passages that are compared token by token


class LateInteraction(Retriever):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        self.encoder = make_encoder(config.encoder, device=device)
        self.states_TD = np.empty((0, 0), np.float16)
        self.start_N = np.zeros(1, np.int64)  # where each passage's tokens begin, and the end
        self.mean_ND = np.empty((0, 0), np.float32)

    def _add(self, texts: list[str]) -> None:
        states = self.encoder.tokens(texts)
        means_ND = np.stack([s.mean(0) for s in states])
        ends = self.start_N[-1] + np.cumsum([len(s) for s in states])
        joined_TD = np.concatenate(states).astype(np.float16)
        self.states_TD = np.concatenate([self.states_TD, joined_TD]) if len(self.states_TD) else joined_TD
        self.mean_ND = np.concatenate([self.mean_ND, means_ND]) if len(self.mean_ND) else means_ND
        self.start_N = np.concatenate([self.start_N, ends])

    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        rows_S = np.arange(len(self.alive_N)) if rows_S is None else rows_S
        hits = Hits.empty(len(queries), k)
        depth = max(self.config.depth, k)
        for q, query_TD in enumerate(self.encoder.tokens(queries, "query")):
            rows = rows_S
            if len(rows) > depth:
                near = self.mean_ND[rows] @ query_TD.mean(0)
                rows = np.sort(rows[np.argpartition(-near, depth - 1)[:depth]])
            docs = [self.states_TD[self.start_N[r] : self.start_N[r + 1]].astype(np.float32) for r in rows]
            scores = max_sim(query_TD, docs)
            best = np.argsort(-scores, kind="stable")[:k]
            hits.ids_QK[q, : len(best)], hits.scores_QK[q, : len(best)] = rows[best], scores[best]
        return hits

    def nbytes(self) -> int:
        return self.states_TD.nbytes + self.mean_ND.nbytes + self.start_N.nbytes

    def _write(self, folder: Path) -> None:
        for name in ("states_TD", "mean_ND", "start_N"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    def _read(self, folder: Path) -> None:
        for name in ("states_TD", "mean_ND", "start_N"):
            setattr(self, name, np.load(folder / f"{name}.npy", allow_pickle=False))
