"""Excerpts around a match, attribution of answers by overlap, and what `ask` adds to a reply that cites nothing."""

import pytest

from modicum.retrieve.citations import attribute
from modicum.retrieve.excerpt import excerpt
from modicum.retrieve.ground import ask, closed_book, compose
from modicum.retrieve.passages import Passage
from modicum.retrieve.search import Hit, Searcher, build_index

SOURCES = [
    "The Norman leader Rollo agreed to swear fealty to King Charles III of West Francia.",
    "Warsaw celebrates midsummer's eve with wreaths (wianki) that float on the Vistula.",
    "json.dump(obj, fp, *, indent=None)",
]


def words(text):
    return len(text.split())


def test_a_window_of_whole_sentences_stands_around_the_match():
    sentences = [f"Sentence number {i} says nothing of note at all." for i in range(30)]
    sentences[17] = "The needle lies under the third step."
    text = " ".join(sentences)
    shown = excerpt(text, "where is the needle under the step", 30, words)
    assert sentences[17] in shown and words(shown) <= 30
    assert shown in text and shown.startswith(("Sentence", "The needle")) and shown.endswith(".")
    assert excerpt(text, "needle", 500, words) == text


def test_what_has_no_sentences_is_cut_at_spaces_and_nothing_is_lost_that_fits():
    text = " ".join(f"w{i}" for i in range(100))
    shown = excerpt(text, "what of w60", 20, words)
    assert "w60" in shown.split() and words(shown) <= 20 and shown in text
    code = "def f(x):\n    return x + 1\n" * 9
    assert excerpt(code, "x", 10, words).startswith("def f(x):\n    return x + 1")


@pytest.mark.parametrize(
    "question,text,expected",
    [
        ("Who was the Norman leader?", "Rollo", [1]),
        ("Who swore fealty?", "The Norman leader Rollo.", [1]),
        ("What is the Polish word for wreaths?", "Wianki. Rollo swore fealty to Charles.", [2, 1]),
        ("What is the default of indent of json.dump?", "The default is None.", [3]),
        ("Who was the Norman leader?", "William of Normandy", []),
        ("Who was it?", "", []),
        ("What floats on the Vistula?", "Wreaths float on the Vistula [2].", [2]),
    ],
)
def test_an_answer_is_attributed_to_the_source_that_contains_its_words(question, text, expected):
    assert attribute(question, text, SOURCES) == expected


def test_function_words_and_the_questions_own_words_support_nothing_else():
    assert attribute("Who was the Norman leader?", "The Norman leader was Bob.", SOURCES) == []


@pytest.fixture(scope="module")
def searcher(tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "i"
    titles = ("Normans", "Warsaw", "json.dump")
    build_index([Passage(str(i), t, "d", h, "", t) for i, (t, h) in enumerate(zip(SOURCES, titles, strict=True))], out)
    return Searcher(out)


def test_a_reply_without_citations_gets_them_and_one_with_its_own_keeps_those(searcher):
    said = []
    answer = ask("Who was the Norman leader?", searcher, lambda m, t: "Rollo.", on_text=said.append)
    assert answer.text == "Rollo. [1]" and answer.citations == [1] and answer.attributed and said == [" [1]"]
    assert answer.sources[0].cited and answer.sources[0].title == "Normans"
    own = ask("Who was the Norman leader?", searcher, lambda m, t: "Rollo [7].")
    assert own.text == "Rollo [7]." and not own.attributed and own.unknown_citations == [7]
    wrong = ask("Who was the Norman leader?", searcher, lambda m, t: "Bob")
    assert wrong.text == "Bob" and wrong.citations == [] and not wrong.attributed


def test_the_prompt_names_a_source_once():
    hits = [
        Hit(Passage(t, t, "f.py", h, "", t), 1.0, {}) for t, h in ((SOURCES[0], "Normans"), (SOURCES[2], "json.dump"))
    ]
    user = compose("Who?", hits, 300, words)[0][-1]["content"]
    assert f"[1] Normans\n{SOURCES[0]}" in user and f"[2] {SOURCES[2]}" in user and "f.py" not in user
    assert closed_book("Who?")[-1]["content"] == user[user.index("Question:") :], "the arms ask in the same words"
