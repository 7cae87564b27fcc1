"""colberter: forward and score against plain loops in float64, gates, exact matches, what is stored; retrievers."""

import numpy as np
import pytest
import torch

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve.retrievers import open_retriever
from modicum.retrieve.retrievers.colberter import ColBERTerStore
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.training import Training, train
from modicum.retrieve.wordwise import NOTHING, WordHeads, unique_words, word_key, word_scores

TEXTS = ["Merge the file, then merge the queue.", "To lock a thread call lock_thread.", "a"]


@pytest.fixture(scope="module")
def student() -> Student:
    pairs = toy_pairs(False)
    return Student.new([*pairs.queries, *pairs.passages, *TEXTS], width=16, layers=1, heads=2, vocabulary=340).eval()


def heads_of(student: Student, **more) -> WordHeads:
    torch.manual_seed(0)
    made = WordHeads(student.width, 6, 5, more.pop("last", None), more.pop("gates", True))
    if made.gate is not None:
        torch.nn.init.normal_(made.gate.weight)
        torch.nn.init.constant_(made.gate.bias, 0.1)
    with torch.no_grad():
        made.balance.fill_(0.4)
    return made


def naive(student: Student, heads: WordHeads, text: str, document: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(c, vector of every word with an open gate), word by word in float64."""
    with torch.no_grad():
        states = student([text])
    h = states.layers[-1][0].double().numpy()
    weight = {n: p.detach().double().numpy() for n, p in heads.named_parameters()}
    numbers, result = states.words_NT[0].tolist(), {}
    for number, word in enumerate(states.vocabulary_N[0]):
        at = [t for t, w in enumerate(numbers) if w == number]
        v = np.mean([weight["words.weight"] @ h[t] for t in at], axis=0)
        g = max(0.0, float(weight["gate.weight"][0] @ v + weight["gate.bias"][0])) if document and heads.gate else 1.0
        v = g * v
        if heads.last is not None:
            v = weight["last.weight"] @ v
        if g > 0:
            result[word] = v
    return weight["whole.weight"] @ h[0], result


def naive_score(heads: WordHeads, query, document, exact: bool) -> float:
    weight = 1 / (1 + np.exp(-0.4))
    total = 0.0
    for word, q in query[1].items():
        matches = [q @ d if not exact or w == word else 0.0 for w, d in document[1].items()]
        total += max(matches) if matches else 0.0
    return weight * query[0] @ document[0] + (1 - weight) * total


@pytest.mark.parametrize("last,exact", [(None, False), (3, False), (1, True)])
def test_model_store_and_loops_give_one_score(student, last, exact):
    heads = heads_of(student, last=last)
    store = ColBERTerStore.of(student, heads, exact=exact)
    store.build(TEXTS)
    query = "merge a queue"
    hits = store.rank([query], 3)
    for row, score in zip(hits.ids_QK[0].tolist(), hits.scores_QK[0], strict=True):
        expected = naive_score(
            heads, naive(student, heads, query, False), naive(student, heads, TEXTS[row], True), exact
        )
        assert np.isclose(score, expected, atol=2e-3), (row, score, expected)  # the store keeps float16
    with torch.no_grad():
        q = heads(student([query] * 3), document=False)
        d = heads(student(TEXTS), document=True)
        merged, whole = heads.score(q, d, exact=exact)
    if all(len(naive(student, heads, t, True)[1]) == len(student([t]).vocabulary_N[0]) for t in TEXTS) or exact:
        assert np.allclose(sorted(merged.tolist()), sorted(hits.scores_QK[0].tolist()), atol=2e-3)
    assert np.isclose(
        whole[0], naive(student, heads, query, False)[0] @ naive(student, heads, TEXTS[0], True)[0], atol=1e-4
    )


def test_words_are_means_over_all_their_occurrences(student):
    states = student(TEXTS[:1])
    words = states.vocabulary_N[0]
    assert words[:4] == ["merge", "the", "file", ","] and words.count("merge") == 1, "whole words, each once"
    x = torch.randn(1, states.words_NT.shape[1], 4)
    vectors, mask = unique_words(x, states.words_NT)
    at = states.words_NT[0] == 0
    assert at.sum() >= 2 and torch.allclose(vectors[0, 0], x[0, at].mean(0), atol=1e-6)
    assert not torch.allclose(vectors[0, 0], x[0, at].sum(0)) and mask.sum() == len(words)


def test_closed_words_are_neither_scored_nor_stored(student):
    heads = heads_of(student)
    with torch.no_grad():
        heads.gate.bias.fill_(-100.0)
    store = ColBERTerStore.of(student, heads, exact=False)
    store.build(TEXTS)
    assert len(store.words_SE) == 0
    hits = store.rank(["merge a queue"], 3)
    weight = 1 / (1 + np.exp(-0.4))
    for row, score in zip(hits.ids_QK[0].tolist(), hits.scores_QK[0], strict=True):
        q, d = naive(student, heads, "merge a queue", False), naive(student, heads, TEXTS[row], True)
        assert np.isclose(score, weight * q[0] @ d[0], atol=1e-4)
    queries = heads(student(["merge"]), document=False)
    assert (queries.gate_NW[queries.mask_NW] == 1).all(), "gates act on documents alone"
    with torch.no_grad():
        heads.gate.bias.fill_(100.0)
    whole = ColBERTerStore.of(student, heads, exact=False)
    whole.build(TEXTS)
    assert len(whole.words_SE) == sum(len(student([t]).vocabulary_N[0]) for t in TEXTS)


def test_exact_matches_score_one_word_and_nothing_else(student):
    heads = heads_of(student, last=1, gates=False)
    q = heads(student(["merge xyz"]), document=False)
    d = heads(
        student(
            [
                "merge the file",
            ]
        ),
        document=True,
    )
    one = word_scores(q, d, exact=True)
    shared = q.vectors_NWE[0, 0] @ d.vectors_NWE[0, 0]
    assert torch.isclose(one[0], torch.clamp(shared, min=0.0)), (
        "only the shared word, never below a word without partner"
    )
    other = heads(student(["lock a thread"]), document=True)
    assert word_scores(q, other, exact=True).item() == 0.0, "no shared word scores 0, not the padding's value"
    assert word_scores(q, other, exact=False).item() > NOTHING
    assert word_key("merge") == word_key("merge") != word_key("merges") and word_key("merge") >= 0


def test_padding_changes_nothing(student):
    heads = heads_of(student)
    alone = heads(student(TEXTS[2:]), document=True), heads(student(["merge"]), document=False)
    together = heads(student(TEXTS), document=True), heads(student(["merge", "merge", "merge"]), document=False)
    one = word_scores(alone[1], alone[0], False)
    assert torch.allclose(word_scores(together[1], together[0], False)[2:], one, atol=1e-5)


def test_the_sparsity_term_closes_gates():
    """Gates are real parameters of the loss: with a large weight they end lower than without."""
    pairs = toy_pairs()
    mean = {}
    for weight in (0.0, 50.0):
        student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)
        trainer = build("trainer", f"colberter:whole=16,words=8,sparsity={weight}", pairs)
        train(student, trainer, Training(steps=25, batch=8, lr=3e-3))
        with torch.no_grad():
            words = trainer.heads(student(list(pairs.passages)), document=True)
        mean[weight] = float(words.gate_NW.sum() / words.mask_NW.sum())
    assert mean[50.0] < mean[0.0] - 0.05, mean


def test_a_trained_folder_is_a_retriever(tmp_path):
    pairs = toy_pairs()
    student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)
    trainer = build("trainer", "colberter:whole=16,words=8", pairs)
    train(student, trainer, Training(steps=3, batch=8), out=tmp_path / "model")
    made = build("retriever", {"method": "colberter", "model": str(tmp_path / "model")})
    made.build(pairs.passages)
    hits, bytes_each = trainer.ranking(student, pairs.passages, pairs.queries[:4], 5)
    assert np.array_equal(made.rank(pairs.queries[:4], 5).ids_QK, hits.ids_QK) and bytes_each == made.nbytes() / 36
    made.save(tmp_path / "index")
    assert np.array_equal(open_retriever(tmp_path / "index").rank(pairs.queries[:4], 5).ids_QK, hits.ids_QK)
    with pytest.raises(UserError, match="in memory alone"):
        ColBERTerStore.of(student, trainer.heads, exact=False).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"colberter\.json"):
        build("retriever", {"method": "colberter", "model": str(tmp_path)})
    with pytest.raises(UserError, match="exact=true"):
        build("trainer", "colberter:last=1", pairs)


def test_late_interaction_compares_tokens_and_not_means(tmp_path):
    pairs = toy_pairs()
    Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330).save(tmp_path / "m")
    encoder = f"sentence-transformers:model={tmp_path / 'm'}"
    made = build("retriever", {"method": "late", "encoder": encoder})
    made.build(pairs.passages)
    q = made.encoder.tokens(["how to lock one queue"], "query")[0]
    docs = made.encoder.tokens(list(pairs.passages))
    expected = [sum(max(float(a @ b) for b in d) for a in q) for d in docs]
    hits = made.rank(["how to lock one queue"], 36)
    assert np.allclose(hits.scores_QK[0], np.sort(expected)[::-1], atol=1e-2)
    shallow = build("retriever", {"method": "late", "encoder": encoder, "depth": 5})
    shallow.build(pairs.passages)
    assert (shallow.rank(["how to lock one queue"], 4).ids_QK >= 0).all()
