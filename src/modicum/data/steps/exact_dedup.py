"""exact-dedup: of documents with the same text, keep the first.

    drop d_j  if  BLAKE2b-128(fold(d_j)) = BLAKE2b-128(fold(d_i))  for a kept i < j

fold ignores how runs of spaces are written, as the line and document hashes of Wenzek et al. 2020
(CCNet, arXiv:1911.00359, section 3.1) ignore case and punctuation; `ignore_space=false` compares every
character. Two different texts collide with probability about N^2 / 2^129.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modicum.data.document import Document
from modicum.data.steps import Step


@dataclass(frozen=True, kw_only=True)
class Config:
    ignore_space: bool = True


class ExactDedup(Step):
    config: Config
    scope = "corpus"

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
        order = np.lexsort((np.arange(len(signatures_NK)), signatures_NK[:, 1], signatures_NK[:, 0]))
        ranked = signatures_NK[order]
        same = np.concatenate([[False], (ranked[1:] == ranked[:-1]).all(axis=1)])
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))
        return {int(order[k]): ("duplicate", f"same as {ids[int(order[first[k]])]}") for k in np.flatnonzero(same)}
