"""From tokens to answers: the requests of one HTTP call, run to their end or streamed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from modicum.serve.answers import Format, usage
from modicum.serve.metrics import Metrics
from modicum.serve.request import (
    Completion,
    InvalidRequest,
    Output,
    Request,
    SamplingParams,
    TokenLogprob,
    Update,
    collect,
)
from modicum.serve.schema import ChatBody, CompletionBody
from modicum.serve.ticket import EventStream, Ticket, watched
from modicum.serve.tools import CallStream, ToolFormat
from modicum.serve.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one HTTP call asks of the engine.

    params: of every prompt; n: how many of its answers are given. echoes: texts of the prompts, where they are part of
    the answer; sources: of a grounded answer; tools: how calls are written, and the names of what may be called.
    """

    body: CompletionBody | ChatBody
    adapter: str | None
    prompts: list[list[int]]
    params: SamplingParams
    n: int
    echoes: Sequence[str] = ()
    sources: list[dict[str, Any]] | None = None
    tools: tuple[ToolFormat, list[str]] | None = None


class Responder:
    """Runs calls on a worker's engine."""

    def __init__(self, worker: Worker, metrics: Metrics):
        self.worker, self.metrics, self.tokenizer = worker, metrics, worker.engine.tokenizer

    async def answer(self, request: HttpRequest, call: Call) -> Response:
        if call.params.structured is not None:  # compiling a grammar may take a second
            await asyncio.to_thread(self.worker.engine.grammars.matcher, call.params.structured)
        form = Format(isinstance(call.body, ChatBody), call.body.model, self.tokenizer, call.tools)
        scored = bool(call.echoes) and call.body.logprobs is not None
        if call.body.stream:
            if scored or not call.n:
                raise InvalidRequest("prompts that are scored or given back alone are not streamed", "stream")
            ticket = Ticket(self.worker, self._requests(call))
            return EventStream(ticket, self._events(ticket, form, call), self.metrics)
        outputs = await self._run(request, self._requests(call)) if call.n else []
        scores = await self._run(request, self._scoring(call)) if scored else []
        choices: list[tuple[int, Completion]] = []
        for i in range(len(call.prompts)):
            completions = outputs[i].completions if call.n else [Completion(0, finish="length")]
            for index, c in enumerate(best(completions, max(1, call.n), call.body.logprobs)):
                c.text = (call.echoes[i] if call.echoes else "") + c.text
                if scored:
                    c.logprobs = [*prompt_logprobs(call.prompts[i], scores[i]), *c.logprobs]
                choices.append((i * max(1, call.n) + index, c))
        used = usage(
            sum(map(len, call.prompts)),
            sum(o.completion_tokens for o in outputs),
            sum(o.cached_tokens for o in outputs),
        )
        return JSONResponse(form.whole(choices, used, call.sources))

    def _requests(self, call: Call) -> list[Request]:
        return [Request(p, call.params, adapter=call.adapter) for p in call.prompts]

    def _scoring(self, call: Call) -> list[Request]:
        """What gives the log-probabilities of the prompts' own tokens: each is its first token's continuation."""
        params = SamplingParams(logprobs=1)
        return [
            Request(p[:1], params, continuations=(p[1:] or p[:1],), adapter=call.adapter, detokenize=False)
            for p in call.prompts
        ]

    async def _run(self, request: HttpRequest, requests: list[Request]) -> list[Output]:
        ticket = Ticket(self.worker, requests)
        heard: dict[int, list[Update]] = {r.id: [] for r in requests}
        async with watched(ticket, request.receive):
            async for update in ticket.updates():
                heard[update.request].append(update)
        self._observe(requests)
        return collect(requests, heard)

    async def _events(self, ticket: Ticket, form: Format, call: Call) -> AsyncIterator[dict[str, Any]]:
        echoes, sources, with_usage = call.echoes, call.sources, call.body.usage_wanted
        index_of = {r.id: i for i, r in enumerate(ticket.requests)}
        offsets: dict[int, int] = {}
        pending: dict[int, CallStream] = {}
        tokens = 0
        blank = {"usage": None} if with_usage else {}
        if sources is not None:  # first, so that a client can show them while the prompt is computed
            yield form.chunk(0, "", [], None, first=True) | {"sources": sources} | blank
            offsets[0] = 0
        async for update in ticket.updates():
            request = index_of[update.request]
            index = request * ticket.requests[request].params.n + update.index
            first = index not in offsets
            text = (echoes[request] if first and echoes else "") + update.text
            if form.tools is not None:
                text = pending.setdefault(index, CallStream(form.tools[0])).push(text)
            tokens += len(update.tokens)
            offset = offsets.setdefault(index, 0)
            finish = None if form.tools is not None else update.finish
            if first or text or update.logprobs or finish:
                yield form.chunk(index, text, update.logprobs, finish, first, offset) | blank
            if form.tools is not None and update.finish:
                yield form.calls(index, pending[index].kept, update.finish) | blank
            offsets[index] = offset + len(text)
        self._observe(ticket.requests)
        if with_usage:
            yield form.last(
                usage(
                    sum(len(r.prompt) for r in ticket.requests),
                    tokens,
                    sum(r.cached for r in ticket.requests),
                )
            )

    def _observe(self, requests: list[Request]) -> None:
        for request in requests:
            for s in request.sequences:
                if s.first_token is None or s.last_token is None:
                    continue
                completion_tokens = len(s.tokens) - len(request.prompt)
                self.metrics.first_token.observe(s.first_token - request.arrival)
                self.metrics.whole.observe(s.last_token - request.arrival)
                if completion_tokens > 1:
                    self.metrics.per_token.observe((s.last_token - s.first_token) / (completion_tokens - 1))


def best(completions: list[Completion], n: int, logprobs: int | bool | None) -> list[Completion]:
    """The `n` completions of the highest mean log-probability of a token, best first; all of `n` as they are."""
    if len(completions) == n:
        return completions

    def mean(completion: Completion) -> float:
        return sum(t.logprob for t in completion.logprobs) / max(1, len(completion.logprobs))

    chosen = sorted(completions, key=mean, reverse=True)[:n]
    for completion in chosen:
        if logprobs is None:
            completion.logprobs = []
    return chosen


def prompt_logprobs(prompt: Sequence[int], score: Output) -> list[TokenLogprob]:
    """Of a prompt's tokens after the first, which has none (NaN here, null in the answer)."""
    first = TokenLogprob(prompt[0], math.nan, [])
    return [first, *(score.completions[0].logprobs if len(prompt) > 1 else [])]
