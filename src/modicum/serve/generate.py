"""Text generators for rewriting documents: a local model behind the engine, or an OpenAI-compatible server.

Both give what `data.replies.Generate` says: replies as they come, each with the number of its request. A request that
cannot be served is answered with an error of its own; the others go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from modicum.data.replies import ERROR, Generate, Reply, Request
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.load import load_engine
from modicum.serve.request import InvalidRequest, SamplingParams
from modicum.serve.request import Request as EngineRequest

AT_ONCE = 8  # requests to a server
GIVE_UP = 3  # after so many failed connections in a row a server is asked no more


def local(model: str, device: str = "cpu") -> Generate:
    """A model folder, name or hub id behind the engine. Raises `UserError` where it cannot be loaded."""
    return of_engine(load_engine(model, EngineConfig(cache="512MiB", max_sequences=32), device=device))


def of_engine(engine: Engine) -> Generate:
    """A generator on an engine that is there already. Without a chat template, messages are joined by empty lines."""

    def tokens(request: Request) -> list[int]:
        tokenizer = engine.tokenizer
        if request.messages and getattr(tokenizer, "template", None):
            messages = [{"role": role, "content": content} for role, content in request.messages]
            return list(tokenizer.encode(tokenizer.chat(messages), add_special=False))
        text = request.prompt or "\n\n".join(content for _, content in request.messages)
        return list(tokenizer.encode(text, add_special=True))

    def generate(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        taken: dict[int, int] = {}
        ready: list[EngineRequest] = []
        for number, request in enumerate(requests):
            try:
                params = SamplingParams(
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    stop=request.stop,
                    seed=request.seed,
                )
                prompt = tokens(request)
                if len(prompt) >= engine.max_length:
                    why = f"the prompt has {len(prompt)} tokens, the model reads {engine.max_length}"
                    yield number, Reply(why, ERROR)
                    continue
                scored = (
                    (engine.tokenizer.encode(request.continuation, add_special=False),) if request.continuation else ()
                )
                one = EngineRequest(prompt, params, continuations=scored)
                engine.check(one)
            except InvalidRequest as error:
                yield number, Reply(str(error), ERROR)
                continue
            taken[one.id] = number
            ready.append(one)
        for output in engine.outputs(ready, ahead=2 * engine.config.max_sequences):
            number = taken[output.request]
            if requests[number].continuation:
                nats = sum(token.logprob for token in output.completions[0].logprobs)
                yield number, Reply("", "stop", nats)
            else:
                yield number, Reply(output.text, "length" if output.finish == "length" else "stop")

    return generate


def remote(url: str, model: str | None = None) -> Generate:
    """An OpenAI-compatible server; `model` None takes the first that it lists. The key is that of OPENAI_API_KEY."""
    import openai

    base = url.rstrip("/")
    client = openai.OpenAI(
        base_url=base if base.endswith("/v1") else base + "/v1",
        api_key=os.environ.get("OPENAI_API_KEY") or "none",
        max_retries=2,
        timeout=600,
    )
    state: dict[str, Any] = {"model": model, "failed": 0}

    def one(request: Request) -> Reply:
        if request.continuation:
            return Reply(f"{base} gives no log probability of a given text; take a local model", ERROR)
        if state["failed"] >= GIVE_UP:
            return Reply(f"{base} cannot be reached", ERROR)
        options: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop": list(request.stop) or None,
        }
        try:
            if state["model"] is None:
                state["model"] = client.models.list().data[0].id
            if request.messages:
                messages: Any = [{"role": role, "content": content} for role, content in request.messages]
                choice: Any = client.chat.completions.create(
                    model=state["model"], messages=messages, **options
                ).choices[0]
                text = choice.message.content
            else:
                choice = client.completions.create(model=state["model"], prompt=request.prompt, **options).choices[0]
                text = choice.text
        except openai.APIConnectionError as error:
            state["failed"] += 1
            return Reply(f"{base} cannot be reached ({error.__cause__ or error})", ERROR)
        except openai.APIError as error:
            return Reply(f"{base} failed: {error.message}", ERROR)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return Reply(f"{base} answers with no completion ({type(error).__name__})", ERROR)
        state["failed"] = 0
        if not isinstance(text, str):
            return Reply(f"{base} answers with no text", ERROR)
        return Reply(text, "length" if choice.finish_reason == "length" else "stop")

    def generate(requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = {pool.submit(one, request): number for number, request in enumerate(requests)}
            for future in as_completed(futures):
                yield futures[future], future.result()

    return generate
