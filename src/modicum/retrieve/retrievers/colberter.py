"""colberter: the best by one vector of each text, refined by vectors of its words.

    candidates = the `depth` largest c_q c_d        score = sigma(gamma) c_q c_d + (1 - sigma(gamma)) word score

The word score adds up, for every word of the query, the largest inner product with a stored word of the passage.
Stored are the words whose gate is open, as float16; c lies in a method of port index. Hofstätter et al. 2022,
arXiv:2203.13088, section 3.4; the model comes from trainer `colberter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.core.errors import UserError
from modicum.core.files import read_json
from modicum.core.registry import build
from modicum.retrieve.indexes import Hits, Index, open_index
from modicum.retrieve.retrievers import Retriever


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str  # a folder that trainer colberter left
    depth: Annotated[int, Field(ge=1)] = 200  # candidates that are refined
    index: str = "exact"  # KEY:knob=value of port index, for the vectors of whole texts


class ColBERTerStore(Retriever):
    config: Config

    def __init__(self, config: Any, device: str = "cpu"):
        super().__init__(config, device)
        self._student: Any = None
        self._heads: Any = None
        self.exact = False
        self._empty()
        if config.model:
            self._open(Path(config.model))

    def _empty(self) -> None:
        self.index: Index = build("index", self.config.index)
        self.words_SE = np.empty((0, 0), np.float16)  # stored words of all passages, one after another
        self.key_S = np.empty(0, np.int64)
        self.start_N = np.zeros(1, np.int64)  # where each passage's words begin, and the end

    @classmethod
    def of(cls, student: Any, heads: Any, *, exact: bool, depth: int = 200) -> ColBERTerStore:
        """From a model in memory; it cannot be saved."""
        made = cls(Config(model="", depth=depth))
        made._student, made._heads, made.exact = student, heads, exact
        return made

    def _open(self, folder: Path) -> None:
        from safetensors.torch import load_file

        from modicum.retrieve.student import Student
        from modicum.retrieve.wordwise import WordHeads

        if not (folder / "colberter.json").is_file():
            raise UserError(f"{folder} has no colberter.json; train it with the trainer colberter")
        shape = read_json(folder / "colberter.json")
        self._student = Student.open(folder).eval()
        self.exact = shape.pop("exact")
        self._heads = WordHeads(self._student.width, shape["whole"], shape["words"], shape["last"], shape["gates"])
        self._heads.load_state_dict(load_file(folder / "heads.safetensors"))

    def encode(self, texts: list[str], *, document: bool) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(whole_C, words_WE, keys_W) of each text; closed words are left out."""
        import torch

        from modicum.retrieve.wordwise import first_rows

        result: list[Any] = [None] * len(texts)
        self._student.eval()
        with torch.inference_mode():
            for rows in first_rows(texts, 64):
                words = self._heads(self._student([texts[i] for i in rows]), document=document)
                for n, i in enumerate(rows):
                    kept = words.gate_NW[n] > 0
                    vectors = words.vectors_NWE[n][kept].float().numpy()
                    result[i] = (words.whole_NC[n].float().numpy(), vectors, words.key_NW[n][kept].numpy())
        return result

    def _add(self, texts: list[str]) -> None:
        first = len(self.alive_N)
        coded = self.encode(texts, document=True)
        self.index.add(np.arange(first, first + len(texts)), np.stack([whole for whole, _, _ in coded]))
        words_SE = np.concatenate([w for _, w, _ in coded]).astype(np.float16)
        self.words_SE = np.concatenate([self.words_SE, words_SE]) if len(self.key_S) else words_SE
        self.key_S = np.concatenate([self.key_S, *[k for *_, k in coded]])
        ends = self.start_N[-1] + np.cumsum([len(k) for *_, k in coded])
        self.start_N = np.concatenate([self.start_N, ends])

    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        coded = self.encode(queries, document=False)
        near = self.index.search(np.stack([whole for whole, _, _ in coded]), max(self.config.depth, k), rows_S)
        weight = 1 / (1 + np.exp(-float(self._heads.balance.detach())))
        hits = Hits.empty(len(queries), k)
        for q, (_, words_WE, keys_W) in enumerate(coded):
            rows = near.ids_QK[q][near.ids_QK[q] >= 0]
            refined = np.array([self._words_score(words_WE, keys_W, row) for row in rows])
            scores = weight * near.scores_QK[q][: len(rows)] + (1 - weight) * refined
            best = np.argsort(-scores, kind="stable")[:k]
            hits.ids_QK[q, : len(best)], hits.scores_QK[q, : len(best)] = rows[best], scores[best]
        return hits

    def _words_score(self, query_WE: np.ndarray, keys_W: np.ndarray, row: int) -> float:
        part = slice(int(self.start_N[row]), int(self.start_N[row + 1]))
        if part.start == part.stop or not len(query_WE):
            return 0.0
        match_WV = query_WE @ self.words_SE[part].astype(np.float32).T
        if self.exact:
            match_WV = match_WV * (keys_W[:, None] == self.key_S[part][None])
        return float(match_WV.max(1).sum())

    def nbytes(self) -> int:
        """Vectors of texts and words; their keys count where matching is exact."""
        return self.index.nbytes() + self.words_SE.nbytes + self.start_N.nbytes + self.exact * self.key_S.nbytes

    def _write(self, folder: Path) -> None:
        if not self.config.model:
            raise UserError("this model is in memory alone; save it with its trainer and open the folder as model=")
        self.index.save(folder / "index")
        for name in ("words_SE", "key_S", "start_N"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    def _read(self, folder: Path) -> None:
        self.index = open_index(folder / "index")
        for name in ("words_SE", "key_S", "start_N"):
            setattr(self, name, np.load(folder / f"{name}.npy", allow_pickle=False))
