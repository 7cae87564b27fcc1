"""Some of the documents of a corpus, as a corpus: what a filter leaves, without another tokenization."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from modicum.core.files import fingerprint
from modicum.data.shards import Documents


class Subset:
    """A view of `documents`: of each domain in `rows` the documents with these numbers. Empty domains are left out."""

    def __init__(self, documents: Documents, rows: Mapping[str, np.ndarray]):
        self._documents = documents
        self._rows = {d: np.asarray(numbers, np.int64) for d, numbers in rows.items() if len(numbers)}

    @property
    def domains(self) -> list[str]:
        return sorted(self._rows)

    @property
    def fingerprint(self) -> str:
        return fingerprint([self._documents.fingerprint, {d: rows.tolist() for d, rows in self._rows.items()}])

    @property
    def reserved(self) -> int:
        return self._documents.reserved

    def documents(self, domain: str) -> int:
        return len(self._rows[domain])

    def lengths(self, domain: str) -> np.ndarray:
        lengths: np.ndarray = self._documents.lengths(domain)[self._rows[domain]]
        return lengths

    def tokens(self, domain: str, i: int) -> np.ndarray:
        return self._documents.tokens(domain, int(self._rows[domain][i]))

    def loss_start(self, domain: str, i: int) -> int:
        return self._documents.loss_start(domain, int(self._rows[domain][i]))

    def metadata(self, domain: str, i: int) -> np.ndarray:
        return self._documents.metadata(domain, int(self._rows[domain][i]))

    def quality(self, domain: str) -> np.ndarray:
        quality: np.ndarray = self._documents.quality(domain)[self._rows[domain]]
        return quality
