"""A judged collection whose evidence lies deep in long documents, made of any text: what truncation costs.

Of every document of at least `least` words a query takes `parts` sentences, one from each of as many equal sections
beyond the first `beyond` words, so that no encoder which reads those alone can have seen what is asked. Only sentences
that stand once in the whole collection are taken, and they are taken out: what is left to match are their words
elsewhere in the document. After the tasks of LoCoV1 (Saad-Falcon et al. 2024, arXiv:2402.07440, section 3), whose data
sets are not needed.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modicum.core.errors import UserError
from modicum.core.files import atomic_directory
from modicum.retrieve import metrics
from modicum.retrieve.bm25 import BM25

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
WORDS = (6, 40)  # of a sentence that may be asked about


@dataclass(frozen=True)
class LongCollection:
    """relevant: for each query the row of its document, graded 1."""

    ids: list[str]
    texts: list[str]
    queries: list[str]
    relevant: list[dict[int, float]]

    def write(self, folder: str | Path) -> None:
        """corpus.parquet, queries.parquet and qrels.parquet, which `modicum retrieval FOLDER` reads."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        numbers = [f"q{n}" for n in range(len(self.queries))]
        gold = [self.ids[next(iter(grades))] for grades in self.relevant]
        tables = {
            "corpus": {"id": self.ids, "text": self.texts},
            "queries": {"id": numbers, "text": self.queries},
            "qrels": {"query_id": numbers, "doc_id": gold, "relevance": [1] * len(gold)},
        }
        with atomic_directory(folder) as target:
            for name, columns in tables.items():
                pq.write_table(pa.table(columns), target / f"{name}.parquet", compression="zstd")


def long_collection(
    documents: Iterable[tuple[str, str]],
    *,
    beyond: int = 512,
    least: int = 1500,
    most: int = 15_000,
    parts: int = 2,
    limit: int = 1000,
    seed: int = 0,
) -> LongCollection:
    """From (id, text): documents of `least` to `most` words, at most `limit`, each with a query if it has sentences for
    one. Raises `UserError` where fewer than two documents are long enough."""
    kept = [(i, text) for i, text in documents if least <= len(text.split()) <= most][:limit]
    if len(kept) < 2:
        raise UserError(f"{len(kept)} documents have {least} to {most} words; give longer texts, or a smaller least=")
    twice = [i for i, n in Counter(i for i, _ in kept).items() if n > 1]
    if twice:
        raise UserError(f"document id {twice[0]!r} appears twice; give every document an id of its own")
    sentences = [[s.strip() for s in _SENTENCE.split(text) if s.strip()] for _, text in kept]
    shared = Counter(s for own in sentences for s in set(own))
    rng = np.random.default_rng(seed)
    texts, queries, relevant = [], [], []
    for row, own in enumerate(sentences):
        chosen = _drawn(own, shared, beyond, parts, rng)
        texts.append("\n".join(s for n, s in enumerate(own) if n not in chosen))
        if chosen:
            queries.append(" ".join(own[n] for n in chosen))
            relevant.append({row: 1.0})
    return LongCollection([i for i, _ in kept], texts, queries, relevant)


def _drawn(own: Sequence[str], shared: Counter[str], beyond: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Numbers of the sentences of a query, one of each section, none of another document; [] where one has none."""
    lengths = [len(s.split()) for s in own]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    edges = np.linspace(beyond, sum(lengths), parts + 1)
    chosen = []
    for first, last in itertools.pairwise(edges):
        fit = [
            n for n, s in enumerate(own)
            if first <= starts[n] < last and WORDS[0] <= lengths[n] <= WORDS[1] and shared[s] == 1 and own.count(s) == 1
        ]  # fmt: skip
        if not fit:
            return []
        chosen.append(int(rng.choice(fit)))
    return chosen


def first_words(texts: Sequence[str], count: int) -> list[str]:
    """What an encoder of so many words reads."""
    return [" ".join(t.split()[:count]) for t in texts]


def headroom(collection: LongCollection, words: int = 512) -> tuple[float, float]:
    """nDCG@10 of BM25 on the first `words` of every document, and on all: what reading on is worth."""
    figures = []
    for texts in (first_words(collection.texts, words), collection.texts):
        ids_QK = BM25.build(texts).search(collection.queries, 10).ids_QK
        figures.append(float(metrics.ndcgs(ids_QK, collection.relevant).mean()))
    return figures[0], figures[1]
