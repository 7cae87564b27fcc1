"""What is asked of the engine and what comes back: parameters, requests, updates, outputs."""

from __future__ import annotations

import itertools
import math
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from modicum.core.errors import UserError

if TYPE_CHECKING:
    from modicum.serve.pages import Pages
    from modicum.serve.penalties import Penalties
    from modicum.serve.schedulers import Job
    from modicum.serve.text import TextStream

MOST_LOGPROBS = 64
MOST_STOPS = 16
MOST_SAMPLES = 128
_ids = itertools.count()


class InvalidRequest(UserError):
    """A request that cannot be served as given; `param` names the field and `code` the kind of fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class StructuredOutput:
    """What an answer must match from its first character to its last.

    value: a JSON schema as text, a regex, choices as a JSON list of texts, or a Lark grammar. param: the request's
    field that asked for it, for messages.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    value: str
    param: str = "structured"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Raises `InvalidRequest` for impossible values.

    Order: penalties and bias, temperature, top_k, top_p, min_p. temperature=0 is greedy. A seed fixes the
    outcome whatever else is in the batch. Stop strings are cut off the text, stop token ids are not shown.
    `logprobs` asks for the chosen token's log probability and those of the best `logprobs` tokens, under
    the model's own distribution (before penalties and temperature). max_tokens=None: up to the context's end.
    repetition_penalty divides positive logits of every token seen, prompt included (Keskar et al. 2019,
    arXiv:1909.05858); presence and frequency penalties subtract, for generated tokens (OpenAI's definition).
    With `structured` only tokens that can still lead to a match are chosen, and the sequence ends with the match.
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("top_k", 0, 1 << 31),
            ("n", 1, MOST_SAMPLES),
            ("repetition_penalty", 0.0, 100.0),
            ("max_tokens", 1, 1 << 31),
            ("logprobs", 0, MOST_LOGPROBS),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "logprobs"):
                continue
            if not math.isfinite(value) or not low <= value <= high:
                raise InvalidRequest(f"{name}={value} is outside {low} to {high}", name)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) <= 0:
                raise InvalidRequest(f"{name}=0 is not possible; it must be above 0", name)
        if len(stop) > MOST_STOPS or any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequest(f"stop must be up to {MOST_STOPS} strings, none of them empty", "stop")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise InvalidRequest(f"logit_bias of token {token} is {bias}, outside -100 to 100", "logit_bias")

    @property
    def penalised(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def plain(self) -> bool:
        """The token is the largest logit and nothing else is asked for."""
        changed = self.penalised or self.logit_bias or self.structured is not None
        return self.greedy and not changed and self.logprobs is None


@dataclass(slots=True)
class TokenLogprob:
    token: int
    logprob: float
    top: list[tuple[int, float]]  # (token, logprob), best first


@dataclass(slots=True)
class Update:
    """What one step added to one sample of a request. `text` is the new text that is safe to show."""

    request: int
    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None  # stop | length | abort | error
    error: str | None = None
    cached: int = 0  # prompt tokens found in the prefix cache


@dataclass(slots=True)
class Completion:
    """One finished sample."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    first_token_seconds: float | None = None  # from arrival
    seconds: float | None = None  # from arrival to the last token


@dataclass(slots=True)
class Output:
    """A finished request: its samples, counts and times."""

    request: int
    prompt_tokens: int
    cached_tokens: int
    completions: list[Completion]

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def tokens(self) -> list[int]:
        return self.completions[0].tokens

    @property
    def finish(self) -> str | None:
        return self.completions[0].finish

    @property
    def completion_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.completions)


@dataclass(slots=True, eq=False)
class Request:
    """A prompt (token ids) and what to do with it. `detokenize=False` leaves `text` empty.

    With `continuations` nothing is sampled: each gives one completion, whose `logprobs` are those of its tokens
    after the prompt (and of the most likely token at each of its places). A continuation is computed in one pass,
    or, with `token_by_token` and where a KV policy drops or observes entries, as if it were generated.

    `adapter`: the name of the engine's adapter that its tokens go through.

    `compress_at`: how many of the prompt's tokens are a context that a KV policy compresses before it has seen the
    rest, a question say; None: all of them.
    """

    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    continuations: tuple[Sequence[int], ...] = ()
    token_by_token: bool = False
    compress_at: int | None = None
    adapter: str | None = None
    id: int = field(default_factory=lambda: next(_ids))
    arrival: float = field(default_factory=time.monotonic)
    detokenize: bool = True
    sequences: list[Sample] = field(default_factory=list)
    cached: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.params.seed
        self.seed = secrets.randbits(63) if given is None else given

    @property
    def context(self) -> int:
        """Tokens after which a KV policy compresses."""
        return len(self.prompt) if self.compress_at is None else self.compress_at

    @property
    def n(self) -> int:
        """Completions it gives."""
        return len(self.continuations) or self.params.n


def check_request(request: Request, most: int, vocab: int, has_tokenizer: bool) -> None:
    """Raise `InvalidRequest` for what an engine of `most` tokens and `vocab` token ids cannot serve."""
    params, prompt = request.params, request.prompt
    if not prompt:
        raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
    if len(prompt) >= most and not request.continuations:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, but prompt and answer together may have {most}; shorten the prompt",
            "prompt",
            "context_length_exceeded",
        )
    if not 0 < request.context <= len(prompt):
        raise InvalidRequest(
            f"compress_at={request.compress_at} is outside the prompt; write 1 to {len(prompt)}", "compress_at"
        )
    for continuation in request.continuations:
        if not continuation:
            raise InvalidRequest("a continuation is empty; give at least one token", "continuations")
        if len(prompt) + len(continuation) - 1 > most:
            raise InvalidRequest(
                f"prompt and continuation have {len(prompt)} and {len(continuation)} tokens, but together they may "
                f"have {most + 1}; shorten one",
                "continuations",
                "context_length_exceeded",
            )
        if min(continuation) < 0 or max(continuation) >= vocab:
            raise InvalidRequest(f"a continuation holds token ids outside 0 to {vocab - 1}", "continuations")
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise InvalidRequest(f"the prompt holds token ids outside 0 to {vocab - 1}", "prompt")
    if any(not 0 <= t < vocab for t in (*params.logit_bias, *params.stop_token_ids)):
        raise InvalidRequest(f"logit_bias or stop_token_ids hold token ids outside 0 to {vocab - 1}", "logit_bias")
    if params.structured is not None and (not has_tokenizer or request.continuations):
        raise InvalidRequest(
            "structured output needs a tokenizer, which this engine has not"
            if not has_tokenizer
            else "continuations are given and cannot be structured; leave one of both out",
            params.structured.param,
        )
    if params.stop and not has_tokenizer:
        raise InvalidRequest("stop strings need a tokenizer; this engine has none", "stop")


@dataclass(slots=True, eq=False)
class Sample:
    """One sequence in the engine: a prompt, the tokens sampled after it, and what it holds of the cache."""

    request: Request
    index: int
    job: Job
    tokens: list[int]
    stops: frozenset[int]
    limit: int  # length at which it ends
    random: random.Random
    given: Sequence[int] = ()  # the continuation it follows
    scored: bool = False  # all of `given` is among `tokens` and computed like a prompt
    scores: list[TokenLogprob] = field(default_factory=list)
    stream: TextStream | None = None
    slot: int = -1  # row of the block table while running
    blocks: list[int] = field(default_factory=list)
    pages: Pages | None = None  # in place of blocks once a KV policy thinned the cache
    names: list[bytes] = field(default_factory=list)
    salt: bytes = b""  # of `names`: its adapter's
    published: int = 0
    coded: int = 0  # tokens in codes, where a cache form keeps the latest ones as they are
    policy: Any = None
    drafter: Any = None
    votes: dict[int, float] = field(default_factory=dict)  # by layer with a router: its sum over the prompt
    penalties: Penalties | None = None
    matcher: Any = None  # a `structured.Matcher`: where it stands in its grammar
    finish: str | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def id(self) -> int:
        return self.job.id

    @property
    def params(self) -> SamplingParams:
        return self.request.params


def collect(requests: Sequence[Request], updates: Mapping[int, list[Update]]) -> list[Output]:
    """Put the updates of finished requests together, in the order of `requests`."""
    outputs = []
    for request in requests:
        completions = [Completion(i) for i in range(request.n)]
        for update in updates[request.id]:
            c = completions[update.index]
            c.text += update.text
            c.tokens += update.tokens
            c.logprobs += update.logprobs
            c.finish, c.error = update.finish or c.finish, update.error or c.error
        for sample in request.sequences:
            c = completions[sample.index]
            if sample.first_token is not None and sample.last_token is not None:
                c.first_token_seconds = sample.first_token - request.arrival
                c.seconds = sample.last_token - request.arrival
        outputs.append(Output(request.id, len(request.prompt), request.cached, completions))
    return outputs
