"""Solvers: which calls are made, what they hold, what they cost, and which reply is the answer."""

import json
from types import SimpleNamespace

import pytest
import torch

from modicum.bench.ports import solver as bench
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.tokenizer import Tokenizer
from modicum.evaluate.answer import Answerer
from modicum.evaluate.run import run_tasks
from modicum.evaluate.solvers import Call, Problem, Reply, fitted, solve
from modicum.evaluate.solvers.scale_tts import filled, parsed
from modicum.evaluate.solving import Engined, endpoint
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder

QUESTION = Problem("How far do two trains go?", 64, extract=lambda text: text.rpartition(" ")[2].strip("."))


def build(choice):
    return registry.build("solver", choice)


class Script:
    """Replies by what a prompt holds, first match; every call is kept."""

    def __init__(self, **replies):
        self.replies, self.calls = replies, []

    def __call__(self, batch):
        return [self.one(call) for _, call, _ in batch]

    def one(self, call):
        self.calls.append(call)
        for words, answers in self.replies.items():
            if words.replace("_", " ") in call.prompt:
                answers = answers if isinstance(answers, list) else [answers]
                return [Reply(answers[i % len(answers)], 7, 7.0 * (i + 1), 11) for i in range(call.n)]
        return [Reply(f"it is {len(self.calls)}", 10 + call.think, 1.0, 11) for _ in range(call.n)]


OUTLINES = [json.dumps(["first", "second", "last"]), "no list", json.dumps(["all"])]


def script(**scores):
    return Script(Split_this=OUTLINES, Which_of_them="number 1 is best", **scores)


def test_modes_follow_the_threshold_strictly():
    levels = {"sub-problem_1": "0.2", "sub-problem_2": "0.5", "sub-problem_3": "0.9 or so"}
    for threshold, expected in (
        (-0.1, [1, 1, 1]),
        (0.2, [0, 1, 1]),
        (0.5, [0, 0, 1]),
        (0.9, [0, 0, 0]),
        (1, [0, 0, 0]),
    ):
        run = script(**levels)
        (result,) = solve(build(f"scale-tts:threshold={threshold}"), [QUESTION], run)
        answers = [call for call in run.calls if not call.wrap]
        assert [int(call.think) for call in answers] == expected, threshold
        assert result.generations == 8 + 1 + 3 + 3 and result.text.startswith("it is")
    assert [call.final for call in answers] == [False, False, True]


def test_a_step_sees_earlier_answers_and_no_reasoning():
    run = Script(Split_this=OUTLINES[:1], How_difficult="1", first="long reasoning gives 17.")
    problem = Problem("Q", 64, extract=QUESTION.extract)
    run.replies = {
        "Split_this": OUTLINES[:1],
        "How_difficult": "1",
        "last\nAnswer:": "and so 3",
        "second\nAnswer:": "more talk makes 4",
        "first\nAnswer:": "long reasoning gives 17.",
    }
    (result,) = solve(build("scale-tts"), [problem], run)
    prompts = [call.prompt for call in run.calls if not call.wrap]
    assert prompts == [
        "Q\n\nfirst\nAnswer:",
        "Q\n\nfirst\nAnswer: 17\nsecond\nAnswer:",
        "Q\n\nfirst\nAnswer: 17\nsecond\nAnswer: 4\nlast\nAnswer:",
    ]
    assert result.text == "and so 3" and "reasoning" not in prompts[-1]


def test_every_token_is_counted_outlines_and_ratings_too():
    run = script(How_difficult="0.9")
    (result,) = solve(build("scale-tts"), [QUESTION], run)
    assert result.tokens == 8 * 7 + 7 + 3 * 7 + 3 * 11
    assert result.tokens == sum(r.tokens for entry in result.trace for r in entry["replies"])


def test_outlines_that_cannot_be_parsed_are_sampled_again_then_given_up():
    run = Script(Split_this="I would rather not [1, 2] [")
    (result,) = solve(build("scale-tts:retries=2"), [QUESTION], run)
    assert [call.wrap for call in run.calls] == [True, True, True, False]
    assert run.calls[-1] == Call(QUESTION.prompt, 1, 0.0, 64, ("\n",), final=True) and result.generations == 25


def test_the_picked_outline_is_followed():
    run = Script(Split_this=OUTLINES, Which_of_them="[2]", How_difficult="0")
    solve(build("scale-tts"), [QUESTION], run)
    assert [call.prompt for call in run.calls if not call.wrap] == [f"{QUESTION.prompt}\n\nall\nAnswer:"]
    (pick,) = [call for call in run.calls if "Which of them" in call.prompt]
    assert "[1] first; second; last\n[2] all\n" in pick.prompt


def test_uncertainty_answers_fast_first_and_pays_for_it():
    run = Script(**{"a +": "1", "1 +": "2"})
    problem = Problem("a + b + c =", 9, steps=("a + b =", "{0} + c ="), layout=lambda q, steps, step: step)
    given = "scale-tts:outline=given,difficulty=uncertainty,threshold"
    (low,) = solve(build(f"{given}=0.5"), [problem], run)  # 7 nats over 7 tokens: 1 - 1/e = 0.63
    assert [(c.prompt, c.think) for c in run.calls] == [
        ("a + b =", False),
        ("a + b =", True),
        ("1 + c =", False),
        ("1 + c =", True),
    ]
    assert low.tokens == 28 and low.text == "2"
    (high,) = solve(build(f"{given}=0.64"), [problem], run)
    assert high.tokens == 14 and not any(entry["call"].think for entry in high.trace)
    (all_slow,) = solve(build(f"{given}=-1"), [problem], run)
    assert all_slow.tokens == 14 and all(entry["call"].think for entry in all_slow.trace)


def test_parsed_and_filled():
    assert parsed('Sure: ["a", " b "] and ["c"]', 8) == ("a", "b") and parsed("[1, 2]", 8) == ()
    assert parsed('[oops ["a", "b", "c"]', 2) == ("a", "b") and parsed("", 8) == ()
    assert filled("{0} + {1} = {2} {x}", ["5", "6"]) == "5 + 6 = {2} {x}"


def test_votes():
    replies = [("is 4", 3.0), ("is 5", 1.0), ("was 4", 2.0), ("", 0.0), ("is 5", 9.0), ("is 4", 8.0)]

    def ask(batch):
        return [[Reply(text, 2, nats) for text, nats in replies] for _ in batch]

    (result,) = solve(build("vote:n=6"), [QUESTION], ask)
    assert result.text == "was 4"  # three votes; the likeliest of the winner's
    (best,) = solve(build("best-of-n:n=6"), [QUESTION], ask)
    assert best.text == "is 5"  # the likeliest that holds an answer
    replies[:] = [("is 4", 3.0), ("is 5", 1.0)]
    assert solve(build("vote:n=2"), [QUESTION], ask)[0].text == "is 5"  # a tie goes to the likelier


def test_budget_shortens_the_last_call():
    assert fitted(Call("q", 4, max_new_tokens=10), QUESTION, 20).max_new_tokens == 5
    assert fitted(Call("q", 4), QUESTION, 3).n == 3 and fitted(Call("q"), QUESTION, 0) is None
    run = Script()
    (result,) = solve(build("greedy"), [QUESTION], run, budget=5)
    assert run.calls[0].max_new_tokens == 5
    run = script(How_difficult="1")
    (result,) = solve(build("scale-tts"), [QUESTION], run, budget=70)
    assert result.cut and result.text == "" and len(run.calls) == 3


@pytest.fixture(scope="module")
def small():
    tokenizer = Tokenizer.train(["12 + 34 - 5 = 41."] * 4, 300)
    config = llama_like(tokenizer.vocab_size, 64, 2, context_length=256, eos_ids=(tokenizer.eos_id,))
    return Decoder(config, torch.Generator().manual_seed(0)).eval(), tokenizer


def test_greedy_on_the_engine_is_what_tasks_give_without_a_solver(small, tmp_path):
    model, tokenizer = small
    spec = ["arithmetic:terms=3"]
    (plain,) = run_tasks(model, tokenizer, spec, limit=6)
    (greedy,) = run_tasks(model, tokenizer, spec, limit=6, solver="greedy")
    assert [i["reply"] for i in plain.items] == [i["reply"] for i in greedy.items]
    assert greedy.figures["generations"]["value"] == 1 and greedy.figures["tokens"]["value"] > 0
    keep = tmp_path / "items.jsonl"
    (voted,) = run_tasks(model, tokenizer, spec, limit=6, solver="vote:n=3", keep=keep)
    (again,) = run_tasks(model, tokenizer, spec, limit=6, solver="vote:n=3", keep=keep)
    assert again.resumed == 6 and again.figures == voted.figures and voted.figures["generations"]["value"] == 3
    (other,) = run_tasks(model, tokenizer, spec, limit=6, solver="vote:n=2", keep=keep)
    assert other.resumed == 0, "another solver's answers were taken for this one's"
    (limited,) = run_tasks(model, tokenizer, spec, limit=6, solver="vote:n=3", solver_budget=6)
    assert limited.figures["tokens"]["value"] <= 6


def test_samples_do_not_depend_on_what_else_is_solved(small):
    model, tokenizer = small
    problems = [Problem(f"{i} + {i} =", 8) for i in range(5)]
    solver = build("vote:n=3")
    together = solve(solver, problems, Engined(Answerer(model, tokenizer)), seed=3)
    alone = [solve(solver, [p], Engined(Answerer(model, tokenizer)), seed=3)[0] for p in problems]
    assert [r.text for r in together] == [r.text for r in alone]
    assert [r.tokens for r in together] == [r.tokens for r in alone]


def test_nats_are_those_of_the_model(small):
    from modicum.evaluate.score import loglikelihood

    model, tokenizer = small
    answerer = Answerer(model, tokenizer)
    call = fitted(Call("12 + 3 =", 2, 1.0), Problem("", 5, ()), None)
    replies = Engined(answerer)([(Problem("", 5, ()), call, 7)])[0]
    for reply in replies:
        if reply.tokens == len(tokenizer.encode(reply.text)) == 5:  # texts that are read back as what was generated
            (score,) = loglikelihood(model, tokenizer, [("12 + 3 =", reply.text)])
            if score.tokens == 5:
                assert reply.nats == pytest.approx(-score.nats, abs=1e-3)


def test_choices_are_refused(small, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "x", "choices": ["a", "b"], "answer": 0}))
    with pytest.raises(UserError, match="scores choices"):
        run_tasks(*small, [f"choice:file={path}"], solver="vote")


def test_outlines_of_arithmetic():
    task = registry.build("task", "arithmetic:terms=4,operations=+-*")
    for doc in task.docs("test", 50, 0):
        results = []
        for step in task.steps(doc):
            results.append(str(eval(filled(step, results).removesuffix(" ="))))
        assert results[-1] == doc["answer"] and len(results) == 3
    spaced = registry.build("task", "arithmetic:terms=3,spaced=true")
    (doc,) = spaced.docs("test", 1, 0)
    assert spaced.requests(doc, [])[0].steps == spaced.steps(doc) and spaced.steps(doc)[1].startswith("{0} ")


def test_an_endpoint_is_asked_as_the_engine_is():
    sent = []

    def create(**request):
        sent.append(request)
        token = SimpleNamespace(logprob=-0.5)
        choice = SimpleNamespace(
            message=SimpleNamespace(content="41"), logprobs=SimpleNamespace(content=[token, token])
        )
        usage = SimpleNamespace(completion_tokens=4, prompt_tokens=9)
        return SimpleNamespace(choices=[choice] * request["n"], usage=usage)

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    ask = endpoint("http://localhost:1/v1", "m", client=client)
    results = solve(build("vote:n=2,think=true"), [QUESTION, QUESTION], ask)
    assert [r.text for r in results] == ["41", "41"] and results[0].tokens == 4
    assert results[0].trace[0]["replies"][0].nats == 1.0
    assert sent[0]["messages"][0]["content"].endswith("Let's think step by step.") and sent[0]["n"] == 2


def test_tasks_on_a_server(small, tmp_path, monkeypatch):
    """A server of this project over HTTP gives what its engine gives; a task of likelihoods is refused."""
    from modicum.evaluate.remote import run_endpoint
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams
    from modicum.serve.server import BackgroundServer, ServerConfig

    model, tokenizer = small
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) for i in range(3)))
    spec = f"generate:file={path},max_new_tokens=6,stop=|"
    engine = Engine(model, tokenizer, EngineConfig(cache="4MiB"))
    with BackgroundServer(engine, ServerConfig(model="tiny", port=0)) as server:
        (result,) = run_endpoint(f"{server.url}/v1", "tiny", [spec])
        (voted,) = run_endpoint(f"{server.url}/v1", "tiny", [spec], solver="vote:n=3", solver_budget=9)
        with pytest.raises(UserError, match="likelihood of choices"):
            run_endpoint(f"{server.url}/v1", "tiny", ["set-disjointness:answer=decide"], limit=2)
        with pytest.raises(UserError, match="refused"):
            run_endpoint(f"{server.url}/v1", "other", [spec])
        url = server.url
    prompts = [
        tokenizer.encode(tokenizer.chat([{"role": "user", "content": f"Question: {i} + 1\nAnswer:"}]), specials=True)
        for i in range(3)
    ]
    direct = Engine(model, tokenizer, EngineConfig(cache="4MiB")).generate(
        prompts, SamplingParams(temperature=0, max_tokens=6)
    )
    assert [item["reply"] for item in result.items] == [output.text for output in direct]
    assert result.figures["tokens"]["value"] == pytest.approx(sum(len(o.tokens) for o in direct) / 3)
    assert voted.figures["tokens"]["value"] <= 9 and voted.figures["generations"]["value"] == 3
    with pytest.raises(UserError, match="no server answers"):
        run_endpoint(f"{url}/v1", "tiny", [spec])


def test_recipes_name_a_solver():
    from pydantic import ValidationError

    from modicum.pipeline.stages.evaluate import Section

    assert Section(tasks=["arithmetic"], solver="vote:n=3", solver_budget=64).solver == "vote:n=3"
    for wrong in ({"solver": "vote:m=3"}, {"solver": "nobody"}, {"solver_budget": 0}):
        with pytest.raises((ValidationError, UserError)):
            Section(tasks=["arithmetic"], **wrong)


def test_worked_sums_of_the_bench_are_right():
    for a in range(-130, 131, 7):
        for b in range(-130, 131, 11):
            assert bench.result_of(bench.columns(a, b)) == str(a + b)
    assert bench.columns(57, 68) == "+7+8:15,5+6:12>125" and bench.chain([1, 2, -5]) == "1+2=3,3-5=-2>-2"
    problem = bench.problem([12, -5, 7], bench.Scale())
    assert problem.layout(problem.prompt, [("12-5=", "7")], "7+7=") == "12-5+7=12-5=7;7+7="
    assert bench.line(15, (0.2, 10), (0.6, 20)) == pytest.approx(0.4) and bench.line(5, (0.2, 10), (0.6, 20)) == 0.2
