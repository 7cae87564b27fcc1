"""Training data of encoders: queries with their passages, hard negatives, teacher scores, a split by article.

Shape letters: Q queries, P passages, B texts of a batch, T tokens, D width.

Teacher scores are made once and kept in a Parquet file with the columns query, doc, teacher, score; every trainer that
distils reads it. Questions of one article never stand on both sides of a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from modicum.core.errors import UserError
from modicum.core.files import atomic_file
from modicum.retrieve.indexes import Hits

Rank = Callable[[list[str], int], Hits]  # queries, k -> rows of passages


@dataclass(frozen=True)
class Pairs:
    """Queries, the passage each one is about, and what teachers say of others.

    negatives_Q: rows of passages that rank high and are not the positive. scores_Q: {row: teacher's score}, raw, on one
    scale for a query. late: scores_BP of a teacher by late interaction, for rows of queries and of passages.
    """

    queries: Sequence[str]
    passages: Sequence[str]
    positive_Q: np.ndarray
    negatives_Q: Sequence[np.ndarray] = ()
    scores_Q: Sequence[dict[int, float]] = ()
    late: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    articles_Q: Sequence[str] = field(default=())  # of each query; "" where unknown

    def __post_init__(self) -> None:
        if not len(self.queries) or len(self.queries) != len(self.positive_Q):
            raise UserError(f"{len(self.queries)} queries with {len(self.positive_Q)} passages; give one passage each")
        if min(self.positive_Q) < 0 or max(self.positive_Q) >= len(self.passages):
            raise UserError(f"a positive is not among the {len(self.passages)} passages; check the judgements")


def split_by_article(titles: Sequence[str], fraction: float, seed: int = 0) -> np.ndarray:
    """test_N: True for about `fraction` of the articles, all rows of one together; by a hash, whatever the order."""
    order = sorted(set(titles), key=lambda t: hashlib.sha256(f"{seed} {t}".encode()).digest())
    if len(order) < 2:
        raise UserError(f"the rows belong to {len(order)} article; a split needs two, given by the column title")
    chosen = set(order[: min(max(1, round(fraction * len(order))), len(order) - 1)])
    return np.array([t in chosen for t in titles])


def with_negatives(pairs: Pairs, rank: Rank, depth: int, batch: int = 256) -> Pairs:
    """Hard negatives: the best `depth` passages by `rank`, without the positive and texts equal to it."""
    kept: list[np.ndarray] = []
    same = {text: row for row, text in reversed(list(enumerate(pairs.passages)))}
    first_P = np.array([same[text] for text in pairs.passages])  # equal texts count as one passage
    for start in range(0, len(pairs.queries), batch):
        ids_QK = rank(list(pairs.queries[start : start + batch]), depth + 1).ids_QK
        for q, ids in enumerate(ids_QK, start):
            ids = ids[ids >= 0]
            kept.append(ids[first_P[ids] != first_P[pairs.positive_Q[q]]][:depth])
    lonely = [q for q, rows in enumerate(kept) if not len(rows)]
    for q in lonely:  # a query that matches nothing else takes the passage after its own
        kept[q] = np.array([(pairs.positive_Q[q] + 1) % len(pairs.passages)])
    return replace(pairs, negatives_Q=kept)


def with_scores(pairs: Pairs, score: Callable[[str, list[str]], Sequence[float]]) -> Pairs:
    """Teacher scores of every query's positive and negatives."""
    scores = []
    for query, positive, negatives in zip(pairs.queries, pairs.positive_Q, pairs.negatives_Q, strict=True):
        rows = [int(positive), *map(int, negatives)]
        values = score(query, [pairs.passages[r] for r in rows])
        scores.append(dict(zip(rows, map(float, values), strict=True)))
    return replace(pairs, scores_Q=scores)


def write_scores(path: str | Path, pairs: Pairs, teacher: str) -> None:
    """Keep the scores; several teachers are several files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(q, d, s) for q, scores in enumerate(pairs.scores_Q) for d, s in scores.items()]
    columns = {
        "query": pa.array([pairs.queries[q] for q, _, _ in rows]),
        "doc": pa.array([pairs.passages[d] for _, d, _ in rows]),
        "teacher": pa.array([teacher] * len(rows)),
        "score": pa.array([s for *_, s in rows], pa.float64()),
    }
    with atomic_file(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")


def read_scores(paths: Iterable[str | Path], pairs: Pairs) -> Pairs:
    """Scores of one or several files; of several teachers the mean. What no file scores is left out."""
    import pyarrow.parquet as pq

    query_of = {text: q for q, text in enumerate(pairs.queries)}
    doc_of = {text: d for d, text in enumerate(pairs.passages)}
    values: list[dict[int, list[float]]] = [{} for _ in pairs.queries]
    for path in paths:
        for row in pq.read_table(path).to_pylist():
            q, d = query_of.get(row["query"]), doc_of.get(row["doc"])
            if q is not None and d is not None:
                values[q].setdefault(d, []).append(row["score"])
    return replace(pairs, scores_Q=[{d: float(np.mean(s)) for d, s in scores.items()} for scores in values])


def max_sim(query_TD: np.ndarray, docs: Sequence[np.ndarray]) -> np.ndarray:
    """scores_N: for every document the sum over query tokens of the largest inner product with one of its tokens."""
    if not docs:
        return np.empty(0, np.float32)
    lengths = [len(d) for d in docs]
    if min(lengths) == 0:
        raise UserError("a document without tokens cannot be compared by its tokens; leave it out")
    products_TS = query_TD @ np.concatenate(docs).T
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.maximum.reduceat(products_TS, starts, axis=1).sum(0).astype(np.float32)
