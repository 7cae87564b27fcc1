"""Solvers on the serving engine: problems of tasks, replies of a model, and what they cost.

`Engined(answerer)` is an `Ask` (`evaluate.solvers`): all calls of a round are one batch of the engine, the samples of a
call share their prompt. `endpoint(url, model)` asks any OpenAI-compatible server instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modicum.core.errors import UserError
from modicum.evaluate.solvers import Call, Problem, Reply, Solved, Solver, solve
from modicum.evaluate.tasks import Generate

if TYPE_CHECKING:
    from modicum.evaluate.answer import Answerer

SLOW = " Let's think step by step."  # what asks a model without a switch for reasoning
AT_ONCE = 64  # questions that are solved side by side


class Engined:
    """Replies of a model on its serving engine.

    slow, fast: what stands after a prompt in either mode. A chat template that knows `enable_thinking` is given that
    instead of `slow`.
    """

    def __init__(self, answerer: Answerer, slow: str = SLOW, fast: str = ""):
        self.answerer, self.slow, self.fast = answerer, slow, fast
        template = answerer.tokenizer.template or ""
        self.switch = answerer.template != "none" and "enable_thinking" in template

    def __call__(self, batch: Sequence[tuple[Problem, Call, int]]) -> list[list[Reply]]:
        from modicum.serve.request import SamplingParams

        prompts, params = [], []
        for problem, call, seed in batch:
            prompts.append(self._ids(problem, call))
            params.append(
                SamplingParams(
                    max_tokens=call.max_new_tokens,
                    temperature=call.temperature,
                    n=call.n,
                    seed=seed,
                    stop=tuple(s for s in call.stop or () if s),
                    logprobs=0,
                )
            )
        longest = max(len(p) + int(s.max_tokens or 0) for p, s in zip(prompts, params, strict=True))
        engine = self.answerer.engine(longest)
        limit = engine.max_length
        cut = [p[-max(limit - int(s.max_tokens or 0), 1) :] for p, s in zip(prompts, params, strict=True)]
        return [
            [
                Reply(c.text, max(len(c.tokens), 1), -sum(t.logprob for t in c.logprobs), output.prompt_tokens)
                for c in output.completions
            ]
            for output in engine.generate(cut, params)
        ]

    def _ids(self, problem: Problem, call: Call) -> list[int]:
        answerer, tokenizer = self.answerer, self.answerer.tokenizer
        mark = "" if self.switch or call.wrap else self.slow if call.think else self.fast
        if answerer.template == "none":
            ids: list[int] = answerer.front + tokenizer.encode(call.prompt + mark)
            return ids or [tokenizer.start_id]
        lead = "" if call.wrap or call.think else problem.lead
        switch = {"enable_thinking": call.think} if self.switch else {}
        text = tokenizer.chat([{"role": "user", "content": call.prompt + mark}], **switch) + lead
        return tokenizer.encode(text, specials=True, add_special=False)


def endpoint(url: str, model: str, *, key: str = "none", slow: str = SLOW, client: Any = None) -> Any:
    """An `Ask` of an OpenAI-compatible server's chat completions at `url` (ending in /v1)."""
    if client is None:
        import openai

        client = openai.OpenAI(base_url=url, api_key=key)

    def one(item: tuple[Problem, Call, int]) -> list[Reply]:
        _, call, seed = item
        content = call.prompt + (slow if call.think and not call.wrap else "")
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            n=call.n,
            temperature=call.temperature,
            max_tokens=call.max_new_tokens,
            stop=list(call.stop or ()) or None,
            seed=seed % (1 << 31),
            logprobs=True,
        )
        used = answer.usage.completion_tokens if answer.usage else 0
        replies = []
        for choice in answer.choices:
            likely = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
            tokens = len(likely) or max(used // max(len(answer.choices), 1), 1)
            nats = -sum(t.logprob for t in likely)
            prompt_tokens = answer.usage.prompt_tokens if answer.usage else 0
            replies.append(Reply(choice.message.content or "", tokens, nats, prompt_tokens))
        return replies

    def ask(batch: Sequence[tuple[Problem, Call, int]]) -> list[list[Reply]]:
        with ThreadPoolExecutor(max_workers=min(len(batch), 16)) as pool:
            return list(pool.map(one, batch))

    return ask


def problems_of(requests: Sequence[Any], extract: Callable[[str], str]) -> list[Problem]:
    """The problems of a document's requests. Raises UserError for one of likelihoods, which needs no solver."""
    for request in requests:
        if not isinstance(request, Generate):
            raise UserError("a solver answers in words; this task scores choices. Leave --solver out, or form= it anew")
    return [Problem(r.prompt, r.max_new_tokens, r.stop, r.lead, extract, r.steps) for r in requests]


@dataclass(frozen=True)
class Solving:
    """A solver with what answers it (an `Ask`); budget: generated tokens of a request at most.

    at_once: documents solved side by side; their answers do not depend on it.
    """

    solver: Solver
    ask: Any
    budget: int | None = None
    at_once: int = AT_ONCE

    def replies(
        self, documents: Sequence[tuple[Any, Sequence[Any]]], extract: Callable[[str], str], seed: int = 0
    ) -> Iterator[tuple[Any, list[Solved]]]:
        """(key, what was solved of each of its requests) of each (key, requests), in order."""
        for start in range(0, len(documents), self.at_once):
            group = documents[start : start + self.at_once]
            problems = [problems_of(requests, extract) for _, requests in group]
            flat = [problem for some in problems for problem in some]
            solved = iter(solve(self.solver, flat, self.ask, budget=self.budget, seed=seed))
            for (key, _), some in zip(group, problems, strict=True):
                yield key, [next(solved) for _ in some]

    @staticmethod
    def costs(solved: Sequence[Solved]) -> dict[str, float]:
        """Figures of what an item took: generated tokens, generations, and whether the budget cut it short."""
        return {
            "tokens": float(sum(s.tokens for s in solved)),
            "generations": float(sum(s.generations for s in solved)),
            "cut": float(any(s.cut for s in solved)),
        }
