"""Planted items are reported with their place; what is merely alike is not."""

import pytest

from modicum.core.errors import UserError
from modicum.evaluate import contamination

QUESTION = "Which gas do green plants take in from the air while the sun is shining on their leaves?"
OTHER = "What is the largest number of legs that any insect in the garden of the old house may have?"


def test_a_planted_item_is_found_with_its_span():
    before, after = "Some lines about gardens.\n\n", " And the story goes on."
    planted = "which gas do GREEN plants -- take in, from the air while the sun is shining on their leaves"
    documents = [("clean", "Green plants are green. " * 50), ("dirty", before + planted + "?" + after)]
    hits = contamination.find({"q": QUESTION, "r": OTHER}, documents)
    assert [(h.item, h.document) for h in hits] == [("q", "dirty")]
    (hit,) = hits
    assert hit.text == planted and hit.start == len(before) and hit.end == len(before + planted)
    assert hit.words == 18 and documents[1][1][hit.start : hit.end] == planted


def test_twelve_words_are_not_thirteen():
    words = QUESTION.rstrip("?").split()
    assert contamination.find({"q": QUESTION}, [("d", " ".join(words[:12]))]) == []
    assert len(contamination.find({"q": QUESTION}, [("d", " ".join(words[:13]))])) == 1
    assert len(contamination.find({"q": QUESTION}, [("d", " ".join(words[:12]))], n=8)) == 1
    swapped = [*words[:6], "red", *words[7:]]
    assert contamination.find({"q": QUESTION}, [("d", " ".join(swapped[:14]))]) == []
    with pytest.raises(UserError, match="n=5"):
        contamination.find({"q": QUESTION}, [], n=5)


def test_two_runs_in_one_document_and_short_items():
    text = f"{QUESTION} Then something else entirely comes between the two. {QUESTION}"
    hits = contamination.find({"q": QUESTION, "short": "Who is it?"}, [("d", text)])
    assert len(hits) == 2 and hits[0].end < hits[1].start
    assert contamination.too_short({"q": QUESTION, "short": "Who is it?"}) == ["short"]
    nine = "one two three four five six seven eight nine"
    assert len(contamination.find({"nine": nine}, [("d", f"zero {nine} ten")])) == 1


def test_report_splits_the_score():
    items = {str(i): f"{QUESTION} number {i}" for i in range(10)}
    scores = {str(i): float(i < 6) for i in range(10)}
    hits = [contamination.Hit(str(i), "d", 0, 9, 13, "x") for i in range(4)]
    said = contamination.report(scores, items, hits)
    assert said["all"]["value"] == 0.6 and said["touched"]["value"] == 1.0
    assert said["clean"]["value"] == pytest.approx(2 / 6) and said["gap"] == pytest.approx(0.6 - 2 / 6)
    row = {"prompt": "Question: x", "choices": ["a", "b"], "right": 1}
    assert contamination.text_of(row) == "Question: x b"
