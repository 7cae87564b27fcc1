"""Latent semantic analysis: a text's term counts, projected onto the main directions of the texts' counts.

Shape letters: N passages, V terms, D latent directions.

    x[t] = (1 + ln tf) * ln(1 + (n - df + 0.5) / (df + 0.5)), divided by the length of x
    X = U diag(s) W^T, the D largest s          y = x W

Deerwester et al. 1990 (JASIS 41), with terms as BM25 cuts them and its idf. W comes from a randomized SVD
(Halko et al. 2011, arXiv:0909.4061, algorithm 4.4) of at most `SAMPLE` passages drawn evenly from the stream,
so memory is bounded whatever their number.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from modicum.core.errors import UserError
from modicum.data.terms import tokenize

SAMPLE = 50_000  # passages the directions are computed from
TERMS = 32_768  # terms kept, those in most passages first
OVERSAMPLE, POWER = 16, 3


class Latent:
    """Fitted by `fit`; `dim` may come out smaller than asked where there are few passages or terms."""

    def __init__(self, dim: int, seed: int = 0):
        if dim < 0:
            raise UserError(f"latent={dim} is not a number of directions; write 0 (off) or more")
        self.wanted, self.seed = dim, seed
        self.terms: dict[str, int] = {}
        self.idf_V = np.empty(0, np.float32)
        self.map_VD = np.empty((0, 0), np.float16)

    @property
    def dim(self) -> int:
        return int(self.map_VD.shape[1])

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """Pass texts through and fit on them when they end."""
        rng, n = random.Random(self.seed), 0
        numbers: dict[str, int] = {}
        df = Counter[int]()
        sample: list[array[int]] = []
        for text in texts:
            yield text
            row = array("i", [numbers.setdefault(t, len(numbers)) for t in tokenize(text)])
            df.update(set(row))
            if n < SAMPLE:
                sample.append(row)
            elif (slot := rng.randrange(n + 1)) < SAMPLE:  # every passage is kept with the same chance
                sample[slot] = row
            n += 1
        names = list(numbers)
        term_numbers = [
            number for number, count in df.most_common(TERMS) if count > 1
        ]  # a term of one passage joins nothing
        self.terms = {names[number]: column for column, number in enumerate(term_numbers)}
        self.idf_V = np.array([math.log(1 + (n - df[t] + 0.5) / (df[t] + 0.5)) for t in term_numbers], np.float32)
        column_of = np.full(len(names), -1, np.int64)
        column_of[term_numbers] = np.arange(len(term_numbers))
        x_NV = self._matrix([column_of[np.asarray(row, np.int64)] for row in sample])
        self.map_VD = _directions(x_NV, self.wanted, self.seed).astype(np.float16)

    def fit(self, texts: Iterable[str]) -> Latent:
        for _ in self.watch(texts):
            pass
        return self

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """y_ND, float32; zeros for a text without a known term."""
        rows = [np.array([self.terms[t] for t in tokenize(text) if t in self.terms], np.int64) for text in texts]
        return np.asarray(self._matrix(rows) @ self.map_VD.astype(np.float32), np.float32)

    def _matrix(self, rows: Sequence[np.ndarray]) -> Any:
        """Sparse x_NV of rows of term columns; negative columns are left out."""
        from scipy.sparse import csr_matrix

        pairs = [np.unique(row[row >= 0], return_counts=True) for row in rows]
        data = [(1 + np.log(tf)) * self.idf_V[columns] for columns, tf in pairs]
        data = [d / np.linalg.norm(d) if len(d) else d for d in data]
        ends = np.cumsum([0, *(len(d) for d in data)])
        columns = np.concatenate([p for p, _ in pairs]) if pairs else np.empty(0, np.int64)
        flat = np.concatenate(data) if data else np.empty(0)
        return csr_matrix((flat.astype(np.float32), columns, ends), shape=(len(rows), len(self.idf_V)))

    def state(self) -> dict[str, np.ndarray]:
        names = "\n".join(self.terms).encode()  # a term holds no line end
        return {"latent_terms": np.frombuffer(names, np.uint8), "latent_idf": self.idf_V, "latent_map": self.map_VD}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        names = state["latent_terms"].tobytes().decode()
        self.terms = {t: i for i, t in enumerate(names.split("\n"))} if names else {}
        self.idf_V, self.map_VD = state["latent_idf"], state["latent_map"]


def _directions(x_NV: Any, dim: int, seed: int) -> np.ndarray:
    """W of the `dim` largest singular values, shape (V, D)."""
    dim = min(dim, *x_NV.shape)
    if dim < 1:
        return np.empty((x_NV.shape[1], 0))
    width = min(dim + OVERSAMPLE, *x_NV.shape)
    q_NR = x_NV @ np.random.default_rng(seed).standard_normal((x_NV.shape[1], width), dtype=np.float32)
    for _ in range(POWER):  # each pass through X and X^T sharpens the gap between large and small s
        q_NR = np.linalg.qr(q_NR)[0]
        q_NR = x_NV @ np.linalg.qr(x_NV.T @ q_NR)[0]
    _, s_R, w_RV = np.linalg.svd((x_NV.T @ np.linalg.qr(q_NR)[0]).T, full_matrices=False)
    significant = s_R[:dim] > 1e-4 * max(float(s_R[0]), 1e-30)
    return np.asarray(w_RV[:dim][significant].T)
