"""hipporag: the walk against linear algebra in float64, a bridge between passages, specificity, removal."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from modicum.core import registry
from modicum.retrieve.retrievers._phrases import Facts, extract, normal, phrases
from modicum.retrieve.retrievers.hipporag import page_rank, synonyms

TEXTS = [
    "Ada Brown\nAda Brown studied in Vienna.",
    "Vienna\nVienna lies on the Danube.",
    "Boris Black\nBoris Black paints in Oslo.",
    "Oslo\nOslo has a harbour near the Fjord.",
    "Gardening\nThe stream that passes where she studied is not known to Carl White.",
]


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    """Vectors that tell phrases apart by their letters: equal names have cosine 1."""

    class Letters:
        def encode(self, texts):
            vectors = np.zeros((len(texts), 27 * 27), np.float32)
            for i, text in enumerate(texts):
                codes = [min(max(ord(c) - 96, 0), 26) for c in text]
                for a, b in zip([0, *codes], [*codes, 0], strict=True):
                    vectors[i, 27 * a + b] += 1
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    monkeypatch.setattr("modicum.retrieve.retrievers.hipporag.make_encoder", lambda *a, **k: Letters())


def made(texts=TEXTS, **knobs):
    retriever = registry.build("retriever", {"method": "hipporag", **knobs})
    retriever.build(list(texts))
    return retriever


def test_the_walk_is_the_solution_of_its_equation() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 3, (12, 12)) * (rng.random((12, 12)) < 0.4)
    weight = np.triu(weight, 1) + np.triu(weight, 1).T
    weight[5] = weight[:, 5] = 0  # a node without edges
    degree = weight.sum(0)
    walk = weight / np.where(degree > 0, degree, 1)
    reset = rng.random(12)
    reset /= reset.sum()
    for follow in (0.1, 0.5, 0.85):
        teleport = np.outer(reset, degree == 0)  # its walk begins again
        exact = np.linalg.solve(np.eye(12) - follow * (walk + teleport), (1 - follow) * reset)
        assert np.allclose(page_rank(sparse.csr_matrix(walk), reset, follow), exact, atol=1e-8)
        assert exact.sum() == pytest.approx(1)
    assert np.array_equal(page_rank(sparse.csr_matrix(walk), reset, 0.0), reset)
    assert not np.allclose(
        page_rank(sparse.csr_matrix(walk.T), reset, 0.5), page_rank(sparse.csr_matrix(walk), reset, 0.5)
    )


def test_columns_of_the_walk_sum_to_one() -> None:
    walk_PP = made().graph().walk_PP.toarray()
    assert not np.allclose(walk_PP, walk_PP.T) and not walk_PP.diagonal().any()
    assert np.allclose(walk_PP.sum(0)[walk_PP.any(0)], 1)


def test_a_bridge_passage_that_shares_no_word_with_the_question_is_near() -> None:
    question = "By which river did Ada Brown study?"
    assert made().rank([question], 2).ids_QK[0].tolist() == [0, 1]
    assert made(follow=0).rank([question], 2).ids_QK[0].tolist() == [0, -1]  # without the walk it is not reached


def test_nodes_of_few_passages_count_more() -> None:
    texts = ["Rare Bird\nRare Bird sang with Common Man.", *(f"Town{i}\nCommon Man was in Town{i}." for i in range(6))]
    for specificity, ratio in ((True, 7.0), (False, 1.0)):
        retriever = made(texts, specificity=specificity, synonym=1.0)
        graph = retriever.graph()
        reset = retriever.reset(graph, "Did Rare Bird know Common Man?")
        by_name = dict(zip(graph.names, reset, strict=True))
        assert by_name["rare bird"] / by_name["common man"] == pytest.approx(ratio)
        assert reset.sum() == pytest.approx(1)


def test_a_passage_counts_a_phrase_once_for_each_fact() -> None:
    facts = {
        "one": Facts(("a", "b"), (("a", "r", "b"),)),
        "two": Facts(("a", "c", "d"), (("a", "r", "c"), ("a", "r", "d"))),
    }
    retriever = made([])
    retriever.extract = lambda text: facts[text]
    retriever.add(["one", "two"])
    graph = retriever.graph()
    counts = graph.facts_AP.toarray()
    number = {name: i for i, name in enumerate(graph.names)}
    assert counts[:, number["a"]].tolist() == [1, 2] and graph.passages_P[number["a"]] == 2  # specificity: passages


def test_a_removed_passage_leaves_the_graph_as_if_it_had_never_been_there() -> None:
    retriever, other = made(), made([t for i, t in enumerate(TEXTS) if i != 1])
    retriever.remove([1])
    a, b = retriever.graph(), other.graph()
    assert a.names == b.names and (a.walk_PP != b.walk_PP).nnz == 0 and (a.facts_AP != b.facts_AP).nnz == 0
    question = "By which river did Ada Brown study?"
    assert 1 not in retriever.rank([question], 5).ids_QK


def test_synonyms_are_joined_and_questions_without_a_phrase_are_answered_by_words() -> None:
    vectors = np.array([[1, 0], [0.9, 0.436], [0, 1], [0.95, 0.312]], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert set(synonyms(vectors, 0.85, 3)) == {(0, 1), (0, 3), (1, 3)}
    assert set(synonyms(vectors, 0.85, 1)) == {(0, 3), (1, 3)}
    assert synonyms(vectors, 1.0, 3) == {}
    assert made().rank(["where is a harbour"], 1).ids_QK[0, 0] == 3


def test_phrases_and_facts_by_rules() -> None:
    assert [n for n, _, _ in phrases("The University of Vienna's rector met Dr. Ada Brown in 1921.")] == [
        "university of vienna",
        "dr ada brown",
        "1921",
    ]
    assert [n for n, _, _ in phrases("Are Ada Brown and Boris Black both painters?")] == ["ada brown", "boris black"]
    assert [n for n, _, _ in phrases('Call read_file with "fast mode" on os.path.')] == [
        "read_file",
        "fast mode",
        "os.path",
    ]
    assert normal("The Beatles'") == "beatles" and normal("Ada's") == "ada"
    facts = extract("Ada Brown\nAda Brown met Boris Black. He left Oslo.")
    assert facts.phrases == ("ada brown", "boris black", "oslo")
    assert ("ada brown", "met", "boris black") in facts.triples and ("ada brown", "", "oslo") in facts.triples
    assert extract("nothing is named here") == Facts((), ())


def test_a_verb_that_begins_a_sentence_is_no_phrase() -> None:
    facts = extract(
        "Return the next line of StringIO. Open files with BytesIO. JSON is parsed.\n- Read it from Vienna."
    )
    assert facts.phrases == ("stringio", "bytesio", "json", "vienna")
    # A word that stands capitalised inside a sentence, or in the title, is a name at the beginning of one too.
    assert extract("Vienna lies on the Danube. She lived in Vienna. Call her.").phrases == ("vienna", "danube")
    assert extract("Albert Einstein\nEinstein was in Bern.").phrases == ("albert einstein", "einstein", "bern")
    assert phrases("Oslo has what?") == [] and [n for n, *_ in phrases("Oslo has what?", {"oslo"})] == ["oslo"]


def test_a_question_may_begin_with_a_name_of_the_graph() -> None:
    retriever = made()
    graph = retriever.graph()
    assert retriever.reset(graph, "Oslo has which harbour?")[graph.names.index("oslo")] == 1
    assert not retriever.reset(graph, "Open which harbour?").any()
