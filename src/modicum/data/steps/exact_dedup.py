"""exact-dedup: of documents with the same text, keep the first.

    drop d_j  if  BLAKE2b-128(fold(d_j)) = BLAKE2b-128(fold(d_i))  for a kept i < j

fold ignores how runs of spaces are written, as the line and document hashes of Wenzek et al. 2020 (CCNet,
arXiv:1911.00359, section 3.1) ignore case and punctuation; `ignore_space=false` compares every character. Two
different texts collide with probability about N^2 / 2^129. `against` names corpora that are curated already (folders,
files): their documents come first and all stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modicum.data.document import Document
from modicum.data.steps import Step
from modicum.data.steps._indexed import folders, ids_of, index


@dataclass(frozen=True, kw_only=True)
class Config:
    ignore_space: bool = True
    against: list[str] = field(default_factory=list)  # curated folders, or files, whose documents are known


class ExactDedup(Step):
    config: Config
    scope = "corpus"

    def __init__(self, config: Any):
        super().__init__(config)
        self.sample = 1 if config.against else 0  # nothing of the corpus itself is learnt
        self.indexed, self.indexed_ids = np.zeros((0, 2), np.uint64), list[str]()

    def sources(self) -> Sequence[str]:
        return folders(self.config.against)

    def fit(self, sample: Sequence[Document]) -> dict[str, np.ndarray]:
        return index(self.config.against, self.signatures)

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load(arrays)
        self.indexed, self.indexed_ids = arrays["indexed"], ids_of(arrays["indexed_ids"])

    def signatures(self, documents: Sequence[Document]) -> np.ndarray:
        rows = np.empty((len(documents), 2), np.uint64)
        for i, document in enumerate(documents):
            text = " ".join(document.text.split()) if self.config.ignore_space else document.text
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            rows[i] = np.frombuffer(digest, "<u8")
        return rows

    def decide(self, signatures_NK: np.ndarray, ids: Sequence[str]) -> dict[int, tuple[str, str]]:
        if len(signatures_NK) == 0:
            return {}
        known = len(self.indexed)
        rows = np.concatenate([self.indexed, signatures_NK])
        order = np.lexsort((np.arange(len(rows)), rows[:, 1], rows[:, 0]))
        ranked = rows[order]
        same = np.concatenate([[False], (ranked[1:] == ranked[:-1]).all(axis=1)])
        first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))]
        drops = {}
        for k in np.flatnonzero(same & (order >= known)):
            like = int(first[k])
            name = self.indexed_ids[like] if like < known else ids[like - known]
            drops[int(order[k]) - known] = ("duplicate", f"same as {name}")
        return drops
