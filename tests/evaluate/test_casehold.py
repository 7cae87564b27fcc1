"""CaseHOLD and questions of its form made of a corpus with references."""

import json
import re
from pathlib import Path

import pytest

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.evaluate.score import LogLikelihood
from modicum.evaluate.tasks import citing
from modicum.evaluate.tasks.casehold import macro_f1

EXAMPLES = Path(citing.__file__).parent / "examples"


def test_holdings_are_scored_where_the_blank_stands(tmp_path):
    task = registry.build("task", f"casehold:file={EXAMPLES / 'holdings.jsonl'}")
    docs = list(task.docs("test", None, 0))
    assert docs[0]["prompt"] == "The tenant had left before the term ended. See Hill v. Moor"
    assert [d["answer"] for d in docs] == [0, 1, 2, 3, 4, 0] and task.chance(docs[0]) == 0.2
    (request,) = task.requests(docs[0], [])
    assert request.choices[0] == " holding that a tenant who leaves early owes the rent of the term"
    rows = []
    for doc, picked in zip(docs, [0, 1, 2, 3, 0, 1], strict=True):
        scores = [LogLikelihood(-1.0 if i == picked else -999.0, False, 3, 9) for i in range(5)]
        rows.append(task.grade(doc, [scores]))
    figures = task.aggregate(rows)
    assert figures["acc_norm"]["value"] == pytest.approx(4 / 6) and "picked" not in figures
    # by hand: classes 0 (tp 1, fp 1, fn 1), 1 (tp 1, fp 1), 2, 3 (right), 4 (missed)
    assert figures["f1"]["value"] == pytest.approx((0.5 + 2 / 3 + 1 + 1 + 0) / 5)
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "no blank", "choices": ["a", "b"], "answer": 0}))
    with pytest.raises(UserError, match="<HOLDING>"):
        list(registry.build("task", f"casehold:file={tmp_path / 'x.jsonl'}").docs("test", None, 0))


def test_macro_f1_against_the_definition():
    pairs = [(0, 0), (0, 1), (1, 1), (2, 0), (2, 2), (2, 2)]
    by_class = []
    for k in range(3):
        precision = sum(a == b == k for a, b in pairs) / sum(a == k for a, _ in pairs)
        recall = sum(a == b == k for a, b in pairs) / sum(b == k for _, b in pairs)
        by_class.append(2 * precision * recall / (precision + recall))
    assert macro_f1(pairs) == pytest.approx(sum(by_class) / 3)


def lemmas(split="test", **knobs):
    task = registry.build("task", {"method": "citing", "file": str(EXAMPLES / "lemmas.jsonl"), "wrong": 2, **knobs})
    return list(task.docs(split, None, 0))


def test_the_right_statement_is_the_cited_one():
    rows = [(r["id"], r["text"]) for r in map(json.loads, (EXAMPLES / "lemmas.jsonl").read_text().splitlines())]
    statements = citing.read_statements(rows)
    assert len(statements) == 12
    assert statements["rings-lemma-ring-open"] == "An open ring is a union of closed ones, 2 at most."
    docs = lemmas() + lemmas("train")
    assert len(docs) >= 8
    for doc in docs:
        label = doc["id"].partition("/")[0]
        assert doc["choices"][doc["answer"]] == statements[label], "the right choice is another statement"
        assert len(set(doc["choices"])) == 3 and "\\ref" not in doc["prompt"] and "Lemma" not in doc["prompt"]
        assert doc["prompt"].endswith(" Result:") and "the following result" in doc["prompt"]
        kind = re.match(r"(\w+)s-lemma-(\w+)-", label)[2]
        cited_words = "the " + kind if "closed" in label and "below" in doc["prompt"] else ""
        assert cited_words in doc["prompt"] or "each member" in doc["prompt"] or "glues" in doc["prompt"]
    tests, train = ({d["id"].partition("/")[0] for d in lemmas(split)} for split in ("test", "train"))
    assert not tests & train and tests and train, "a statement is cited on both sides"
    assert lemmas() == lemmas() and [d["answer"] for d in docs] != [0] * len(docs)


def test_a_text_that_gives_the_statement_away_is_left_out():
    assert citing.leaks("we know that a B c d e f holds", "A b c d e g") is True
    assert citing.leaks("we know that a b c d holds", "a b c d e") is False


def test_wrong_choices_are_near_and_not_cited():
    near = citing.Neighbours({"a": "closed ring basis", "b": "closed ring part", "c": "sheaf of modules", "d": "ring"})
    assert near.of("a", 1, set()) == ["b"] and near.of("a", 2, {"b"}) == ["d", "c"]
    assert near.of("a", 9, set()) == ["b", "d", "c"]


def test_a_corpus_without_statements_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "a:b:1", "text": "nothing"}))
    with pytest.raises(UserError, match="0 labelled"):
        list(registry.build("task", f"citing:file={tmp_path / 'x.jsonl'}").docs("test", None, 0))
