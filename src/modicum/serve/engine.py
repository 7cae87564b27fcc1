"""The engine: requests in, tokens out, one step at a time.

    engine = Engine(model, tokenizer, EngineConfig(cache="1GiB"))
    for output in engine.generate(["Once upon", "In the end"], SamplingParams(temperature=0)):
        print(output.text)

A step is schedule, reserve, propose, forward, verify, commit: a plan of the scheduler, room in the cache for what it
runs, drafted tokens, one forward pass over all tokens as one row (`serve.plan` says who sees whom), and a token for
each sequence that has reached the end of what is known. An engine belongs to one thread; `serve.worker` puts one
behind a queue.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from modicum.core.errors import ModicumError, UserError
from modicum.model.decoder import Decoder
from modicum.serve.adapters import Attach
from modicum.serve.backends.routed import has_routers
from modicum.serve.config import EngineConfig
from modicum.serve.penalties import Penalties
from modicum.serve.request import (
    InvalidRequest,
    Output,
    Request,
    Sample,
    SamplingParams,
    Update,
    check_request,
    collect,
)
from modicum.serve.schedule import reserve, schedule
from modicum.serve.schedulers import Job
from modicum.serve.scoring import follow, score
from modicum.serve.state import State
from modicum.serve.text import TextStream
from modicum.serve.verify import rows_to_check, verify
from modicum.serve.work import Work, arrange

PATIENCE = 1000  # steps in which everything waits and nothing is started, before that counts as a failure


class Engine(State):
    """Continuous batching over a paged cache.

    `tokenizer` may be None if prompts are token ids and no text is wanted. Raises `UserError` for a
    cache that cannot be had and for methods that cannot be combined.
    """

    def __init__(self, model: Decoder, tokenizer: Any = None, config: EngineConfig | None = None):
        super().__init__(model, tokenizer, config)
        self._ids, self._idle = itertools.count(), 0

    # requests -------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that cannot be served. Safe from any thread."""
        most = min(self.max_length, self.cache.capacity)
        check_request(request, most, self.model.config.vocab_size, self.tokenizer is not None)
        if request.adapter is not None and request.adapter not in self.adapters:
            raise InvalidRequest(f"there is no adapter {request.adapter!r} here", "model", "model_not_found")
        if request.params.structured is not None:
            self.grammars.matcher(request.params.structured)

    def add(self, request: Request) -> int:
        """Queue a request; returns its id. Raises `InvalidRequest` for one that cannot be served."""
        self.check(request)
        params, prompt, vocab = request.params, request.prompt, self.model.config.vocab_size
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        limit = min(self.max_length, len(prompt) + (params.max_tokens or self.max_length))
        text = self.tokenizer is not None and (request.detokenize or bool(params.stop)) and not request.continuations
        samples = []
        watched = self.policy.drops or self.watches
        for i in range(request.n):
            job = Job(next(self._ids), request.arrival, len(prompt), len(prompt))
            sample = Sample(request, i, job, list(prompt), stops, limit, random.Random(f"{request.seed}/{i}"))
            if request.continuations:
                follow(sample, at_once=not (request.token_by_token or watched))
            sample.salt = self.adapters.salt(request.adapter)
            if text:
                sample.stream = TextStream(self.tokenizer, params.stop, prompt)
            if params.structured is not None:
                sample.matcher = self.grammars.matcher(params.structured)
            if params.penalised:
                sample.penalties = Penalties(prompt, (), vocab, self.model.device)
            sample.policy = self.policy.begin(request.context) if watched else None
            if self.drafting is not None:
                self.drafting.begin(sample)
            samples.append(sample)
        request.sequences = samples
        self.samples |= {sample.id: sample for sample in samples}
        self.requests[request.id] = request
        # Further samples wait for the first one's prompt, which they then find in the prefix cache.
        self.scheduler.add(request.sequences[0].job)
        return request.id

    def abort(self, request_id: int) -> None:
        """Stop a request and give back what it holds; unknown ids are ignored."""
        request = self.requests.get(request_id)
        for sample in list(request.sequences if request else ()):
            if sample.finish is None:
                self.end(sample, "abort")

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = (),
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Output]:
        """Outputs in the order of `prompts` (texts or token ids); one `params` for all, or one each.

        `progress` is called with the number of requests that have just finished. Raises `InvalidRequest`
        before any work if one cannot be served, `ModicumError` if a step failed.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        each = each or [SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts and {len(each)} sampling parameters; give one for all, or one each"
            )
        requests = [Request(self.encode(p), s) for p, s in zip(prompts, each, strict=True)]
        for request in requests:
            self.check(request)
        finished = {}
        for output in self.outputs(requests):
            finished[output.request] = output
            if progress:
                progress(1)
        return [finished[request.id] for request in requests]

    def outputs(self, requests: Iterable[Request], ahead: int | None = None) -> Iterator[Output]:
        """Outputs of `requests` as they finish; at most `ahead` of them are taken and in the engine at a time.

        Leaving the loop early aborts the rest. Raises `InvalidRequest` when one is taken that cannot be served,
        `ModicumError` if a step failed.
        """
        source = iter(requests)
        mine: dict[int, tuple[Request, list[Update]]] = {}
        try:
            while True:
                for request in itertools.islice(source, None if ahead is None else ahead - len(mine)):
                    self.add(request)
                    mine[request.id] = request, []
                if not mine:
                    return
                for update in self.step():
                    if update.error:
                        raise ModicumError(f"generation failed: {update.error}")
                    if update.request in mine:
                        mine[update.request][1].append(update)
                for id in [id for id in mine if id not in self.requests]:
                    request, updates = mine.pop(id)
                    yield collect([request], {id: updates})[0]
        finally:
            for id in mine:
                self.abort(id)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Update]:
        """Updates of one request as they come; leaving the loop early aborts it."""
        request = Request(self.encode(prompt), params or SamplingParams())
        self.add(request)
        try:
            while request.id in self.requests:
                for update in self.step():
                    if update.error:
                        raise ModicumError(f"generation failed: {update.error}")
                    if update.request == request.id:
                        yield update
        finally:
            self.abort(request.id)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest("a text prompt needs a tokenizer; give token ids", "prompt")
            return list(self.tokenizer.encode(prompt, add_special=True))
        return [int(t) for t in prompt]

    # a step ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Run one step; returns what is new. A failure ends the requests in the step, not the engine."""
        works: list[Work] = []
        updates: list[Update] = []
        try:
            works = reserve(self, schedule(self, updates))
            if works:
                self._compute(works, updates)
                self.counters["steps"] += 1
                self._idle = 0
            elif self.scheduler.pending() and not self.scheduler.running:
                self._idle += 1
                if self._idle >= PATIENCE:
                    raise ModicumError(f"{self.scheduler.pending()} sequences wait and the scheduler starts none")
        except Exception as error:
            ids = [w.sample.id for w in works] or [j.id for j in self.scheduler.running] or list(self.samples)
            updates += self.failed({self.samples[i].request.id for i in ids if i in self.samples}, error)
        return updates

    def _compute(self, works: list[Work], updates: list[Update]) -> None:
        """Propose, forward, verify and commit."""
        drafting, start, before = self.drafting, time.perf_counter(), self.counters["generated_tokens"]
        drafts = drafting is not None and drafting.wanted(works)
        trees = drafting.propose(works, self.cache) if drafting is not None and drafts else []
        plan = self.plan(works)
        rows, at = rows_to_check(works)
        self.adapters.route(works)
        logits_RV = self.runner(plan, rows)
        if trees and logits_RV is not None and not math.isfinite(float(logits_RV.sum())):
            # Perhaps a guess no one asked for: the step is done again without any, and nothing of them stays.
            assert drafting is not None
            drafting.withdraw(trees, self.cache)
            plan = self.plan(arrange(works))
            rows, at = rows_to_check(works)
            self.adapters.route(works)
            logits_RV = self.runner(plan, rows)
        elif drafting is not None and (drafts or any(w.n > 1 for w in works)):
            drafting.learn(works, rows, logits_RV, self.runner)
        verify(self, plan, logits_RV, at, updates)
        score(self, works, updates)
        if drafting is not None:
            tokens = self.counters["generated_tokens"] - before
            drafting.note(works, drafts, time.perf_counter() - start, tokens)

    def add_adapter(self, name: str, folder: str, put_on: Attach) -> None:
        """Serve an adapter of a folder, which `put_on` attaches to the model, beside those that are there."""
        if has_routers(self.model):
            raise UserError(
                "adapters are served beside a model without routers; merge this one: --adapter FOLDER --form"
            )
        self.adapters.add(name, folder, put_on)

    def remove_adapter(self, name: str) -> None:
        """Raises `UserError` for an unknown adapter and for one that requests at work use."""
        users = sum(r.adapter == name for r in self.requests.values())
        if users:
            raise UserError(f"{users} requests use the adapter {name!r}; remove it when they have ended")
        self.adapters.remove(name)

    def close(self) -> None:
        """Abort everything and forget the prefix cache."""
        for id in list(self.requests):
            self.abort(id)
        self.blocks.clear()
