"""ListOps against an evaluator that reads the text."""

import statistics

import pytest

from modicum.core import registry
from modicum.core.errors import UserError


def evaluated(text):
    """(value, most open lists at once) by a stack over the tokens."""
    stack, deepest = [[]], 0
    for token in text.split():
        if token.startswith("["):
            stack.append([token[1:]])
            deepest = max(deepest, len(stack) - 1)
        elif token == "]":
            operator, *members = stack.pop()
            rule = {"MAX": max, "MIN": min, "MED": statistics.median_low, "SM": lambda v: sum(v) % 10}[operator]
            assert len(members) >= 2
            stack[-1].append(rule(members))
        else:
            stack[-1].append(int(token))
    ((result,),) = stack
    return result, deepest


def test_values_depth_and_length():
    task = registry.build("task", "listops:depth=4,width=5,length=30,examples=300")
    docs = list(task.docs("test", 300, 0))
    answers, depths = [], []
    for doc in docs:
        text = doc["prompt"].removesuffix(" =")
        result, deepest = evaluated(text)
        assert doc["answer"].strip() == str(result), doc
        assert len(text.split()) <= 30 and deepest <= 4
        answers.append(result)
        depths.append(deepest)
    assert set(answers) == set(range(10)) and max(depths) >= 3
    assert {op for d in docs for op in ("MAX", "MIN", "MED", "SM") if op in d["prompt"]} == {"MAX", "MIN", "MED", "SM"}


def test_mistakes():
    for knobs in ("width=1", "depth=0", "nested=2", "length=1"):
        with pytest.raises(UserError):
            registry.build("task", f"listops:{knobs}")
