"""What holds for any reranker: each row once, calls counted, a scorer that knows the truth is believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modicum.core import registry
from modicum.retrieve.rerankers import Reranker, Scorer

P, RANK = 60, 5


def _scorer() -> tuple[Scorer, np.ndarray]:
    """Passage i's text is "i"; scores are products of a few hidden coordinates of query and passage."""
    rng = np.random.default_rng(0)
    truth_QP = rng.standard_normal((40, RANK)) @ rng.standard_normal((RANK, P))

    def score(query: str, texts: Sequence[str]) -> list[float]:
        return [float(truth_QP[int(query), int(t)]) for t in texts]

    def order(query: str, texts: Sequence[str]) -> str:
        best = np.argsort([-s for s in score(query, texts)], kind="stable")
        return " > ".join(f"[{i + 1}]" for i in best)

    return Scorer([str(i) for i in range(P)], score=score, order=order), truth_QP


def _made(key: str) -> tuple[Reranker, Scorer, np.ndarray]:
    loaded = registry.load("reranker", key)
    scorer, truth_QP = _scorer()
    made = loaded.cls(getattr(loaded.module, "TOY", None) or loaded.config(), scorer)
    made.prepare([str(q) for q in range(20)])
    return made, scorer, truth_QP


def check_rows_come_once_and_are_passages(key: str) -> None:
    made, _, _ = _made(key)
    rows_C = np.random.default_rng(1).permutation(P)
    for k in (1, 10, 35, P):
        rows_K = made.rank("25", rows_C, k)
        assert len(rows_K) == len(set(rows_K.tolist())) == k and set(rows_K.tolist()) <= set(range(P))
    assert np.array_equal(np.sort(rows_C), np.arange(P)), "the candidates are left as they were"


def check_calls_are_bounded_and_counted(key: str) -> None:
    made, scorer, _ = _made(key)
    before = scorer.calls
    made.rank("25", np.arange(P), 10)
    calls = scorer.calls - before
    assert calls <= getattr(made.config, "calls", P), f"{calls} calls"
    assert (calls == 0) == (scorer.tokens == 0) or before, "calls and tokens are counted together"


def check_a_true_scorer_is_believed(key: str) -> None:
    """The best candidates come out better than they went in, unless nothing is read of them."""
    made, scorer, truth_QP = _made(key)
    before, after = [], []
    for q in range(20, 40):
        rows_C = np.random.default_rng(q).permutation(P)[:12]
        before.append(truth_QP[q, rows_C[:5]].mean())
        after.append(truth_QP[q, made.rank(str(q), rows_C, 5)].mean())
    if not scorer.calls:
        assert before == after
    else:
        assert np.mean(after) > np.mean(before) + 0.5


def check_few_candidates(key: str) -> None:
    made, _, _ = _made(key)
    assert len(made.rank("25", np.array([7]), 1)) == 1
    assert made.rank("25", np.array([7]), 1).dtype == np.int64


def check_the_same_query_gives_the_same_order(key: str) -> None:
    made, again = _made(key)[0], _made(key)[0]
    rows_C = np.random.default_rng(2).permutation(P)
    assert np.array_equal(made.rank("30", rows_C, 20), again.rank("30", rows_C, 20))
