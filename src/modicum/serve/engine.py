"""The engine: requests in, tokens out, one step at a time.

    engine = Engine(model, tokenizer, EngineConfig(cache="1GiB"))
    for output in engine.generate(["Once upon", "In the end"], SamplingParams(temperature=0)):
        print(output.text)

A step asks the scheduler for a plan, gives each planned sequence room in the cache, runs all planned
tokens through the decoder as one row (`serve.attend` sorts out who sees whom), and samples one token for
each sequence that has reached the end of what is known. An engine belongs to one thread; `serve.worker`
puts one behind a queue.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.core.errors import ModicumError, UserError
from modicum.model.decoder import Decoder
from modicum.serve.cache import Cache
from modicum.serve.config import (
    EngineConfig,
    cache_blocks,
    longest,
    make_policy,
    make_scheduler,
    parse_cache_dtype,
)
from modicum.serve.draft import COUNTERS as DRAFT_COUNTERS
from modicum.serve.draft import Drafting, make_drafter
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
from modicum.serve.runner import make_runner
from modicum.serve.sampling import Choices, Penalties, choose
from modicum.serve.schedulers import Job, Plan
from modicum.serve.scoring import follow, score
from modicum.serve.text import TextStream
from modicum.serve.work import Work, arrange

log = logging.getLogger("modicum.serve")
COUNTERS = ("steps", "prompt_tokens", "computed_tokens", "cached_tokens", "generated_tokens", "preemptions")
PATIENCE = 1000  # steps in which everything waits and nothing is started, before that counts as a failure


class Engine:
    """Continuous batching over a paged cache.

    `tokenizer` may be None if prompts are token ids and no text is wanted. Raises `UserError` for a
    cache that cannot be had and for methods that cannot be combined.
    """

    def __init__(self, model: Decoder, tokenizer: Any = None, config: EngineConfig | None = None):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config = config = config or EngineConfig()
        shape, device = model.config, model.device
        dtype = parse_cache_dtype(config.dtype, model.dtype)
        n_blocks = cache_blocks(config, shape, dtype, device)
        self.scheduler = make_scheduler(config, n_blocks)
        self.policy = make_policy(config, shape, self.scheduler)
        self.policy.prepare(self.model, config.kv_probe)
        drafter = make_drafter(config, shape.vocab_size, self.policy)
        self.cache = Cache(shape, config, n_blocks, dtype, device, self.policy)
        self.runner = make_runner(model, self.cache.attend, config.cuda_graphs, config.activation_bits)
        self.storage, self.blocks, self.pages = self.cache.storage, self.cache.blocks, self.cache.pages
        self.max_length = longest(config, shape, self.policy, self.cache.capacity)
        self.eos = frozenset(tokenizer.stop_ids if tokenizer is not None else shape.eos_ids)
        self.samples: dict[int, Sample] = {}
        self.requests: dict[int, Request] = {}
        self.clock: Callable[[], float] = time.monotonic  # that of the requests' arrivals
        self._ids = itertools.count()
        self._hinted: list[Job] = []
        self._idle = 0
        self.counters = dict.fromkeys((*COUNTERS, *DRAFT_COUNTERS, "failures"), 0)
        self.drafting = Drafting(self, drafter) if drafter is not None else None

    # requests -------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that cannot be served. Safe from any thread."""
        most = min(self.max_length, self.cache.capacity)
        check_request(request, most, self.model.config.vocab_size, self.tokenizer is not None)

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
            if text:
                sample.stream = TextStream(self.tokenizer, params.stop, prompt)
            if params.penalised:
                sample.penalties = Penalties(prompt, (), vocab, self.model.device)
            sample.policy = self.policy.begin(len(prompt)) if watched else None
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

    @property
    def watches(self) -> bool:
        """Whether the policy looks at queries or attention weights while they are computed."""
        return self.policy.observes or self.policy.marks

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
            self._hint()
            late = self.scheduler.waiting[0] if self.scheduler.waiting else None
            if late is not None and late.length > self.cache.capacity:  # only a policy that drops lets it get so long
                updates += self.fail(
                    [self.samples[late.id].request.id],
                    f"its cache was needed by others, and "
                    f"{late.length} tokens are too many to compute anew in {self.cache.capacity}",
                )
            plan = self.scheduler.plan(self.scheduler.state(self.blocks.free, self.clock()))
            works = self._apply(plan)
            if works:
                run = self._run if self.drafting is None else self.drafting.run
                run(works, updates)
                self.counters["steps"] += 1
                self._idle = 0
            elif self.scheduler.pending() and not self.scheduler.running:
                self._idle += 1
                if self._idle >= PATIENCE:
                    raise ModicumError(f"{self.scheduler.pending()} sequences wait and the scheduler starts none")
        except Exception as error:
            ids = [w.sample.id for w in works] or [j.id for j in self.scheduler.running] or list(self.samples)
            updates += self._failed({self.samples[i].request.id for i in ids if i in self.samples}, error)
        return updates

    def _failed(self, requests: set[int], error: Exception) -> list[Update]:
        log.error("a step failed; %d requests are ended", len(requests), exc_info=error)
        self.counters["failures"] += 1
        return self.fail(requests, f"{type(error).__name__}: {error}")

    def fail(self, requests: Sequence[int] | set[int], message: str) -> list[Update]:
        """End requests with an error, freeing what they hold."""
        updates = []
        for id in list(requests):
            for sample in list(self.requests[id].sequences) if id in self.requests else []:
                if sample.finish is None:
                    self.end(sample, "error", suspect=True)
                    updates.append(Update(id, sample.index, finish="error", error=message))
        return updates

    def _hint(self) -> None:
        """Tell the scheduler what the prefix cache holds of the jobs it could admit next."""
        for job in self._hinted:
            job.hit = job.revived = 0
        self._hinted.clear()
        room = self.config.max_sequences - len(self.scheduler.running)
        if not self.config.prefix_cache or room <= 0:
            return
        tokens = self.config.max_batch_tokens
        for job in self.scheduler.waiting[:room]:
            self.cache.look_up(self.samples[job.id])
            self._hinted.append(job)
            tokens -= job.length - job.hit
            if tokens <= 0:
                break

    def _apply(self, plan: Plan) -> list[Work]:
        """Make the plan true; returns what there is room for, which is all of it if the plan was right."""
        for id in plan.preempt:
            self._preempt(self.samples[id])
        plan = Plan(plan.run)
        # Found blocks are held before any is taken: taking could forget the ones another was promised.
        for id, _ in plan.run:
            if self.samples[id].slot < 0:
                self._start(self.samples[id])
        self.scheduler.commit(plan)
        run, works = list(plan.run), []
        while run:
            id, n = run.pop(0)
            while not self.cache.room(self.samples[id], n):
                late = run.pop()[0] if run else id
                self._preempt(self.samples[late])
                if late == id:
                    break
            else:
                works.append(Work(self.samples[id], self.samples[id].job.computed, n))
        return arrange(works)

    def _start(self, sample: Sample) -> None:
        self.cache.load(sample)
        if sample.job.preempted == 0:
            if sample.index == 0:
                sample.request.cached = sample.job.hit
            self.counters["prompt_tokens"] += len(sample.request.prompt)
            self.counters["cached_tokens"] += sample.job.hit

    def _preempt(self, sample: Sample) -> None:
        """Out of the cache and back to the queue."""
        self.cache.unload(sample)
        self.scheduler.commit(Plan(preempt=(sample.id,)))
        self.counters["preemptions"] += 1

    def _run(self, works: list[Work], updates: list[Update]) -> None:
        ready = [w for w in works if w.start + w.n == w.sample.job.length and not w.sample.scored]
        logits_BV = self.runner(works, [w.at + w.n - 1 for w in ready], self.watches)
        self._commit(works, [w.sample for w in ready], logits_BV, updates)
        score(self, works, updates)

    def _commit(
        self, works: list[Work], samples: list[Sample], logits_BV: Tensor | None, updates: list[Update]
    ) -> None:
        """Book what was computed, sample the next token of `samples`, end what is finished."""
        chosen = choose(logits_BV, samples) if logits_BV is not None else Choices([], [], {})
        broken = {s.id for s, ok in zip(samples, chosen.finite, strict=True) if not ok}
        faults = self.cache.attend.faults  # of policies that failed while they observed: theirs alone
        for w in works:
            sample = w.sample
            self.counters["computed_tokens"] += w.n
            self.scheduler.advance(sample.id, w.n, 0)
            if sample.pages is not None:
                sample.pages.count_LG += w.n
            if sample.id not in broken and sample.id not in faults:
                self.cache.publish(sample)
                try:
                    if self.policy.drops and not self.cache.thin(sample, w.n):
                        self._preempt(sample)
                except Exception as error:
                    faults[sample.id] = error
        for w in works:
            if (fault := faults.pop(w.sample.id, None)) is not None:
                updates += self._failed({w.sample.request.id}, fault)
        now = self.clock()
        for i, sample in enumerate(samples):
            if sample.id in broken:
                updates += self.fail([sample.request.id], "the model's output is not a number (NaN or infinite)")
            elif sample.finish is None:
                self.scheduler.advance(sample.id, 0, 1)
                try:
                    updates.append(self._say(sample, chosen.tokens[i], chosen.logprobs.get(i), now))
                except Exception as error:  # a tokenizer that cannot decode is this request's trouble alone
                    updates += self._failed({sample.request.id}, error)

    def _say(self, sample: Sample, token: int, logprob: Any, now: float) -> Update:
        """Append a sampled token; end the sequence if it was the last."""
        first = sample.first_token is None
        sample.first_token, sample.last_token = sample.first_token or now, now
        sample.tokens.append(token)
        self.counters["generated_tokens"] += 1
        update = Update(sample.request.id, sample.index, tokens=[token], logprobs=[logprob] if logprob else [])
        if first:
            update.cached = sample.request.cached
            self.start_siblings(sample)
        if sample.penalties is not None:
            sample.penalties.add(token)
        if token in sample.stops:
            update.finish = "stop"
        else:
            if sample.stream is not None:
                update.text = sample.stream.push(token)
                if sample.stream.stopped is not None:
                    update.finish = "stop"
            if update.finish is None and len(sample.tokens) >= sample.limit:
                update.finish = "length"
        if update.finish:
            if sample.stream is not None:
                update.text += sample.stream.finish()
                if sample.stream.stopped is not None:  # what was held back can complete a stop string
                    update.finish = "stop"
            self.end(sample, update.finish)
        return update

    def start_siblings(self, sample: Sample) -> None:
        """Queue a request's other sequences once the first has computed their prompt."""
        if sample.index == 0:
            for sibling in sample.request.sequences[1:]:
                self.scheduler.add(sibling.job)

    def end(self, sample: Sample, finish: str, suspect: bool = False) -> None:
        """Finish a sequence and free what it holds. Suspect contents are zeroed and not found again."""
        if suspect:
            self.cache.distrust(sample)
        sample.finish = finish
        self.cache.unload(sample)
        self.scheduler.remove(sample.id)
        self.samples.pop(sample.id, None)
        request = sample.request
        if sample.index == 0 and sample.first_token is None and finish in ("abort", "error"):
            for sibling in request.sequences[1:]:
                sibling.finish = sibling.finish or finish
                self.samples.pop(sibling.id, None)
        if all(s.finish for s in request.sequences):
            self.requests.pop(request.id, None)

    def close(self) -> None:
        """Abort everything and forget the prefix cache."""
        for id in list(self.requests):
            self.abort(id)
        self.blocks.clear()

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what the cache holds now."""
        used = self.blocks.n_blocks - self.blocks.free
        generated = self.counters["generated_tokens"]
        return self.counters | {
            # Of one sequence: every pass gives it a token, and one more for each draft that was right.
            "tokens_per_forward": generated / max(1, generated - self.counters["accepted_tokens"]),
            "thinnings": self.cache.thinnings,
            "runner": getattr(self.runner, "name", "wrapped"),
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "blocks": self.blocks.n_blocks,
            "free_blocks": self.blocks.free,
            "used_blocks": used,
            "remembered_blocks": self.blocks.remembered,
            "evicted_blocks": self.blocks.evictions,
            "block_size": self.config.block_size,
            "used_bytes": used * self.storage.block_bytes,
            "cache_bytes": self.blocks.n_blocks * self.storage.block_bytes,
        }
