"""Putting a task's requests to the serving engine: what is served is what is evaluated.

A `Generate` is a greedy request, a `Choose` one whose continuations are scored (`serve.scoring`), so that its choices
share the computation of their prompt. Requests are packed without padding, and documents are answered in the order
in which they are finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.evaluate.score import LogLikelihood, check_ids, context_limit, prefix_ids, split_pair
from modicum.evaluate.tasks import Choose, Generate
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer

TEMPLATES = ("auto", "always", "none")
AHEAD = 4  # requests in the engine or waiting for it, times the sequences it runs at once
SCORE = SamplingParams(temperature=0, logprobs=1)
SMALL_BLOCK = 4  # tokens: choices compute anew what of their prompt does not fill a block


@dataclass(frozen=True)
class Encoded:
    """A request in token ids: contexts and, of a `Choose`, the continuation of each of its choices."""

    request: Generate | Choose
    contexts: tuple[list[int], ...]
    continuations: tuple[list[int], ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, answer included."""
        if isinstance(self.request, Generate):
            return len(self.contexts[0]) + self.request.max_new_tokens
        return max(len(a) + len(b) for a, b in zip(self.contexts, self.continuations, strict=True))


class Answerer:
    """Answers requests with `model` behind an engine of its own.

    prefix: what stands before a prompt that no template wraps, as in `evaluate.score`. template: `auto` wraps
    prompts to be answered in words in the tokenizer's chat template where it has one, and leaves choices whose
    likelihood is asked for as they are (the cloze form); `always` wraps those too; `none` wraps nothing.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        prefix: str = "auto",
        template: str = "none",
    ):
        if template not in TEMPLATES:
            raise UserError(f"template={template!r} is not known; allowed: {', '.join(TEMPLATES)}")
        self.model, self.tokenizer = model, tokenizer
        self.config = config or serving()
        self.prefix, self.front = prefix, prefix_ids(tokenizer, prefix)
        self.template = template if tokenizer.template is not None else "none"
        c = self.config
        # What outcomes depend on; whatever else a config says changes only how soon they come.
        self.settings = [prefix, self.template, str(c.kv), c.dtype, c.activation_bits]
        self._engine: Engine | None = None

    def plain(self, prefix: str | None = None) -> Answerer:
        """The same without a template, for prompts that are wrapped already."""
        return Answerer(self.model, self.tokenizer, self.config, prefix=prefix or self.prefix)

    # token ids --------------------------------------------------------------------------------------

    def encode(self, request: Generate | Choose) -> Encoded:
        """Raises UserError for an empty choice, and for token ids that the model does not know."""
        result = self._generate(request) if isinstance(request, Generate) else self._choose(request)
        check_ids(self.model, max(max(ids, default=0) for ids in (*result.contexts, *result.continuations)))
        return result

    def _generate(self, request: Generate) -> Encoded:
        if self.template != "none":
            return Encoded(request, (self._chat(request.prompt, request.lead),))
        ids = self.front + self.tokenizer.encode(request.prompt)
        return Encoded(request, (ids or [self.tokenizer.start_id],))

    def _choose(self, request: Choose) -> Encoded:
        if not all(request.choices):
            raise UserError(f"an empty continuation (of {request.prompt[-40:]!r}) has no likelihood; give it text")
        prompts = request.before or (request.prompt,) * len(request.choices)
        if self.template == "always":
            chats = {prompt: self._chat(prompt) for prompt in dict.fromkeys(prompts)}
            after = tuple(self.tokenizer.encode(choice.lstrip() or choice) for choice in request.choices)
            return Encoded(request, tuple(chats[prompt] for prompt in prompts), after)
        pairs = [split_pair(self.tokenizer, p, choice) for p, choice in zip(prompts, request.choices, strict=True)]
        contexts = tuple((self.front + before) or [self.tokenizer.start_id] for before, _ in pairs)
        return Encoded(request, contexts, tuple(after for _, after in pairs))

    def _chat(self, prompt: str, lead: str = "") -> list[int]:
        text = self.tokenizer.chat([{"role": "user", "content": prompt}]) + lead
        return self.tokenizer.encode(text, specials=True, add_special=False)

    # replies ----------------------------------------------------------------------------------------

    def replies(self, documents: Iterable[tuple[Any, Sequence[Encoded]]], longest: int) -> Iterator[tuple[Any, Any]]:
        """(key, replies in the order of its requests) of each (key, requests), as they are finished.

        longest: tokens of the longest of the requests; what exceeds the model's context loses its beginning.
        """
        engine = self.engine(longest)
        owner: dict[int, tuple[Any, int, list[int]]] = {}  # request -> document, which of its requests, which choices
        texts: dict[Any, list[Sequence[str]]] = {}
        left: dict[Any, int] = {}
        replies_of: dict[Any, list[Any]] = {}

        def requests() -> Iterator[Request]:
            for key, encoded in documents:
                replies_of[key] = [None] * len(encoded)
                texts[key] = [getattr(e.request, "choices", ()) for e in encoded]
                numbered = [(i, r, choices) for i, e in enumerate(encoded) for r, choices in self._requests(e, engine)]
                left[key] = len(numbered)
                owner.update((r.id, (key, i, choices)) for i, r, choices in numbered)
                yield from (r for _, r, _ in numbered)

        for output in engine.outputs(requests(), AHEAD * engine.config.max_sequences):
            key, i, choices = owner.pop(output.request)
            if choices:
                replies_of[key][i] = replies_of[key][i] or [None] * len(texts[key][i])
                for choice, completion in zip(choices, output.completions, strict=True):
                    replies_of[key][i][choice] = _likelihood(completion, texts[key][i][choice])
            else:
                replies_of[key][i] = output.text
            left[key] -= 1
            if not left[key]:
                del left[key], texts[key]
                yield key, replies_of.pop(key)

    def answers(self, requests: Sequence[Generate | Choose]) -> list[Any]:
        """The replies to `requests`, in their order."""
        encoded = [self.encode(request) for request in requests]
        longest = max((e.longest for e in encoded), default=0)
        result = dict(self.replies(((i, [e]) for i, e in enumerate(encoded)), longest))
        return [result[i][0] for i in range(len(encoded))]

    def engine(self, longest: int) -> Engine:
        """One whose cache holds a sequence of `longest` tokens, and a few steps' worth."""
        longest = min(longest, context_limit(self.model))
        if self._engine is None or self._engine.cache.capacity < longest:
            config = self.config
            if config.cache == "auto":
                tokens = max(8 * config.max_batch_tokens, longest + 2 * config.block_size)
                tokens = min(tokens, config.max_sequences * (context_limit(self.model) + config.block_size))
                config = dataclasses.replace(config, cache=f"{tokens}tok")
            self._engine = None
            self._engine = Engine(self.model, self.tokenizer, config)
        return self._engine

    def _requests(self, encoded: Encoded, engine: Engine) -> Iterator[tuple[Request, list[int]]]:
        """Engine requests and the choices that each scores: those with the same context together."""
        limit, request = engine.max_length, encoded.request
        if isinstance(request, Generate):
            budget = request.max_new_tokens
            if budget >= limit:
                raise UserError(
                    f"max_new_tokens={budget} leaves no room for a prompt in {limit} positions; ask for fewer"
                )
            params = SamplingParams(temperature=0, max_tokens=budget, stop=tuple(s for s in request.stop if s))
            yield Request(encoded.contexts[0][-(limit - budget) :], params), []
            return
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (before, after) in enumerate(zip(encoded.contexts, encoded.continuations, strict=True)):
            if len(after) > limit:
                raise UserError(
                    f"a continuation of {len(after)} tokens exceeds the model's {limit}; score it as a text "
                    "(--text), which is read in windows"
                )
            groups.setdefault(tuple(before[-(limit + 1 - len(after)) :]), []).append(i)
        for context, choices in groups.items():
            given = tuple(encoded.continuations[i] for i in choices)
            yield Request(list(context), SCORE, given, detokenize=False), choices


def _likelihood(completion: Completion, text: str) -> LogLikelihood:
    return LogLikelihood(
        sum(t.logprob for t in completion.logprobs),
        all(t.top[0][0] == t.token for t in completion.logprobs),
        len(completion.logprobs),
        len(text.encode("utf-8", "surrogatepass")),
    )


def serving(*, kv: str = "full", prefix_cache: bool | None = None, **settings: Any) -> EngineConfig:
    """An engine's config for evaluation: small blocks unless a KV policy counts them, a prefix cache if one may be."""
    policy: Any = registry.load("kv", Choice.parse("kv", kv).method).cls
    if not (policy.drops or policy.observes or policy.attends):
        settings = {"block_size": SMALL_BLOCK} | settings
    finds = "prefix_cache" not in policy.conflicts if prefix_cache is None else prefix_cache
    return EngineConfig(kv=kv, prefix_cache=finds, **settings)
