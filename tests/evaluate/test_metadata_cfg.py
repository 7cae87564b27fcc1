"""Sentences with and without named labels: their layout, and grades against the grammar itself."""

import numpy as np
import pytest

from modicum.core import registry
from modicum.evaluate.playground import NOUNS
from modicum.evaluate.score import LogLikelihood
from modicum.evaluate.tasks import metadata_cfg

SPEC = "metadata-cfg:depth=3,labels=2,symbols=3,vocabulary=6,prompt=4"


def test_metadata_stand_before_a_share_of_the_training_texts():
    task = registry.build("task", f"{SPEC},metadata_depth=2,fraction=0.5")
    train = list(task.docs("train", 200, 0))
    named = [d for d in train if d["metadata"]]
    assert 70 < len(named) < 130
    for doc in named:
        words = task.text(doc).split()
        level = [metadata_cfg.ADJECTIVES.index(w) for w in words[:2]]
        assert (level[0], level[1] - 2) == doc["labels"][:2] and words[2] == metadata_cfg.MASK
    plain = next(d for d in train if not d["metadata"])
    assert task.text(plain).split()[:3] == [metadata_cfg.MASK] * 3
    assert all(d["prompt"].startswith("none none none ") for d in task.docs("test", 20, 0))
    shown = registry.build("task", f"{SPEC},metadata_depth=3,shown=true")
    assert all(metadata_cfg.MASK not in d["prompt"] for d in shown.docs("test", 20, 0))
    assert len(set(d["labels"] for d in train)) == 8, "the labels of the levels are not independent"


def test_grades_are_the_grammars():
    task = registry.build("task", SPEC)
    for doc in task.docs("test", 8, 0):
        symbols = [NOUNS.index(w) for w in doc["prompt"].split()[3:] + doc["answer"].split()]
        best = task.grammar.nats(symbols)
        rest = best[4:].sum()
        (right,) = [task.grade(doc, [f" {doc['answer']}", [LogLikelihood(-rest, False, 1, 1)]])]
        assert right == {"accuracy": 1, "gap": pytest.approx(0, abs=1e-9)}
        worse = task.grade(doc, [" apple apple", [LogLikelihood(-rest - 2.0 * len(best[4:]), False, 1, 1)]])
        assert worse["gap"] == pytest.approx(2.0)
        # any sentence of the grammar is right, not the drawn one alone
        other = next(
            t
            for one in task.grammar.labels()
            for t in (task.grammar.sample(np.random.default_rng(i), one)[0] for i in range(400))
            if t[:4] == symbols[:4]
        )
        reply = " " + " ".join(NOUNS[s] for s in other[4:])
        assert task.grade(doc, [reply, [LogLikelihood(-1.0, False, 1, 1)]])["accuracy"] == 1


def test_known_labels_lower_the_best_loss():
    plain = registry.build("task", f"{SPEC},metadata_depth=3")
    shown = registry.build("task", f"{SPEC},metadata_depth=3,shown=true")
    said = [LogLikelihood(-9.0, False, 1, 1)]
    gaps = []
    for a, b in zip(plain.docs("test", 12, 0), shown.docs("test", 12, 0), strict=True):
        assert a["answer"] == b["answer"]
        gaps.append(shown.grade(b, ["", said])["gap"] - plain.grade(a, ["", said])["gap"])
    assert np.mean(gaps) > 0.05, "who knows the labels loses less, so the same model's gap is larger"
