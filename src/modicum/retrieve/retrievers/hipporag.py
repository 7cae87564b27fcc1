"""hipporag: a walk over a graph of phrases from those of the question, which reaches passages by what joins them.

Offline, each passage gives named phrases and facts (phrase, relation, phrase). Nodes are phrases; an edge's weight is
the number of facts that join the two, and phrases whose vectors have a cosine of at least `synonym` are joined by it.
Online each phrase of the question goes to its nearest node, and from there

    r_i = s_i / sum s      s_i = 1 / passages that have phrase i, for the linked nodes, else 0
    p = (1 - follow) r + follow W D^-1 p            W undirected, without loops; D its row sums
    score(d) = sum over phrases i of p_i (facts of d that have i)

A question without a phrase is answered by BM25. Gutiérrez et al. 2024 (NeurIPS), arXiv:2405.14831, sections 2 and 3,
and the authors' code (branch legacy). Departs: phrases and facts come from rules (`_phrases`; `extract` may be replaced
by any callable, such as a language model's); a phrase that no fact has counts once; synonyms are the `neighbours`
nearest of each phrase; no ensemble with dense scores; relations are not used in walking, as in the authors' code.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.retrieve.bm25 import BM25
from modicum.retrieve.encoders import Encoder, make_encoder
from modicum.retrieve.indexes import Hits
from modicum.retrieve.retrievers import Retriever, read_texts, write_texts
from modicum.retrieve.retrievers._phrases import Facts, extract, phrases, sentences

CLAIM = {"figure": "up to 20% better on multi-hop questions; level with iterative retrieval at a tenth of its cost",
         "where": "abstract", "scale": "MuSiQue, 2WikiMultiHopQA and HotpotQA, facts by gpt-3.5-turbo"}  # fmt: skip
STEPS, CLOSE = 200, 1e-10  # of the walk: most iterations, and the change that ends it
BLOCK = 1024  # phrases compared at once


@dataclass(frozen=True, kw_only=True)
class Config:
    encoder: str = "minilm"  # of phrases: links the question's to the graph's, and joins synonyms
    follow: Annotated[float, Field(ge=0, lt=1)] = 0.5  # probability of following an edge rather than starting again
    synonym: Annotated[float, Field(ge=0, le=1)] = 0.8  # least cosine of phrases that are joined; 1: only equal ones
    neighbours: Annotated[int, Field(ge=1)] = 10  # most synonyms of a phrase
    specificity: bool = True  # phrases of few passages count more


SWEEP = ("follow=0.5", "follow=0")  # 0: no walk, the linked phrases alone


@dataclass(frozen=True)
class Graph:
    """Of the passages in `rows_A`. walk_PP: W D^-1, sparse; facts_AP: facts of a passage that have a phrase."""

    rows_A: np.ndarray
    names: list[str]
    known: frozenset[str]  # the same names
    vectors_PD: np.ndarray
    walk_PP: Any
    facts_AP: Any
    passages_P: np.ndarray
    lexicon: BM25


class HippoRag(Retriever):
    config: Config

    def __init__(self, config: Any, device: str = "cpu", extract: Callable[[str], Facts] = extract):
        super().__init__(config, device)
        self.encoder: Encoder = make_encoder(config.encoder, device=device)
        self.extract = extract
        self.texts: list[str] = []
        self.facts: list[Facts] = []
        self._known: dict[str, np.ndarray] = {}  # vectors of phrases
        self._graph: tuple[bytes, Graph] | None = None

    def _add(self, texts: list[str]) -> None:
        self.texts += texts
        self.facts += [self.extract(text) for text in texts]
        self._graph = None

    def _vectors(self, names: list[str]) -> np.ndarray:
        """Unit vectors, each phrase encoded once."""
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        if new:
            self._known.update(zip(new, self.encoder.encode(new), strict=True))
        return np.stack([self._known[name] for name in names]) if names else np.empty((0, 0), np.float32)

    def graph(self) -> Graph:
        """That of the passages which are there now, made when it is first needed."""
        state = self.alive_N.tobytes()
        if self._graph is None or self._graph[0] != state:
            self._graph = state, self._make()
        return self._graph[1]

    def _make(self) -> Graph:
        from scipy import sparse

        rows_A = np.flatnonzero(self.alive_N)
        number: dict[str, int] = {}
        for row in rows_A:
            for name in self.facts[row].phrases:
                number.setdefault(name, len(number))
        edges: Counter[tuple[int, int]] = Counter()
        counted: list[tuple[int, int, int]] = []
        for at, row in enumerate(rows_A):
            counts = dict.fromkeys((number[name] for name in self.facts[row].phrases), 0)
            for a, _, b in self.facts[row].triples:
                i, j = number[a], number[b]
                counts[i] += 1
                counts[j] += 1
                edges[min(i, j), max(i, j)] += 1
            counted += [(at, i, max(n, 1)) for i, n in counts.items()]
        names, vectors_PD = list(number), self._vectors(list(number))
        weights = {pair: float(n) for pair, n in edges.items() if pair[0] != pair[1]}
        for pair, cosine in synonyms(vectors_PD, self.config.synonym, self.config.neighbours).items():
            weights[pair] = weights.get(pair, 0.0) + cosine
        P = len(names)
        i_E, j_E = (np.array([pair[side] for pair in weights], np.int64) for side in (0, 1))
        w_E = np.array(list(weights.values()))
        once_PP = sparse.coo_matrix((w_E, (i_E, j_E)), shape=(P, P))
        weight_PP = (once_PP + once_PP.T).tocsr()
        degree_P = np.asarray(weight_PP.sum(0)).ravel()
        walk_PP = weight_PP @ sparse.diags(1 / np.where(degree_P > 0, degree_P, 1)) if P else weight_PP
        at_H, phrase_H, n_H = (np.array([h[k] for h in counted], np.int64) for k in range(3))
        facts_AP = sparse.csr_matrix((n_H.astype(float), (at_H, phrase_H)), shape=(len(rows_A), P))
        passages_P = np.asarray((facts_AP > 0).sum(0)).ravel()
        lexicon = BM25.build(self.texts[r] for r in rows_A)
        return Graph(rows_A, names, frozenset(names), vectors_PD, walk_PP, facts_AP, passages_P, lexicon)

    def reset(self, graph: Graph, query: str) -> np.ndarray:
        """r_P: where the walk begins; zeros for a question without a phrase."""
        r_P = np.zeros(len(graph.names))
        if not graph.names:
            return r_P
        linked = list(dict.fromkeys(name for part in sentences(query) for name, _, _ in phrases(part, graph.known)))
        if not linked:
            return r_P
        for node in (self._vectors(linked) @ graph.vectors_PD.T).argmax(1):
            r_P[node] += 1 / graph.passages_P[node] if self.config.specificity else 1
        total: np.ndarray = r_P / r_P.sum()
        return total

    def _rank(self, queries: list[str], k: int, rows_S: np.ndarray | None) -> Hits:
        graph, hits = self.graph(), Hits.empty(len(queries), k)
        allowed_A = np.ones(len(graph.rows_A), bool) if rows_S is None else np.isin(graph.rows_A, rows_S)
        for q, query in enumerate(queries):
            r_P = self.reset(graph, query)
            if not r_P.any():
                lexical = graph.lexicon.search([query], k, None if allowed_A.all() else np.flatnonzero(allowed_A))
                ids_K = lexical.ids_QK[0]
                hits.ids_QK[q] = np.where(ids_K >= 0, graph.rows_A[ids_K], -1)
                hits.scores_QK[q] = lexical.scores_QK[0]
                continue
            score_A = graph.facts_AP @ page_rank(graph.walk_PP, r_P, self.config.follow)
            score_A = np.where(allowed_A, score_A, 0).astype(np.float32)
            best = np.argsort(-score_A, kind="stable")[:k]
            best = best[score_A[best] > 0]
            hits.ids_QK[q, : len(best)], hits.scores_QK[q, : len(best)] = graph.rows_A[best], score_A[best]
        return hits

    def nbytes(self) -> int:
        graph = self.graph()
        matrices = (graph.walk_PP.tocsr(), graph.facts_AP)
        return (
            graph.vectors_PD.nbytes
            + graph.lexicon.nbytes()
            + sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in matrices)
        )

    def _write(self, folder: Path) -> None:
        write_texts(folder / "texts.parquet", self.texts)
        write_texts(folder / "facts.parquet", [json.dumps([f.phrases, f.triples]) for f in self.facts])
        names = list(self._known)
        write_texts(folder / "phrases.parquet", names)
        np.save(folder / "vectors.npy", self._vectors(names))

    def _read(self, folder: Path) -> None:
        self.texts = read_texts(folder / "texts.parquet")
        for line in read_texts(folder / "facts.parquet"):
            names, triples = json.loads(line)
            self.facts.append(Facts(tuple(names), tuple((a, r, b) for a, r, b in triples)))
        names = read_texts(folder / "phrases.parquet")
        self._known = dict(zip(names, np.load(folder / "vectors.npy", allow_pickle=False), strict=True))


def page_rank(walk_PP: Any, reset_P: np.ndarray, follow: float) -> np.ndarray:
    """p = (1 - follow) r + follow W D^-1 p. A node without edges sends its walk back to r."""
    p = reset_P
    for _ in range(STEPS):
        moved = walk_PP @ p
        new = follow * (moved + (p.sum() - moved.sum()) * reset_P) + (1 - follow) * reset_P
        if np.abs(new - p).sum() < CLOSE:
            return new
        p = new
    return p


def synonyms(vectors_PD: np.ndarray, threshold: float, neighbours: int) -> dict[tuple[int, int], float]:
    """{(i, j): cosine}, i < j, of each phrase's nearest others from `threshold` on. Exact, a block at a time: P^2 D
    products, and BLOCK P numbers of memory."""
    pairs: dict[tuple[int, int], float] = {}
    if threshold >= 1 or not len(vectors_PD):
        return pairs
    for start in range(0, len(vectors_PD), BLOCK):
        cosine_BP = vectors_PD[start : start + BLOCK] @ vectors_PD.T
        rows = np.arange(len(cosine_BP))
        cosine_BP[rows, start + rows] = -1
        near = np.argsort(-cosine_BP, axis=1, kind="stable")[:, :neighbours]
        for i, best in enumerate(near, start):
            for j in best.tolist():
                if (cosine := float(cosine_BP[i - start, j])) < threshold:
                    break
                pairs[min(i, j), max(i, j)] = cosine
    return pairs
