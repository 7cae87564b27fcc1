"""massiveds: a datastore in shards, searched deep once; sampling and cleaning come after the search.

    list(q) = first k of  distinct(sampled(top-K of all shards))        K = `deep`, much larger than k

Each shard gives its K best, which are merged; then passages are kept with probability `fraction` by a hash of their
row, and near duplicates (Jaccard similarity of 13-grams above `overlap`) are dropped after their best copy. Sampling
commutes with ranking, so one index serves datastores of all sizes: `datastore.scaling` measures a language model's loss
against the size from a single search. `engine=ray` keeps each shard in an actor, with equal results. Shao et al.
2024 (NeurIPS), arXiv:2407.12854, section 3 and appendix A. Departs: similarities are exact, of the deep list alone,
instead of MinHash over the store; quality filters are those of `modicum curate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from modicum.retrieve.datastore import distinct, sampled
from modicum.retrieve.encoders import Encoder, load_encoder, make_encoder
from modicum.retrieve.indexes import Hits
from modicum.retrieve.retrievers import Retriever, read_texts, write_texts
from modicum.retrieve.shards import Shards

CLAIM = {"figure": "language modelling and knowledge tasks improve with the datastore's size without saturation",
         "where": "abstract", "scale": "1.4 trillion tokens, Contriever, Llama-2 and Llama-3"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    encoder: str = "minilm"  # KEY:knob=value or a model; one for all shards
    index: str = "exact"  # of a shard
    shards: Annotated[int, Field(ge=1)] = 4
    deep: Annotated[int, Field(ge=1)] = 100  # K: results that are merged and filtered
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the passages that are in the datastore
    seed: int = 0  # which ones
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.8  # similarity from which a passage is a duplicate; 1: keep all
    engine: Literal["local", "ray"] = "local"


class MassiveDS(Retriever):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        self.encoder: Encoder = make_encoder(config.encoder, device=device)
        self.shards = Shards(config.index, config.shards, config.engine)
        self.texts: list[str] = []

    def _add(self, texts: list[str]) -> None:
        first = len(self.alive_N)
        if first:
            vectors_ND = self.encoder.encode(texts)
        else:
            self.encoder.count(texts)
            pooled_NE = self.encoder.pool(texts)
            self.encoder.fit([pooled_NE])
            vectors_ND = self.encoder.finish(pooled_NE)
        self.shards.add(np.arange(first, first + len(texts)), vectors_ND)
        self.texts += texts

    def deep(self, queries: list[str], k: int, rows_S: np.ndarray | None = None) -> Hits:
        """The k best of the whole store, before anything is dropped."""
        return self.shards.search(self.encoder.encode_queries(queries), k, rows_S)

    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        deep, hits = self.deep(queries, max(self.config.deep, k), rows_S), Hits.empty(len(queries), k)
        for q, (ids, scores) in enumerate(zip(deep.ids_QK, deep.scores_QK, strict=True)):
            rows = sampled(ids[ids >= 0].tolist(), self.config.fraction, self.config.seed)
            if self.config.overlap < 1:
                rows = distinct(rows, self.texts, self.config.overlap)
            rows = rows[:k]
            score = dict(zip(ids.tolist(), scores.tolist(), strict=True))
            hits.ids_QK[q, : len(rows)], hits.scores_QK[q, : len(rows)] = rows, [score[r] for r in rows]
        return hits

    def nbytes(self) -> int:
        return self.shards.nbytes()

    def _write(self, folder: Path) -> None:
        self.shards.save(folder / "shards")
        self.encoder.save(folder / "encoder")
        write_texts(folder / "texts.parquet", self.texts)

    def _read(self, folder: Path) -> None:
        self.shards.open(folder / "shards")
        self.encoder = load_encoder(folder / "encoder", device=self.device)
        self.texts = read_texts(folder / "texts.parquet")
