"""Judged collections in the layout of BEIR, and retrievers compared on them with intervals and paired tests.

    FOLDER/corpus.jsonl  queries.jsonl  qrels/SPLIT.tsv        as BEIR publishes them
    FOLDER/corpus.parquet  queries.parquet  qrels.parquet      the same as tables

Shape letters: Q queries, K results.

BEIR is Thakur et al. 2021, arXiv:2104.08663. A relevant document that is not in the corpus counts as missed.
Differences of two rankings are taken query by query: their interval is a bootstrap over queries, their p value a
randomization test that swaps the two rankings of a query (Smucker, Allan and Carterette 2007, CIKM).
"""

from __future__ import annotations

import csv
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve import fusion, metrics
from modicum.retrieve.indexes import Hits
from modicum.retrieve.known_item import read_collection, read_judgements
from modicum.retrieve.passages import indexed_text

METRICS = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
DEPTH = 100  # results that a ranking keeps
FIT = 40  # queries from which half of them is enough to fit weights on


@dataclass(frozen=True)
class Collection:
    """Passages as they are indexed, queries, and the grades of the rows judged for each (-2 and below: absent)."""

    name: str
    ids: list[str]
    texts: list[str]
    queries: list[str]
    relevant: list[dict[int, float]]

    @classmethod
    def open(cls, folder: str | Path, split: str = "test", limit: int | None = None) -> Collection:
        """Queries without a judgement above 0 are left out; `limit` keeps the first ones."""
        folder = Path(folder)
        if (folder / "corpus.parquet").is_file():
            rows = list(read_collection(folder / "corpus.parquet"))
            ids, texts = [p.id for p in rows], [indexed_text(p) for p in rows]
            _, queries, grades = read_judgements(folder / "queries.parquet", folder / "qrels.parquet")
        else:
            ids, texts, queries, grades = _beir(folder, split)
        row_of: dict[str, int] = {}
        for row, name in enumerate(ids):
            if row_of.setdefault(name, row) != row:
                raise UserError(f"{folder}: document id {name!r} appears twice; give every document an id of its own")
        relevant = [{row_of.get(d, -2 - n): g for n, (d, g) in enumerate(judged.items())} for judged in grades]
        return cls(folder.name, ids, texts, queries[:limit], relevant[:limit])


def _beir(folder: Path, split: str) -> tuple[list[str], list[str], list[str], list[dict[str, float]]]:
    qrels = folder / "qrels" / f"{split}.tsv"
    for path in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels):
        if not path.is_file():
            raise UserError(
                f"{folder} lacks {path.relative_to(folder)}; give a folder with corpus, queries and qrels, as .jsonl "
                "and .tsv or as .parquet"
            )
    documents = list(_lines(folder / "corpus.jsonl"))
    texts = [f"{d['title']}\n{d['text']}" if d.get("title") else d["text"] for d in documents]
    grades: dict[str, dict[str, float]] = defaultdict(dict)
    with open(qrels, encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if number == 1 and row[-1] in ("score", "relevance"):
                continue
            try:
                query, document, grade = row
                grades[query][document] = float(grade)
            except ValueError:
                raise UserError(f"{qrels}, line {number}: {row} is not query-id, corpus-id, score") from None
    judged = [
        (q["text"], grades[q["_id"]])
        for q in _lines(folder / "queries.jsonl")
        if any(g > 0 for g in grades.get(q["_id"], {}).values())
    ]
    if not judged:
        raise UserError(f"no query of {folder} has a relevant document in {qrels}; check that their ids agree")
    return [d["_id"] for d in documents], texts, [text for text, _ in judged], [g for _, g in judged]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    yield {"_id": row["_id"], "text": row["text"]} | row
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: not an object with _id and text ({error!r})") from None


def evaluate(
    collection: Collection, choices: Sequence[Any], *, fuse: bool = False, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Every retriever on all queries: figures with 95% intervals, and differences to the first one, paired.

    {"retrievers": {name: {metric: {mean, low, high}, "seconds_per_query", "bytes"}}, "paired": [{a, b, metric,
    difference, low, high, p}]}. fuse: their fusion by scores (`fused`) and by ranks (`fused-ranks`) as well, compared
    with each of them. The weights of the scores are fitted on a random half of the queries, and all figures are of the
    other half; below `FIT` queries they are equal, and all queries count. "weights" says which, "fitted_on" how many.
    """
    rankings: dict[str, Hits] = {}
    extra: dict[str, dict[str, float]] = {}
    for choice in choices:
        name = str(Choice.parse("retriever", choice))
        made = build("retriever", choice, device)
        made.build(collection.texts)
        start = time.perf_counter()
        rankings[name] = made.rank(collection.queries, DEPTH)
        taken = (time.perf_counter() - start) / len(collection.queries)
        extra[name] = {"seconds_per_query": taken, "bytes": float(made.nbytes())}
    judged_J, fit = np.arange(len(collection.queries)), {}
    if fuse and len(rankings) > 1:
        several, weights, others_F = list(rankings.values()), [1 / len(rankings)] * len(rankings), judged_J[:0]
        if len(judged_J) >= FIT:
            order = np.random.default_rng(seed).permutation(len(judged_J))
            others_F, judged_J = np.sort(order[::2]), np.sort(order[1::2])
            weights = fusion.fitted([_rows(h, others_F) for h in several], [collection.relevant[q] for q in others_F])
        rankings |= {"fused": fusion.fuse(several, DEPTH, weights), "fused-ranks": fusion.fuse_ranks(several, DEPTH)}
        fit = {"weights": dict(zip(rankings, weights, strict=False)), "fitted_on": len(others_F)}
    relevant = [collection.relevant[q] for q in judged_J]
    values = {name: per_query(_rows(hits, judged_J), relevant) for name, hits in rankings.items()}
    first, *others = values
    pairs = [(other, first) for other in others]
    if "fused" in values:
        pairs += [("fused", name) for name in others if name != "fused"]
    return fit | {
        "collection": collection.name,
        "passages": len(collection.texts),
        "queries": len(judged_J),
        "retrievers": {
            name: {metric: _interval(v, seed) for metric, v in by_metric.items()} | extra.get(name, {})
            for name, by_metric in values.items()
        },
        "paired": [
            {"a": a, "b": b, "metric": metric} | paired(values[a][metric], values[b][metric], seed)
            for a, b in pairs
            for metric in METRICS[:2]
        ],
    }


def _rows(hits: Hits, rows_J: np.ndarray) -> Hits:
    return Hits(hits.ids_QK[rows_J], hits.scores_QK[rows_J])


def per_query(hits: Hits, relevant: metrics.Relevant) -> dict[str, np.ndarray]:
    """{metric: values_Q}."""
    ids_QK = hits.ids_QK
    return {
        "ndcg@10": metrics.ndcgs(ids_QK, relevant, 10),
        "mrr@10": metrics.reciprocal_ranks(ids_QK, relevant, 10),
        "recall@10": metrics.recalls(ids_QK, relevant, 10),
        "recall@100": metrics.recalls(ids_QK, relevant, 100),
    }


def _means(values_Q: np.ndarray, samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([values_Q[rng.integers(0, len(values_Q), len(values_Q))].mean() for _ in range(samples)])


def _interval(values_Q: np.ndarray, seed: int, samples: int = 1000) -> dict[str, float]:
    low, high = np.percentile(_means(values_Q, samples, seed), (2.5, 97.5))
    return {"mean": float(values_Q.mean()), "low": float(low), "high": float(high)}


def paired(a_Q: np.ndarray, b_Q: np.ndarray, seed: int = 0, samples: int = 2000) -> dict[str, float]:
    """a minus b: {difference, low, high, p}. p is two-sided: how often random signs of the queries' differences give
    a mean as far from 0."""
    difference_Q = np.asarray(a_Q, float) - np.asarray(b_Q, float)
    rng = np.random.default_rng(seed)
    signs_SQ = rng.integers(0, 2, (samples, len(difference_Q))) * 2 - 1
    random_S = np.abs((signs_SQ * difference_Q).mean(1))
    p = (1 + int((random_S >= abs(difference_Q.mean()) - 1e-12).sum())) / (samples + 1)
    interval = _interval(difference_Q, seed)
    return {"difference": interval["mean"], "low": interval["low"], "high": interval["high"], "p": p}
