"""Sessions: conversations whose entries stay in the cache from one turn to the next.

    with Session(engine) as session:
        print(session.generate("Once upon a time").text)
        print(session.generate(" And then?").text)      # computes the new tokens alone

A turn that resends the whole text finds a prefix in the prefix cache, but only whole blocks, and nothing of a sequence
from which a KV policy has evicted: it is computed and compressed anew. A session goes on from what was kept. Between
turns it takes no slot, and its memory counts as free: when others need it, the session that is idle longest gives its
entries up, before any running sequence is preempted, and its next turn computes its tokens anew. A policy compresses
then where it did in the first turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Self

from modicum.core.errors import ModicumError, UserError
from modicum.serve.backends.routed import has_routers
from modicum.serve.engine import Engine
from modicum.serve.request import InvalidRequest, Output, Request, SamplingParams, Update, collect

_ids = itertools.count()


class Session:
    """One conversation; belongs to its engine's thread. Raises `UserError` for engines that cannot keep one.

    `tokens`: the whole conversation, answers with their stop tokens included.
    """

    def __init__(self, engine: Engine, adapter: str | None = None):
        if engine.cache.recent is not None:
            raise UserError(
                f"sessions do not work with the cache form {engine.config.cache_form}, which codes tokens by the "
                "block; choose int8 or plain"
            )
        if has_routers(engine.model):
            raise UserError("sessions do not work with a model whose layers have routers; send whole texts")
        self.engine, self.adapter, self._id = engine, adapter, next(_ids)
        self._tokens: list[int] = []
        self._last: Request | None = None
        self._context: int | None = None  # tokens of the first turn's context
        self._closed = False

    @property
    def tokens(self) -> list[int]:
        if self._last is not None and self._last.sequences[0].finish not in (None, "error"):
            self._tokens = self._last.sequences[0].tokens
        return list(self._tokens)

    def request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        compress_at: int | None = None,
    ) -> Request:
        """Queue the next turn: `prompt` (text, or token ids) follows what there is. `compress_at` may be given with
        the first. Raises `InvalidRequest` for one that cannot be served, or while the turn before is running."""
        if self._closed:
            raise InvalidRequest("the session is closed; begin another one", "session")
        if self._last is not None and self._last.sequences[0].finish is None:
            raise InvalidRequest("the session's turn before is not over; wait for it, or abort it", "session")
        tokens = self.tokens
        if isinstance(prompt, str) and tokens:
            if self.engine.tokenizer is None:
                raise InvalidRequest("a text prompt needs a tokenizer; give token ids", "prompt")
            new = list(self.engine.tokenizer.encode(prompt, add_special=False))
        else:
            new = self.engine.encode(prompt)
        if not new:
            raise InvalidRequest("the turn is empty; give at least one token", "prompt")
        params = params or SamplingParams()
        if params.n != 1:
            raise InvalidRequest(f"n={params.n} answers cannot go on as one session; ask for one", "n")
        context = self._context if tokens else compress_at
        request = Request(tokens + new, params, adapter=self.adapter, compress_at=context)
        self.engine.check(request)
        self.engine.cache.session_of[request.id] = self._id
        self.engine.add(request)
        self._tokens, self._last = tokens, request
        self._context = request.context
        return request

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Update]:
        """Updates of the next turn as they come; leaving the loop early ends the answer there."""
        request = self.request(prompt, params)
        try:
            while request.id in self.engine.requests:
                for update in self.engine.step():
                    if update.request == request.id:
                        if update.error:
                            raise ModicumError(f"generation failed: {update.error}")
                        yield update
        finally:
            self.engine.abort(request.id)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Output:
        """The answer to the next turn; `cached_tokens` says how many of its tokens were in the cache."""
        updates = list(self.stream(prompt, params))
        assert self._last is not None
        return collect([self._last], {self._last.id: updates})[0]

    def close(self) -> None:
        """End a turn that is running and give all memory back."""
        self._closed = True
        if self._last is not None:
            self.engine.cache.session_of.pop(self._last.id, None)
            self.engine.abort(self._last.id)
        self.engine.cache.drop(self._id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
