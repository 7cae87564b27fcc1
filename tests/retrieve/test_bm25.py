"""BM25, tokenisation, fusion and metrics against naive computations."""

import math
from collections import Counter

import numpy as np
import pytest

from modicum.core.errors import CorruptError
from modicum.retrieve import metrics
from modicum.retrieve.bm25 import BM25, tokenize
from modicum.retrieve.fusion import fitted, fuse, fuse_ranks, normalized, reciprocal_rank
from modicum.retrieve.indexes import Hits

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a lazy dog sleeps",
    "json.loads parses a string",
    "",
    "dumps serializes an object to a JSON string",
    "the dog and the other dog",
    "quick sort sorts quickly",
]


def naive_bm25(texts: list[str], query: str, k1: float, b: float) -> np.ndarray:
    rows = [tokenize(t) for t in texts]
    mean = sum(map(len, rows)) / len(rows)
    scores = []
    for row in rows:
        counts, score = Counter(row), 0.0
        for term in tokenize(query):
            df = sum(term in r for r in rows)
            idf = math.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
            score += idf * counts[term] / (counts[term] + k1 * (1 - b + b * len(row) / mean))
        scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize("k1,b", [(1.5, 0.75), (0.9, 0.4)])
@pytest.mark.parametrize("query", ["lazy dog", "dog dog quick", "parse JSON strings", "unseen words"])
def test_scores_follow_the_formula(query, k1, b):
    got = BM25.build(TEXTS, k1=k1, b=b).scores(query)
    assert np.allclose(got, naive_bm25(TEXTS, query, k1, b), atol=1e-5)


def test_search_orders_ties_by_row_and_leaves_out_what_shares_no_term():
    index = BM25.build(["x y", "x z", "q", "x w", "x x"])
    hits = index.search(["x", "nothing", ""], 3)
    assert hits.ids_QK.tolist() == [[4, 0, 1], [-1] * 3, [-1] * 3]
    assert np.isneginf(hits.scores_QK[1:]).all() and (np.diff(hits.scores_QK[0]) <= 0).all()
    assert index.search(["x"], 9, np.array([0, 2, 3])).ids_QK[0].tolist() == [0, 3] + [-1] * 7


def test_saved_index_holds_no_pickle_and_answers_the_same(tmp_path):
    index = BM25.build(TEXTS)
    index.save(tmp_path)
    for path in tmp_path.iterdir():
        assert path.suffix in (".json", ".npy")
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
    again = BM25.load(tmp_path, len(TEXTS))
    assert np.array_equal(again.search(["lazy dog json"], 5).ids_QK, index.search(["lazy dog json"], 5).ids_QK)
    assert again.nbytes() == index.nbytes() > 0
    with pytest.raises(CorruptError, match="rows"):
        BM25.load(tmp_path, len(TEXTS) + 1)


@pytest.mark.parametrize("texts", [[], ["", "  ... "]])
def test_nothing_to_index_finds_nothing(texts, tmp_path):
    index = BM25.build(texts)
    index.save(tmp_path)
    for one in (index, BM25.load(tmp_path, len(texts))):
        assert (one.search(["word"], 2).ids_QK == -1).all()


@pytest.mark.parametrize(
    "text,terms",
    [
        ("json.loads", ["json.load", "json", "load"]),
        ("parseHTMLDoc", ["parsehtmldoc", "parse", "html", "doc"]),
        ("snake_case_name", ["snake_case_name", "snake", "case", "name"]),
        ("__init__", ["init"]),
        ("utf8 3.14", ["utf8", "utf", "8", "3.14", "3", "14"]),
        ("Queries classes pass us", ["query", "classe", "pass", "us"]),
        ("Éléphants naïve", ["elephant", "naive"]),
        ("日本語 文", ["日本", "本語", "文"]),
        ("end. Start", ["end", "start"]),
    ],
)
def test_tokens_suit_code_and_prose(text, terms):
    assert tokenize(text) == terms


def test_a_query_matches_an_identifier_by_its_parts():
    index = BM25.build(["def readFileSync(path)", "def write_file(path)", "class Reader"])
    assert index.search(["how to read a file"], 1).ids_QK[0, 0] == 0
    assert index.search(["read_file_sync"], 1).ids_QK[0, 0] == 0


def test_reciprocal_rank_fusion_follows_the_formula():
    a, b = [7, 3, 9], [3, 5]
    expected = {7: 1 / 61, 3: 1 / 62 + 1 / 61, 9: 1 / 63, 5: 1 / 62}
    got = reciprocal_rank([a, b])
    assert [i for i, _ in got] == [3, 7, 5, 9] and all(math.isclose(s, expected[i]) for i, s in got)
    x = Hits(np.array([a, [-1, -1, -1]]), np.zeros((2, 3), np.float32))
    y = Hits(np.array([b, [4, -1]]), np.zeros((2, 2), np.float32))
    fused = fuse_ranks([x, y], 5)
    assert fused.ids_QK.tolist() == [[3, 7, 5, 9, -1], [4, -1, -1, -1, -1]]
    assert np.isclose(fused.scores_QK[1, 0], 1 / 61) and np.isneginf(fused.scores_QK[1, 1:]).all()


def hits(ids, scores) -> Hits:
    return Hits(np.array(ids), np.array(scores, np.float32))


def test_scores_are_fused_between_the_least_and_the_most_of_each_query():
    inf = np.inf
    a = hits([[7, 3, 9], [4, -1, -1]], [[12.0, 9.0, 2.0], [5.0, -inf, -inf]])
    b = hits([[3, 5, 8], [-1, -1, -1]], [[0.9, 0.5, 0.1], [-inf, -inf, -inf]])
    assert np.allclose(normalized(a), [[1, 0.7, 0], [1, 0, 0]]) and not normalized(b)[1].any()
    fused = fuse([a, b], 5, [0.6, 0.4])
    assert fused.ids_QK.tolist() == [[3, 7, 5, 9, 8], [4, -1, -1, -1, -1]]
    assert np.allclose(fused.scores_QK[0], [0.6 * 0.7 + 0.4, 0.6, 0.4 * 0.5, 0, 0])
    assert np.isclose(fused.scores_QK[1, 0], 0.6) and np.isneginf(fused.scores_QK[1, 1:]).all()
    shifted = hits(a.ids_QK, 3 * a.scores_QK - 50)  # neither scale nor offset of a ranking matters
    assert np.array_equal(fuse([shifted, b], 5, [0.6, 0.4]).ids_QK, fused.ids_QK)


def test_the_weight_is_that_of_the_better_ranking():
    """Of all queries one ranking has the right row first, the other a wrong one: that one may not weigh more."""
    right = hits([[1, 2, 3]] * 30, [[3.0, 2.0, 1.0]] * 30)
    wrong = hits([[5, 6, 1]] * 30, [[9.0, 8.0, 1.0]] * 30)
    weights = fitted([wrong, right], [{1: 1.0}] * 30)
    assert np.isclose(sum(weights), 1) and weights[1] > 0.5
    assert fuse([wrong, right], 3, weights).ids_QK[0, 0] == 1
    assert fitted([right, right], [{1: 1.0}] * 30) == [0.5, 0.5], "equals: nearest to equal weights"
    assert len(fitted([right, wrong, wrong], [{1: 1.0}] * 30)) == 3


def naive_metrics(ids: list[int], grades: dict[int, float], k: int) -> tuple[float, float, float]:
    top = [i for i in ids[:k] if i >= 0]
    rr = next((1 / r for r, i in enumerate(ids[:k], 1) if i >= 0 and grades.get(i, 0) > 0), 0.0)
    wanted = [i for i, g in grades.items() if g > 0]
    recall = sum(i in wanted for i in top) / len(wanted) if wanted else 0.0
    dcg = sum(grades.get(i, 0) / math.log2(r + 1) for r, i in enumerate(ids[:k], 1) if i >= 0)
    ideal = sum(g / math.log2(r + 1) for r, g in enumerate(sorted(grades.values(), reverse=True)[:k], 1))
    return rr, recall, dcg / ideal if ideal else 0.0


@pytest.mark.parametrize("k", [1, 5, 10, 30])
def test_metrics_agree_with_a_naive_computation(k):
    rng = np.random.default_rng(k)
    ids = np.stack([rng.permutation(40)[:20] for _ in range(50)])
    ids[rng.random(ids.shape) < 0.1] = -1
    relevant = [
        {int(i): float(g) for i, g in zip(rng.permutation(40)[:n], rng.integers(0, 4, n), strict=True)}
        for n in rng.integers(0, 9, 50)
    ]
    expected = np.array([naive_metrics(row, grade, k) for row, grade in zip(ids.tolist(), relevant, strict=True)])
    got = [metric(ids, relevant, k) for metric in (metrics.reciprocal_ranks, metrics.recalls, metrics.ndcgs)]
    assert np.allclose(np.stack(got, axis=1), expected)


def test_bootstrap_error_is_near_the_textbook_one():
    values = np.random.default_rng(0).random(400)
    assert math.isclose(metrics.bootstrap_error(values), values.std(ddof=1) / 20, rel_tol=0.1)
    assert metrics.bootstrap_error(values) == metrics.bootstrap_error(values)
    assert math.isnan(metrics.bootstrap_error(values[:1]))
