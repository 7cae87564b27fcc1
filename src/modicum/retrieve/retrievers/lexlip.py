"""lexlip: an inverted index over weights that a model gives to the words of its vocabulary.

    score(q, d) = sum over words w of q_w d_w        only words that both have are read

Weights come from a model of trainer `lexlip`: of a text's masked-word logits the largest over the positions, through
ln(1 + relu), at length 1. They may name words that the text does not have. Postings are kept by word, as those of BM25
are; `words` keeps the largest weights of a passage alone. Luo et al. 2023, arXiv:2302.02908, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.core.errors import UserError
from modicum.core.files import read_json
from modicum.retrieve.indexes import Hits
from modicum.retrieve.retrievers import Retriever


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str  # a folder that trainer lexlip left
    words: Annotated[int, Field(ge=1)] | None = None  # largest weights of a passage that are kept; None: all


class LexLipStore(Retriever):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        self._student: Any = None
        self._heads: Any = None
        self._weights_NV: Any = None  # by passage, as added
        self._postings_VN: Any = None  # by word, as searched; made when it is needed
        if config.model:
            self._open(Path(config.model))

    @classmethod
    def of(cls, student: Any, heads: Any, words: int | None = None) -> LexLipStore:
        """From a model in memory; it cannot be saved."""
        made = cls(Config(model="", words=words))
        made._student, made._heads = student, heads
        return made

    def _open(self, folder: Path) -> None:
        from safetensors.torch import load_file

        from modicum.retrieve.lexical import LexicalHeads
        from modicum.retrieve.student import Student

        if not (folder / "lexlip.json").is_file():
            raise UserError(f"{folder} has no lexlip.json; train it with the trainer lexlip")
        self._student = Student.open(folder).eval()
        self._heads = LexicalHeads(self._student, read_json(folder / "lexlip.json")["decoder_heads"])
        self._heads.load_state_dict(load_file(folder / "heads.safetensors"))

    def encode(self, texts: list[str]) -> Any:
        """The sparse matrix of weights, (N, V)."""
        from modicum.retrieve.lexical import encode

        return encode(self._student, self._heads, texts)

    def _add(self, texts: list[str]) -> None:
        from scipy import sparse

        new_NV = self.encode(texts)
        if self.config.words is not None:
            new_NV = largest(new_NV, self.config.words)
        old = [] if self._weights_NV is None else [self._weights_NV]
        self._weights_NV = sparse.vstack([*old, new_NV], format="csr")
        self._postings_VN = None

    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        if self._postings_VN is None:
            self._postings_VN = self._weights_NV.T.tocsr()
        scores_QN = (self.encode(queries) @ self._postings_VN).toarray()
        rows_S = np.arange(len(self.alive_N)) if rows_S is None else rows_S
        hits = Hits.empty(len(queries), k)
        for q, scores_S in enumerate(scores_QN[:, rows_S]):
            best = np.argsort(-scores_S, kind="stable")[:k]
            best = best[scores_S[best] > 0]
            hits.ids_QK[q, : len(best)], hits.scores_QK[q, : len(best)] = rows_S[best], scores_S[best]
        return hits

    def nbytes(self) -> int:
        m = self._weights_NV
        return 0 if m is None else int(m.data.nbytes + m.indices.nbytes + (m.shape[1] + 1) * m.indptr.itemsize)

    def _write(self, folder: Path) -> None:
        if not self.config.model:
            raise UserError("this model is in memory alone; save it with its trainer and open the folder as model=")
        m = self._weights_NV if self._weights_NV is not None else self.encode([])
        for name in ("data", "indices", "indptr"):
            np.save(folder / f"{name}.npy", getattr(m, name))

    def _read(self, folder: Path) -> None:
        from scipy import sparse

        data, indices, indptr = (
            np.load(folder / f"{n}.npy", allow_pickle=False) for n in ("data", "indices", "indptr")
        )
        size = int(self._student.model.config.vocab_size)
        self._weights_NV = sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, size))


def largest(m_NV: Any, count: int) -> Any:
    """Only the `count` largest weights of every row."""
    from scipy import sparse

    rows, columns, data = [], [], []
    for n in range(m_NV.shape[0]):
        part = slice(m_NV.indptr[n], m_NV.indptr[n + 1])
        best = np.argsort(-m_NV.data[part], kind="stable")[:count]
        rows.append(np.full(len(best), n))
        columns.append(m_NV.indices[part][best])
        data.append(m_NV.data[part][best])
    joined = [np.concatenate(x) if x else np.empty(0, np.int64) for x in (rows, columns)]
    values = np.concatenate(data) if data else np.empty(0, np.float32)
    return sparse.csr_matrix((values, (joined[0], joined[1])), shape=m_NV.shape, dtype=np.float32)
