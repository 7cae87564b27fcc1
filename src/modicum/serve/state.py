"""What the phases of an engine step share: the sequences, their cache, the scheduler, the model's runner, counts.

The phases are `serve.schedule` (which sequences run, and room for them), `serve.propose` (drafted tokens), the runner
(`serve.backends`), `serve.verify` (which tokens come out, along drafts and given continuations) and `serve.commit`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from modicum.model.decoder import Decoder
from modicum.model.patterns import set_attention
from modicum.serve.adapters import Adapters
from modicum.serve.backends.choose import make_runner
from modicum.serve.backends.measured import choose
from modicum.serve.cache import Cache
from modicum.serve.config import (
    EngineConfig,
    cache_blocks,
    longest,
    make_form,
    make_policy,
    make_scheduler,
    parse_cache_dtype,
)
from modicum.serve.guided import Beside
from modicum.serve.plan import AttentionPlan
from modicum.serve.propose import COUNTERS as DRAFT_COUNTERS
from modicum.serve.propose import Drafting, make_drafter
from modicum.serve.request import Request, Sample, Update
from modicum.serve.schedulers import Job, Plan
from modicum.serve.structured import Grammars
from modicum.serve.work import Work

log = logging.getLogger("modicum.serve")
COUNTERS = ("steps", "prompt_tokens", "computed_tokens", "cached_tokens", "generated_tokens", "preemptions")


class State:
    """Raises `UserError` for a cache that cannot be had and for methods that cannot be combined."""

    def __init__(self, model: Decoder, tokenizer: Any = None, config: EngineConfig | None = None):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config = config = config or EngineConfig()
        if config.attention is not None:
            set_attention(model, config.attention)
        shape, device = model.config, model.device
        dtype = parse_cache_dtype(config.dtype, model.dtype)
        beside = Beside(config, model, dtype)
        self.guide = beside.guide
        form = make_form(config, shape, dtype)
        n_blocks = cache_blocks(config, shape, dtype, device, beside.block_bytes())
        self.scheduler = make_scheduler(config, n_blocks)
        self.policy = make_policy(config, shape, self.scheduler)
        self.policy.prepare(self.model, config.kv_probe)
        drafter = make_drafter(config, shape.vocab_size, self.policy)
        self.cache = Cache(shape, config, n_blocks, form, device, self.policy)
        main = make_runner(model, self.cache.storage, self.cache.table, config.cuda_graphs, config.activation_bits)
        if config.fast_prefill:
            main = choose(main, model, config, type(self))
        self.runner = beside.runner(main, n_blocks, self.cache.table)
        self.cache.beside = beside.storages
        self.storage, self.blocks, self.pages = self.cache.storage, self.cache.blocks, self.cache.pages
        self.max_length = longest(config, shape, self.policy, self.cache.capacity)
        self.max_length = min([self.max_length, *(other.context_length for other in beside.shapes)])
        self.eos = frozenset(tokenizer.stop_ids if tokenizer is not None else shape.eos_ids)
        self.adapters = Adapters(model)
        self.samples: dict[int, Sample] = {}
        self.requests: dict[int, Request] = {}
        self.clock: Callable[[], float] = time.monotonic  # that of the requests' arrivals
        self.hinted: list[Job] = []  # waiting ones whose prefix hits the scheduler has been told
        self.counters = dict.fromkeys((*COUNTERS, *DRAFT_COUNTERS, "failures"), 0)
        self.drafting = Drafting(drafter, config) if drafter is not None else None

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Compiles structured outputs; made with the first request for one."""
        return Grammars(self.tokenizer, self.model.config.vocab_size)

    @property
    def watches(self) -> bool:
        """Whether the policy looks at queries or attention weights while they are computed."""
        return self.policy.observes or bool(self.policy.marks)

    def plan(self, works: Sequence[Work]) -> AttentionPlan:
        """How a step's rows attend."""
        more_rows = self.drafting is not None or any(w.sample.scored for w in works)
        return AttentionPlan(works, self.cache.storage, self.cache.table, self.watches, self.cache.recent, more_rows)

    def failed(self, requests: set[int], error: Exception) -> list[Update]:
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

    def preempt(self, sample: Sample) -> None:
        """Out of the cache and back to the queue."""
        self.cache.unload(sample)
        self.scheduler.commit(Plan(preempt=(sample.id,)))
        self.counters["preemptions"] += 1

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
        session = self.cache.session_of.pop(sample.request.id, None)
        if session is not None and sample.slot >= 0 and finish != "error":
            self.cache.rest(session, sample)
        else:
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

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what the cache holds now."""
        used = self.blocks.n_blocks - self.blocks.free
        generated = self.counters["generated_tokens"]
        return self.counters | {
            # Of one sequence: every pass gives it a token, and one more for each draft that was right.
            "tokens_per_forward": generated / max(1, generated - self.counters["accepted_tokens"]),
            "thinnings": self.cache.thinnings,
            "runner": getattr(self.runner, "name", "wrapped"),
            "fallbacks": dict(getattr(self.runner, "fallbacks", {})),
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "blocks": self.blocks.n_blocks,
            "free_blocks": self.blocks.free,
            "idle_sessions": len(self.cache.idle),
            "used_blocks": used,
            "remembered_blocks": self.blocks.remembered,
            "evicted_blocks": self.blocks.evictions,
            "block_size": self.config.block_size,
            "used_bytes": used * self.cache.block_bytes,
            "held_bytes": self.cache.held_bytes,
            "cache_bytes": self.blocks.n_blocks * self.cache.block_bytes,
        }
