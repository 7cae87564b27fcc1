"""massiveds: sampling a deep list is searching a sampled store, shards are one index, cleaning in its order, Ray."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve import datastore
from modicum.retrieve.indexes import Hits
from modicum.retrieve.retrievers import open_retriever
from modicum.retrieve.shards import Shards, merged

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((400, 8)).astype(np.float32)
QUERIES = RNG.standard_normal((12, 8)).astype(np.float32)
WORDS = ("ice", "oak", "sun", "fog", "elk", "owl", "ant", "bee", "cod", "dew", "elm", "fir")
TEXTS = [" ".join(np.random.default_rng(n).choice(WORDS, 20)) for n in range(60)]


def one_index(rows: np.ndarray, k: int) -> Hits:
    index = build("index", "exact")
    index.add(rows, VECTORS[rows])
    return index.search(QUERIES, k)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_together_are_one_index(count):
    shards = Shards("exact", count)
    rows = np.arange(400)
    shards.add(rows[:150], VECTORS[:150])
    shards.add(rows[150:], VECTORS[150:])
    hits, whole = shards.search(QUERIES, 20), one_index(rows, 20)
    assert np.array_equal(hits.ids_QK, whole.ids_QK) and np.allclose(hits.scores_QK, whole.scores_QK)
    even = shards.search(QUERIES, 20, range(0, 400, 2))
    assert (even.ids_QK % 2 == 0).all() and np.array_equal(even.ids_QK, one_index(rows[::2], 20).ids_QK)
    few = Shards("exact", count)
    few.add(rows[:5], VECTORS[:5])
    assert ((few.search(QUERIES, 8).ids_QK >= 0).sum(1) == 5).all()


def test_merging_gives_ties_to_the_lower_row():
    a = Hits(np.array([[7, 2, -1]]), np.array([[1.0, 0.5, -np.inf]], np.float32))
    b = Hits(np.array([[4, 9, 3]]), np.array([[1.0, 0.7, 0.5]], np.float32))
    assert merged([a, b], 5).ids_QK.tolist() == [[4, 7, 9, 2, 3]]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_sampled_deep_list_is_the_list_of_a_sampled_store(fraction):
    rows = np.arange(400)
    there = np.array(datastore.sampled(rows.tolist(), fraction, 3))
    assert len(there) == pytest.approx(400 * fraction, abs=40)
    expected = one_index(there, 5).ids_QK
    texts = [str(r) for r in rows]
    result = datastore.cut(one_index(rows, 400), texts, 5, fraction=fraction, seed=3)
    assert result.rows == expected.tolist() and result.shortfalls == 0
    shallow = datastore.cut(one_index(rows, 12), texts, 5, fraction=fraction, seed=3)
    short = sum(len(row) < 5 for row in shallow.rows)
    assert shallow.shortfalls == short and (short > 0) == (fraction < 0.9)
    for row, full in zip(shallow.rows, expected.tolist(), strict=True):
        assert row == full[: len(row)], "what is left of a shallow list is right"


def test_stores_are_the_same_for_every_query_and_nested():
    small, large = (set(datastore.sampled(range(1000), f, 0)) for f in (0.2, 0.6))
    assert small < large and small != set(datastore.sampled(range(1000), 0.2, 1))
    backwards = datastore.sampled(list(range(1000))[::-1], 0.2, 0)
    assert set(backwards) == small and backwards == sorted(small, reverse=True)


def test_duplicates_are_dropped_after_sampling():
    """The better copy is not in the smaller store: its twin must stay, which dropping twins first would lose."""
    seed = 0
    first, second = next(
        (a, b) for a in range(60) for b in range(60) if datastore.lot(a, seed) > 0.5 > datastore.lot(b, seed)
    )
    texts = list(TEXTS)
    texts[second] = texts[first]
    deep = Hits(np.array([[first, second]]), np.array([[2.0, 1.0]], np.float32))
    assert datastore.cut(deep, texts, 2, fraction=0.5, seed=seed).rows == [[second]]
    assert datastore.cut(deep, texts, 2).rows == [[first]], "of the whole store the best copy stays"
    assert datastore.cut(deep, texts, 2, overlap=1.0).rows == [[first, second]]


def test_similarity_counts_runs_of_words():
    words = [f"w{i}" for i in range(60)]
    a, b = " ".join(words), " ".join([*words[:58], "x", "y"])
    grams = [{tuple(t.split()[i : i + 13]) for i in range(48)} for t in (a, b)]
    expected = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    assert datastore.jaccard(datastore.grams(a), datastore.grams(b)) == pytest.approx(expected)
    assert datastore.distinct([0, 1], [a, b]) == [0] and expected > 0.8
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    assert datastore.distinct([0, 1], [a, shuffled]) == [0, 1], "the same words in another order are another text"
    target = " ".join(["v"] * 30 + words[:32] + ["v"] * 30)
    assert datastore.copied(a, target) and not datastore.copied(a, " ".join(["v"] * 30 + words[:31] + ["v"] * 30))


def test_the_best_passage_is_next_to_the_text_and_the_loss_is_of_the_second_half():
    seen = []

    class Reader:
        def log_likelihoods(self, prompts, targets, *, mean):
            seen.append((list(prompts), list(targets), mean))
            return np.full(len(prompts), -float(len(seen)))

    windows = [("first half one", "second one"), ("first half two", "second two")]
    deep = Hits(np.array([[3, 1, 2, 0], [0, 1, 2, 3]]), np.array([[4.0, 3, 2, 1]] * 2, np.float32))
    texts = ["ice", "oak", "sun", "fog"]
    points = datastore.scaling(texts, windows, lambda q, k: deep, Reader(), [1.0], k=2, deep=4)
    assert seen[0] == (["first half one ", "first half two "], ["second one", "second two"], True)
    assert seen[1][0][0] == "oak\n\nfog\n\nfirst half one " and seen[1][1] == seen[0][1]
    assert [(p.fraction, p.passages, p.loss, p.shortfalls) for p in points] == [(0.0, 0, 1.0, 0), (1.0, 4, 2.0, 0)]
    texts[3] = "second one"  # gives the target away
    seen.clear()
    datastore.scaling(texts, windows, lambda q, k: deep, Reader(), [1.0], k=2, deep=4)
    assert seen[1][0][0] == "sun\n\noak\n\nfirst half one "
    for wrong in ([("a", " ")], []):
        with pytest.raises(UserError, match="two halves"):
            datastore.scaling(texts, wrong, lambda q, k: deep, Reader(), [1.0])
    with pytest.raises(UserError, match="fraction 0"):
        datastore.scaling(texts, windows, lambda q, k: deep, Reader(), [0])


def made(**knobs):
    retriever = build("retriever", {"method": "massiveds", "encoder": "lsa:dims=8", **knobs})
    retriever.build(TEXTS)
    return retriever


def test_the_retriever_samples_and_cleans():
    whole = made(overlap=1.0).rank(TEXTS[:5], 60).ids_QK
    half = made(overlap=1.0, fraction=0.5, seed=2).rank(TEXTS[:5], 60).ids_QK
    for full, rows in zip(whole, half, strict=True):
        assert rows[rows >= 0].tolist() == datastore.sampled(full[full >= 0].tolist(), 0.5, 2)
    twins = made()
    twins.add([TEXTS[4]])
    assert len({4, 60} & set(twins.rank([TEXTS[4]], 60).ids_QK[0].tolist())) == 1


@pytest.mark.slow
def test_ray_gives_the_same(tmp_path):
    pytest.importorskip("ray")
    local, ray = made(shards=3), made(shards=3, engine="ray")
    try:
        for retriever in (local, ray):
            retriever.add(["one more ice oak"])
            retriever.remove([3, 8])
        a, b = local.rank(TEXTS[:6], 10), ray.rank(TEXTS[:6], 10)
        assert np.array_equal(a.ids_QK, b.ids_QK) and np.array_equal(a.scores_QK, b.scores_QK)
        assert local.nbytes() == ray.nbytes()
        ray.save(tmp_path / "r")
        again = open_retriever(tmp_path / "r")
        assert np.array_equal(again.rank(TEXTS[:6], 10).ids_QK, a.ids_QK)
        again.shards.close()
    finally:
        ray.shards.close()
    assert replace(ray.config, engine="local") == local.config
