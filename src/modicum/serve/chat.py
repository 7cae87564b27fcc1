"""A conversation with an engine in this process, or with a server elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from modicum.core.errors import ModicumError, UserError
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

CHAT = {"max_tokens": 512, "temperature": 0.7, "top_p": 0.95}  # where neither the user nor the model's publisher says

Messages = list[dict[str, str]]
Speak = Callable[[Messages], Iterator[str]]


class Conversation:
    """Keeps the messages; `ask` yields the answer as it comes and remembers what of it was said.

    An answer that is left early (the iterator closed) stays in the history as far as it went, so that the
    conversation goes on from what the reader saw. A failed one leaves the history as it was.
    """

    def __init__(self, speak: Speak, system: str | None = None):
        self._speak = speak
        self.messages: Messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> Iterator[str]:
        reply: list[str] = []
        conversation = [*self.messages, {"role": "user", "content": text}]
        try:
            for text_chunk in self._speak(conversation):
                reply.append(text_chunk)
                yield text_chunk
        except ModicumError:
            reply.clear()
            raise
        finally:
            if reply:
                self.messages = [*conversation, {"role": "assistant", "content": "".join(reply)}]

    def reset(self) -> None:
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]


def local(engine: Engine, params: SamplingParams) -> Speak:
    """Speak with an engine; the oldest turns are left out of the prompt once it would not fit the context."""
    tokenizer = engine.tokenizer
    limit = engine.max_length - min(params.max_tokens or engine.max_length // 4, engine.max_length // 2)

    def speak(messages: Messages) -> Iterator[str]:
        kept = list(messages)
        while len(ids := tokenizer.encode(tokenizer.chat(kept), add_special=False)) > limit:
            first = 1 if kept[0]["role"] == "system" else 0
            if len(kept) - first <= 1:
                raise UserError(
                    f"the message has {len(ids)} tokens with its template, there is room for {limit}; "
                    "write less, or start with a smaller --max-tokens"
                )
            del kept[first : first + 2]
        for update in engine.stream(ids, params):
            if update.text:
                yield update.text

    return speak


def remote(url: str, model: str | None, options: Mapping[str, Any], api_key: str | None = None) -> Speak:
    """Speak with an OpenAI-compatible server; `model` None takes the first that it lists.

    options: of every request (temperature, max_tokens, seed, ...); what is left out is the server's default.
    """
    import openai

    base = url.rstrip("/")
    client = openai.OpenAI(
        base_url=base if base.endswith("/v1") else base + "/v1", api_key=api_key or "none", max_retries=1
    )

    def call(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except openai.APIStatusError as error:
            raise UserError(f"{base} refused: {error.message}") from None
        except openai.APIConnectionError as error:
            raise UserError(f"{base} cannot be reached ({error.__cause__ or error}); is the server running?") from None
        except openai.APIError as error:
            raise ModicumError(f"{base} failed: {error.message}") from None

    name = model or call(lambda: client.models.list().data[0].id)

    create: Any = client.chat.completions.create

    def speak(messages: Messages) -> Iterator[str]:
        stream = call(lambda: create(model=name, messages=messages, stream=True, **options))
        with stream:
            chunks = iter(stream)
            while (chunk := call(lambda: next(chunks, None))) is not None:
                text_chunk = chunk.choices[0].delta.content if chunk.choices else None
                if text_chunk:
                    yield text_chunk

    return speak
