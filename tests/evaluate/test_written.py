"""Tasks answered in words: prompts and marks by hand, each with the near miss that is easy to make."""

import json

import pytest

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.evaluate import sandbox
from modicum.evaluate.score import LogLikelihood
from modicum.evaluate.written import last_number, number_in


def task_of(tmp_path, key, rows, knobs=""):
    path = tmp_path / f"{key}.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    task = registry.build("task", f"{key}:file={path}{knobs}")
    return task, list(task.docs("test", None, 0))


def test_numbers():
    assert [number_in(t) for t in ("$1,250.00", "7.", "-5", "7.50", "three")] == ["1250", "7", "-5", "7.5", None]
    assert last_number("First 3, then 4, so 1,200 in all.") == "1200" and last_number("none") is None
    assert last_number("It costs $5.") == "5" and last_number("x = -.5") == "-0.5"


def test_gsm8k(tmp_path):
    row = {"question": "How many?", "answer": "3 + 4 = 7\n#### 7"}
    shared = {"prompt": "How many?", "references": ["7"], "extra": json.dumps({"solution": "3 + 4 = 7"})}
    task, (doc, other) = task_of(tmp_path, "gsm8k", [row, shared])
    (request,) = task.requests(doc, [other])
    assert request.prompt == "Question: How many?\nAnswer: 3 + 4 = 7\n#### 7\n\nQuestion: How many?\nAnswer:"
    assert request.stop[0] == "Question:"
    assert task.grade(doc, [" 3 + 4 = 7\n#### 7"]) == {"accuracy": 1, "strict": 1, "unparsed": 0}
    assert task.grade(doc, [" That is 7 apples."]) == {"accuracy": 1, "strict": 0, "unparsed": 0}
    assert task.grade(doc, [" 7 in all, of which 3 red"])["accuracy"] == 0  # the last number counts, not any
    assert task.grade(doc, [" many"]) == {"accuracy": 0, "strict": 0, "unparsed": 1}


def test_math_word_problems(tmp_path):
    rows = [
        {"prompt": "2 and 6?", "references": ["8.0"], "dataset": "svamp"},
        {"prompt": "Which? A)1 B)2", "references": ["B"], "dataset": "aqua"},
    ]
    task, docs = task_of(tmp_path, "math-word-problems", rows)
    assert task.grade(docs[0], [" 2 + 6 = 8"])["accuracy"] == 1 and task.grade(docs[0], [" 80"])["accuracy"] == 0
    assert task.grade(docs[1], [" B"])["accuracy"] == 1 and task.grade(docs[1], [" A"])["accuracy"] == 0
    _, (only,) = task_of(tmp_path, "math-word-problems", rows, ",collection=aqua")
    assert only["extra"] == "aqua"


def test_lambada(tmp_path):
    task, docs = task_of(
        tmp_path, "lambada", [{"text": "they went to the sea"}, {"prompt": "all was", "references": ["white"]}]
    )
    (request,) = task.requests(docs[0], [])
    assert (request.prompt, request.choices) == ("they went to the", (" sea",))
    assert task.requests(docs[1], [])[0].choices == (" white",)
    graded = [task.grade(docs[0], [[LogLikelihood(-n, g, 1, 4)]]) for n, g in ((1.0, True), (3.0, False))]
    assert graded == [{"acc": 1, "nats": 1.0}, {"acc": 0, "nats": 3.0}]
    # perplexity is the exponential of the mean, not the mean of the exponentials
    assert task.aggregate(graded)["perplexity"]["value"] == pytest.approx(2.718281828**2)


def test_nq_open(tmp_path):
    task, (doc, shot) = task_of(tmp_path, "nq-open", [{"prompt": "who is it?", "references": ["The Cat", "Tom"]}] * 2)
    (request,) = task.requests(doc, [shot])
    assert request.prompt == "Answer these questions:\n\nQ: who is it?\nA: The Cat\nQ: who is it?\nA:"
    assert task.grade(doc, [" the cat!"])["accuracy"] == 1 and task.grade(doc, [" cats"])["accuracy"] == 0
    assert task.grade(doc, [" it was tom then"])["contains"] == 1 and task.grade(doc, [""])["unparsed"] == 1


def test_coqa_shows_earlier_turns_only(tmp_path):
    turns = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(3)]
    row = {"id": "x_turn1", "context": "A story.", "prompt": "q1?", "references": ["a1", "a one"]}
    task, (doc,) = task_of(tmp_path, "coqa", [row | {"extra": json.dumps({"history": turns})}])
    assert task.requests(doc, [])[0].prompt == "A story.\n\nQ: q0?\n\nA: a0\n\nQ: q1?\n\nA:"
    # two accepted answers: each is left out in turn, so one of them alone scores half
    assert task.grade(doc, [" a1"])["em"] == 0.5 and task.grade(doc, [" blue"])["f1"] == 0
    assert doc["cluster"] and task.metric == "f1"


def test_drop_compares_numbers_as_numbers(tmp_path):
    task, (doc,) = task_of(
        tmp_path, "drop", [{"context": "P.", "prompt": "How many?", "references": ["17,000", "seventeen"]}]
    )
    assert task.requests(doc, [])[0].prompt == "P. How many?"
    assert task.grade(doc, [" 17000"]) == {"f1": 1, "em": 1, "unparsed": 0}
    assert task.grade(doc, [" the 17000 men"])["f1"] == pytest.approx(2 / 3) and task.grade(doc, [" 1700"])["em"] == 0


def test_mbpp_runs_the_tests(tmp_path):
    try:
        sandbox.run("", [])
    except UserError:
        pytest.skip("this kernel cannot isolate")
    row = {
        "text": "Double it.",
        "code": "def f(x):\r\n    return 2 * x",
        "test_list": ["assert f(2) == 4", "assert f(0) == 0", "assert f(3) == 6"],
    }
    task, (doc,) = task_of(tmp_path, "mbpp", [row])
    prompt = task.requests(doc, [])[0].prompt
    assert prompt.startswith("You are an expert Python programmer, and here is your task: Double it.")
    assert prompt.endswith(
        "\n\nassert f(2) == 4\nassert f(0) == 0\nassert f(3) == 6\n[BEGIN]\n"
    ) and "\r" not in task.text(doc)
    assert task.grade(doc, ["def f(x):\n    return x + x\n"])["accuracy"] == 1
    assert task.grade(doc, ["def f(x):\n    return x * x\n"])["accuracy"] == 0  # right for two of the three tests
    assert task.grade(doc, ["import sys\nsys.exit(0)\ndef f(x): pass"])["accuracy"] == 0
    assert task.grade(doc, ["I cannot do that."]) == {"accuracy": 0, "unparsed": 1}


def test_replies_that_cannot_be_parsed_are_counted(tmp_path):
    task, (doc,) = task_of(tmp_path, "gsm8k", [{"question": "q", "answer": "#### 1"}])
    found = task.aggregate([task.grade(doc, [r]) for r in ("1", "no idea", "2", "")])
    assert found["unparsed"]["value"] == 0.5 and found["accuracy"]["value"] == 0.25
