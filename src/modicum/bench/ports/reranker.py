"""reranker: how much of the scorer's own ten best a reranker returns, against the tokens that the scorer reads.

Passages and queries are those of a judged collection (--data) or the documented functions of the Python installation
with the first sentences of their docstrings. The scorer is MaxSim over the token states of `minilm`: late interaction
stands for a cross-encoder, which reads the same tokens. The truth is its ranking of all passages; candidates come from
BM25. Rerankers that order lists are given the scorer's order of each list, so the figures show what windows and
budgets lose, not what a language model gets wrong. The seed draws anchor and test queries.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.bench.ports import trainer as collections
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.retrieve.bm25 import BM25
from modicum.retrieve.encoders import make_encoder
from modicum.retrieve.pairs import max_sim
from modicum.retrieve.rerankers import Scorer

AXES = Axes(quality=Axis("recall_at_10", "higher"), cost=Axis("tokens_per_query", "lower", "tokens"))
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale:
    passages: int = 400
    queries: int = 250  # of which `test` are reranked; the others may be anchors
    test: int = 100
    scorer: str = "minilm"  # an encoder with token states; words: a random vector for each word


QUICK = Scale(passages=60, queries=60, test=20, scorer="words")


def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    passages, queries, truth_QP, record = _scored(settings.data, scale)
    order = np.random.default_rng(seed).permutation(len(queries))
    test, others = order[: scale.test].tolist(), order[scale.test :].tolist()
    number = {text: q for q, text in enumerate(queries)}
    row = {text: p for p, text in enumerate(passages)}

    def score(query: str, texts: Any) -> Any:
        return truth_QP[number[query], [row[t] for t in texts]]

    def ordered(query: str, texts: Any) -> str:
        return " > ".join(f"[{i + 1}]" for i in np.argsort(-score(query, texts), kind="stable"))

    scorer = Scorer(passages, score=score, order=ordered)
    made = registry.build("reranker", choice, scorer)
    made.prepare([queries[q] for q in others])
    offline = scorer.calls
    scorer.calls = scorer.tokens = 0
    bm25 = BM25.build(passages)
    recall: dict[int, list[float]] = {1: [], 10: [], 50: []}
    for q in test:
        ids = bm25.search([queries[q]], len(passages)).ids_QK[0]
        ids = ids[ids >= 0]
        candidates = np.concatenate([ids, np.setdiff1d(np.arange(len(passages)), ids)])
        rows = made.rank(queries[q], candidates, min(50, len(passages)))
        best = np.argsort(-truth_QP[q], kind="stable")
        for k, values in recall.items():
            values.append(float(np.isin(best[:k], rows[:k]).mean()))
    return Measurement(
        metrics={
            **{f"recall_at_{k}": float(np.mean(v)) for k, v in recall.items()},
            "calls_per_query": scorer.calls / len(test),
            "tokens_per_query": scorer.tokens / len(test),
            "offline_calls": float(offline),
        },
        cost=Cost(tokens=scorer.tokens),
        data=record,
    )


@functools.lru_cache(maxsize=2)
def _scored(source: str | None, scale: Scale) -> tuple[list[str], list[str], np.ndarray, dict[str, Any]]:
    """Passages, queries, and the scorer's scores_QP of all pairs."""
    data = collections.material(source, collections.Scale(pairs=scale.queries, queries=scale.queries, max_tokens=96))
    used = sorted({r for judged in data.relevant for r in judged})
    rows = (used + sorted(set(range(len(data.passages))) - set(used)))[: scale.passages]
    passages = list(dict.fromkeys(" ".join(data.passages[r].split()[:96]) for r in rows))
    queries = list(dict.fromkeys(data.queries))[: scale.queries]
    if scale.scorer == "words":
        words = sorted({w for t in (*passages, *queries) for w in t.split()})
        table = dict(zip(words, np.random.default_rng(0).standard_normal((len(words), 16)), strict=True))
        states = [[np.stack([table[w] for w in t.split()]) for t in texts] for texts in (queries, passages)]
    else:
        encoder = make_encoder(scale.scorer)
        states = [encoder.tokens(queries, "query"), encoder.tokens(passages)]
    truth_QP = np.stack([max_sim(q_TD, states[1]) for q_TD in states[0]]).astype(np.float64)
    return passages, queries, truth_QP, data.record | {"passages": len(passages), "queries": len(queries)}
