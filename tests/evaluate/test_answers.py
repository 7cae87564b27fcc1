"""Short answers out of replies, and their figures against naive definitions."""

import math
import random

import numpy as np
import pytest

from modicum.core.errors import UserError
from modicum.evaluate import answers
from modicum.evaluate.answers import bootstrap, comparisons, figures, grade, short_answer, wilson

DEFAULT = "What is the default value of the parameter `indent` of `json.dump`?"
RAISES = "Which exception does `m.pop` raise if the key is not there?"


@pytest.mark.parametrize(
    "question,reply,short",
    [
        (DEFAULT, "None", "None"),
        (DEFAULT, "The default value of `indent` is None.", "None."),
        (DEFAULT, "The default value of the parameter `indent` of `json.dump` is `None` [1].", "`None`."),
        (DEFAULT, "Answer: None\nAnd more text.", "None"),
        (DEFAULT, "It is 5. It is 6.", "5."),
        (RAISES, "`m.pop` raises KeyError if the key is not there.", "KeyError"),
        (RAISES, "It raises a KeyError", "KeyError"),
        (RAISES, "A KeyError is raised.", "A KeyError is raised."),
        ("What does `m.f` return?", "It returns the value of the item.", "value of the item."),
        ("Who led the Normans?", "Rollo was their leader", "Rollo was their leader"),
        (
            "Who led the Normans?",
            "The leader who led the Normans was Rollo.",
            "The leader who led the Normans was Rollo.",
        ),
        ("What is it?", "", ""),
        ("What is it?", "It is", "It is"),
    ],
)
def test_the_short_answer_of_a_sentence(question, reply, short):
    assert short_answer(question, reply) == short


def test_grades_are_squads():
    assert grade(DEFAULT, "The default value is None.", ["None"]) == {"exact": 1.0, "f1": 1.0, "contains": 1.0}
    assert grade(DEFAULT, "I think None of these", ["None"]) == {"exact": 0.0, "f1": 2 / 6, "contains": 1.0}
    assert grade(DEFAULT, "Nonetheless", ["None"]) == {"exact": 0.0, "f1": 0.0, "contains": 0.0}
    assert grade("Who?", "the king of France", ["king", "King of France"])["exact"] == 1.0
    assert grade("Which?", "[1]", ["1"])["contains"] == 0.0, "a citation is no answer"
    with pytest.raises(UserError, match="no accepted answer"):
        grade("Who?", "x", [])


def test_wilsons_interval_solves_its_equation():
    for hits, n in ((0, 10), (3, 10), (10, 10), (41, 200)):
        low, high = wilson(hits, n)
        p = hits / n
        for bound in (low, high):
            assert math.isclose(abs(bound - p), 1.959964 * math.sqrt(bound * (1 - bound) / n), abs_tol=1e-7)
        assert low - 1e-9 <= p <= high + 1e-9
    assert wilson(0, 10)[0] == 0 and 0.2 < wilson(0, 10)[1] < 0.3 and 0.7 < wilson(10, 10)[0] < 0.8
    with pytest.raises(UserError):
        wilson(0, 0)


def test_the_bootstrap_is_near_the_normal_interval_of_a_mean():
    rng = random.Random(0)
    values = [rng.random() for _ in range(400)]
    low, high = bootstrap(values)
    half = 1.96 * np.std(values, ddof=1) / 20
    assert math.isclose(low, np.mean(values) - half, abs_tol=0.004)
    assert math.isclose(high, np.mean(values) + half, abs_tol=0.004)
    assert bootstrap(values) == (low, high)


def test_arms_are_compared_question_by_question():
    a = [{"exact": 0.0, "f1": 0.1 * i, "contains": 0.0} for i in range(8)]
    b = [{"exact": 1.0, "f1": 0.1 * i + 0.2, "contains": float(i % 2)} for i in range(8)]
    assert figures(b)["exact"]["value"] == 1 and figures(b)["exact"]["low"] < 1
    rows = {(r["arm"], r["against"], r["figure"]): r for r in comparisons({"closed": a, "retrieved": b})}
    assert set(rows) == {("retrieved", "closed", name) for name in answers.FIGURES}
    f1 = rows["retrieved", "closed", "f1"]
    assert math.isclose(f1["difference"], 0.2) and math.isclose(f1["low"], 0.2) and f1["above"] == 8
    contains = rows["retrieved", "closed", "contains"]
    assert contains["difference"] == 0.5 and contains["low"] < 0.5 < contains["high"] and contains["equal"] == 4
