"""Rerankers and readers: CUR against numpy, windows against an exact judge, loss weights and layouts by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.data.passages import Passage
from modicum.retrieve.readers.long_context_rag import tuning_pairs
from modicum.retrieve.rerankers import Scorer
from modicum.retrieve.rerankers.full_ranking import complete_order, importance_loss, label, label_weights, prompt
from modicum.retrieve.rerankers.window import permutation
from modicum.retrieve.search import Hit


def matrix(rank: int, queries: int = 60, passages: int = 80, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((queries, rank)) @ rng.standard_normal((rank, passages))


def scorer(scores_QP: np.ndarray) -> Scorer:
    def score(query: str, texts: Sequence[str]) -> list[float]:
        return [scores_QP[int(query), int(t)] for t in texts]

    def order(query: str, texts: Sequence[str]) -> str:
        return label(np.argsort([-s for s in score(query, texts)], kind="stable").tolist())

    return Scorer([str(p) for p in range(scores_QP.shape[1])], score=score, order=order)


# cur ------------------------------------------------------------------------------------------------------------


def test_cur_recovers_a_matrix_of_low_rank():
    """Rows of queries that were never scored whole, from their scores on 8 anchors, at rank 6."""
    scores = matrix(6)
    made = build("reranker", "cur-cross-encoder:rcond=1e-12", scorer(scores))
    anchors = np.arange(0, 80, 10)
    vectors_AP = np.linalg.pinv(scores[:40][:, anchors], rcond=1e-12) @ scores[:40]
    assert np.allclose(scores[40:][:, anchors] @ vectors_AP, scores[40:], atol=1e-8)
    made.fit(scores[:40], anchors)
    for q in range(40, 60):
        rows, approximate = made.approximate(scores[q, anchors], 80)
        assert np.allclose(approximate, scores[q, rows], atol=1e-4)


def test_cur_is_the_naive_product_on_noise_and_not_a_least_squares_fit_on_items():
    scores = np.random.default_rng(0).standard_normal((60, 80))
    made = build("reranker", "cur-cross-encoder:rcond=0", scorer(scores))
    anchors = np.arange(0, 80, 8)
    made.fit(scores[:40], anchors)
    rows, approximate = made.approximate(scores[50, anchors], 80)
    naive = scores[50, anchors] @ np.linalg.pinv(scores[:40][:, anchors]) @ scores[:40]
    assert np.allclose(approximate, naive[rows], atol=1e-4)
    vt = np.linalg.svd(scores[:40], full_matrices=False)[2]
    truncated = (scores[50] @ vt[:10].T) @ vt[:10]  # needs the query's whole row
    assert not np.allclose(naive, truncated, atol=0.1)
    lengths = np.linalg.norm(made.index.vectors_ND, axis=1)
    assert lengths.max() > 1.2 * lengths.min(), "vectors keep their lengths"


def test_the_budget_covers_anchors_and_exact_scores():
    scores = matrix(6)
    judge = scorer(scores)
    made = build("reranker", "cur-cross-encoder:calls=20,anchors=0.4,queries=30", judge)
    made.prepare([str(q) for q in range(40)])
    assert judge.calls == 30 * 80 and len(made.anchors_A) == 8
    before = judge.calls
    rows = made.rank("50", np.arange(80), 10)
    assert judge.calls - before == 20
    assert np.array_equal(rows, np.argsort(-scores[50])[:10]), "a matrix of rank 6 leaves no doubt"


def test_an_anchors_exact_score_beats_its_approximation():
    scores = matrix(3) + np.random.default_rng(1).standard_normal((60, 80))
    made = build("reranker", "cur-cross-encoder:calls=12,anchors=0.99,rcond=0.3", scorer(scores))
    made.prepare([str(q) for q in range(40)])
    rows = made.rank("55", np.arange(80), 5)
    anchors = made.anchors_A[np.argsort(-scores[55, made.anchors_A])]
    assert rows.tolist() == anchors[:5].tolist()
    with pytest.raises(UserError, match="prepare"):
        build("reranker", "cur-cross-encoder", scorer(scores)).rank("1", np.arange(80), 3)


def test_cur_needs_fewer_calls_than_reranking_poor_candidates():
    scores = matrix(8, seed=3)
    recall = {}
    for choice in ("pointwise:calls=24", "cur-cross-encoder:calls=24,queries=40"):
        made = build("reranker", choice, scorer(scores))
        made.prepare([str(q) for q in range(40)])
        got = [made.rank(str(q), np.random.default_rng(q).permutation(80), 10) for q in range(40, 60)]
        recall[choice] = np.mean([np.isin(np.argsort(-scores[40 + i])[:10], rows).mean() for i, rows in enumerate(got)])
    poor, good = recall.values()
    assert poor < 0.5 < 0.95 < good


# windows and whole lists ----------------------------------------------------------------------------------------


def test_one_pass_of_windows_settles_the_first_and_passes_settle_all():
    scores = matrix(5)
    truth = np.argsort(-scores[7], kind="stable")
    worst_first = truth[::-1].copy()
    window = build("reranker", "window:size=20,step=10", scorer(scores))
    once = window.rank("7", worst_first, 80)
    assert np.array_equal(once[:10], truth[:10]) and not np.array_equal(once, truth)
    settled: list[int] = []
    complete = complete_order("7", worst_first, window, settled.append)
    assert np.array_equal(complete, truth) and settled == [10, 20, 30, 40, 50, 60, 80]
    two = build("reranker", "window:size=20,step=10,passes=2", scorer(scores)).rank("7", worst_first, 80)
    assert np.array_equal(two[:20], truth[:20])


def test_windows_read_passages_twice_and_a_whole_list_once():
    scores = matrix(5)
    judges = {}
    for choice in ("window:size=20,step=10,depth=80", "full-ranking:depth=80"):
        judges[choice] = scorer(scores)
        rows = build("reranker", choice, judges[choice]).rank("7", np.arange(80), 10)
        assert np.array_equal(rows, np.argsort(-scores[7], kind="stable")[:10])
    window, whole = judges.values()
    assert (window.calls, whole.calls) == (7, 1) and whole.tokens == 81 and window.tokens == 7 * 21


def test_candidates_below_the_depth_stay_behind():
    made = build("reranker", "full-ranking:depth=3", scorer(np.array([[0.0, 1, 2, 3, 4]])))
    assert made.rank("0", np.arange(5), 5).tolist() == [2, 1, 0, 3, 4]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="[]0123456789 >,", max_size=60), st.integers(0, 12))
def test_any_reply_gives_a_permutation(reply, count):
    assert sorted(permutation(reply, count)) == list(range(count))


def test_replies_are_read():
    assert permutation("[3] > [1]", 4) == [2, 0, 1, 3]
    assert permutation("2 > 2 > 9 > 0 > 1", 3) == [1, 0, 2]
    assert permutation("I cannot rank these.", 3) == [0, 1, 2]
    assert label([2, 0, 1]) == "[3] > [1] > [2]" and "[2] b" in prompt("q", ["a", "b"])


def test_the_loss_weighs_numbers_by_their_rank():
    """ "[10] > [2]": every token of a number shares its weight; separators weigh 1; divided by the tokens."""
    text = "[10] > [2] > [3]"
    offsets = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 7), (7, 8), (8, 10), (10, 13), (13, 14), (14, 15), (15, 16)]
    weights = label_weights(text, offsets)
    second, third = 1 + 1 / np.log2(3), 1 + 1 / np.log2(4)
    assert np.allclose(weights, [1, 2, 2, 1, 1, 1, second, 1, 1, third, 1])
    assert weights[1] == 2.0, "rank 1, base 2"
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((11, 5)))
    targets = torch.arange(11) % 5
    nll = -torch.log_softmax(logits, -1)[torch.arange(11), targets].numpy()
    loss = importance_loss(logits, targets, torch.from_numpy(weights)).item()
    assert np.isclose(loss, (nll * weights).sum() / 11) and not np.isclose(loss, (nll * weights).sum() / weights.sum())


def test_a_scorer_says_what_it_cannot_do():
    only_pairs = Scorer(["a", "b"], score=lambda q, texts: [0.0] * len(texts))
    with pytest.raises(UserError, match="language model"):
        build("reranker", "window", only_pairs).rank("q", np.arange(2), 1)
    only_lists = Scorer(["a", "b"], order=lambda q, texts: "[1]")
    with pytest.raises(UserError, match="cross-encoder"):
        build("reranker", "pointwise", only_lists).rank("q", np.arange(2), 1)


# readers --------------------------------------------------------------------------------------------------------


def test_the_best_stand_at_both_ends():
    made = build("reader", "long-context-rag")
    by_hand = {
        1: [1],
        2: [1, 2],
        3: [1, 3, 2],
        4: [1, 3, 4, 2],
        5: [1, 3, 5, 4, 2],
        6: [1, 3, 5, 6, 4, 2],
        7: [1, 3, 5, 7, 6, 4, 2],
    }
    for count, ranks in by_hand.items():
        assert [r + 1 for r in made.order(count)] == ranks
        restored = np.argsort(made.order(count))
        assert np.array_equal(np.array(made.order(count))[restored], np.arange(count))
    assert build("reader", "reversed").order(3) == [2, 1, 0] and build("reader", "ranked").order(3) == [0, 1, 2]


def test_tuning_pairs_hold_hard_negatives_and_say_whether_the_gold_is_there():
    rows = [Passage(f"p{i}", f"Passage {i} says that thing {i} is number {i}.", "s", "") for i in range(10)]

    def search(question: str, k: int) -> list[Hit]:
        first = int(question.split()[-1])
        return [Hit(rows[(first + j) % 10], 1.0, {}) for j in range(k)]

    made = tuning_pairs(
        build("reader", "long-context-rag"),
        [(f"What is thing {i}", str(i), f"p{(i + 3) % 10}") for i in range(10)],
        search,
        ks=(2, 8),
        count=lambda t: len(t.split()),
    )
    assert {m["k"] for m in made} == {2, 8} and all(m["gold"] == (m["k"] == 8) for m in made)
    for i, m in enumerate(made):
        system, user, assistant = m["messages"]
        assert assistant == {"role": "assistant", "content": str(i)} and user["content"].count("Passage ") == m["k"]
        assert user["content"].rstrip().endswith("Short answer:") and system["role"] == "system"
