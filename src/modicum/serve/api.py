"""The HTTP side: handlers of the OpenAI-compatible endpoints, of search and of the chat page.

Handlers run in one event loop; the engine in its worker's thread, which `serve.ticket` joins to a call.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from modicum.core.errors import BudgetError
from modicum.serve import tools
from modicum.serve.adapters import Attach
from modicum.serve.embeddings import Embedder, EmbeddingsBody, embeddings
from modicum.serve.grounding import MAX_PASSAGES, Grounding, Messages
from modicum.serve.guard import guarded, http_error
from modicum.serve.metrics import Metrics
from modicum.serve.request import InvalidRequest
from modicum.serve.respond import Call, Responder
from modicum.serve.schema import (
    ApiError,
    ChatBody,
    CompletionBody,
    LoadAdapterBody,
    SearchBody,
    UnloadAdapterBody,
    parse_body,
)
from modicum.serve.worker import Worker


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """port 0 takes any free one. max_body in bytes, drain in seconds; api_key guards everything under /v1.

    adapter: the name of the adapter that is part of the model, for clients to show. ui: serve the chat page at /.
    runtime_adapters: clients may load and unload adapters, from any folder that this process can read. sampling: of
    requests that leave such settings out (temperature, top_p, top_k, min_p, repetition_penalty).
    """

    model: str = "model"
    adapter: str | None = None
    ui: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    runtime_adapters: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)
    max_body: int = 8 << 20
    max_queue: int = 256
    drain: float = 10.0


class Api:
    """The handlers."""

    def __init__(
        self,
        worker: Worker,
        config: ServerConfig,
        grounding: Grounding | None = None,
        embedder: Embedder | None = None,
        put_on: Attach | None = None,
    ):
        self.worker, self.config, self.grounding, self.embedder = worker, config, grounding, embedder
        self.put_on = put_on
        self.metrics = Metrics(worker)
        self.responder = Responder(worker, self.metrics)
        self.tokenizer = worker.engine.tokenizer
        self.tool_format = tools.format_of(self.tokenizer.template)
        self.started = int(time.time())

    def app(self) -> Starlette:
        routes = [
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{model:path}", self.model, "GET"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/embeddings", self.embeddings, "POST"),
            ("/v1/search", self.search, "POST"),
            ("/openapi.json", self.description, "GET"),
            ("/metrics", self.figures, "GET"),
            ("/health", self.health, "GET"),
        ]
        if self.config.runtime_adapters and self.put_on is not None:
            routes += [
                ("/v1/load_lora_adapter", self.load_adapter, "POST"),
                ("/v1/unload_lora_adapter", self.unload_adapter, "POST"),
            ]
        if self.config.ui:
            routes.append(("/", self.page, "GET"))
        return Starlette(
            routes=[
                Route(
                    path, guarded(path, handler, self.config.host, self.config.api_key, self.metrics), methods=[method]
                )
                for path, handler, method in routes
            ],
            exception_handlers={HTTPException: http_error(self.metrics)},
        )

    async def page(self, request: HttpRequest) -> Response:
        from modicum.serve import ui

        return Response(ui.page(), media_type="text/html", headers=ui.headers())

    async def health(self, request: HttpRequest) -> Response:
        ok = self.worker.accepting
        return JSONResponse({"status": "ok" if ok else "stopping", "model": self.config.model}, 200 if ok else 503)

    async def description(self, request: HttpRequest) -> Response:
        from modicum.serve.openapi import describe

        return JSONResponse(describe())

    async def figures(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.config.model,
            "object": "model",
            "created": self.started,
            "owned_by": "modicum",
            "max_model_len": self.worker.engine.max_length,
            "adapter": self.config.adapter,
            "sampling": dict(self.config.sampling),
            "search": self.grounding.card() if self.grounding else None,
            "embeddings": self.embedder.name if self.embedder else None,
        }

    def _adapter_card(self, name: str) -> dict[str, Any]:
        return self._card() | {"id": name, "parent": self.config.model, "adapter": name}

    async def models(self, request: HttpRequest) -> Response:
        adapters = [self._adapter_card(name) for name in list(self.worker.engine.adapters.served)]
        return JSONResponse({"object": "list", "data": [self._card(), *adapters]})

    async def model(self, request: HttpRequest) -> Response:
        name = self._known(request.path_params["model"])
        return JSONResponse(self._card() if name is None else self._adapter_card(name))

    def _known(self, name: str) -> str | None:
        """The adapter of that name, None for the model itself."""
        adapters = list(self.worker.engine.adapters.served)
        if name == self.config.model:
            return None
        if name in adapters:
            return name
        here = ", ".join(map(repr, [self.config.model, *adapters]))
        raise ApiError(
            404,
            f"the model {name!r} does not exist here; this server has {here}",
            param="model",
            code="model_not_found",
        )

    async def load_adapter(self, request: HttpRequest) -> Response:
        body: LoadAdapterBody = parse_body(await self._body(request), LoadAdapterBody)
        if body.lora_name == self.config.model:
            raise InvalidRequest(f"{body.lora_name!r} is the model's own name; choose another", "lora_name")
        engine, put_on = self.worker.engine, self.put_on
        assert put_on is not None
        add = functools.partial(engine.add_adapter, body.lora_name, body.lora_path, put_on)
        await asyncio.to_thread(self.worker.run, add)
        return JSONResponse(self._adapter_card(body.lora_name))

    async def unload_adapter(self, request: HttpRequest) -> Response:
        body: UnloadAdapterBody = parse_body(await self._body(request), UnloadAdapterBody)
        remove = functools.partial(self.worker.engine.remove_adapter, body.lora_name)
        await asyncio.to_thread(self.worker.run, remove)
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})

    async def _body(self, request: HttpRequest) -> bytes:
        limit, parts, size = self.config.max_body, [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
            parts.append(part)
        return b"".join(parts)

    async def completions(self, request: HttpRequest) -> Response:
        body: CompletionBody = parse_body(await self._body(request), CompletionBody)
        self._known(body.model)
        params, prompts = body.params(self.config.sampling), body.prompts()
        tokens = await asyncio.to_thread(lambda: [self._encode(p, "prompt", True) for p in prompts])
        echoes = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts] if body.echo else []
        drawn = body.drawn(params)
        n = 0 if body.max_tokens == 0 else params.n
        call = Call(body=body, adapter=self._known(body.model), prompts=tokens, params=drawn, n=n, echoes=echoes)
        return await self.responder.answer(request, call)

    async def chat(self, request: HttpRequest) -> Response:
        body: ChatBody = parse_body(await self._body(request), ChatBody)
        self._known(body.model)
        params = body.params(self.config.sampling)
        messages: Messages = [m.plain() for m in body.messages]
        sources: list[dict[str, Any]] | None = None
        if body.search_wanted:
            messages, sources = await asyncio.to_thread(self._ground, messages, body, params.max_tokens)

        callable_tools, must_call = body.callable_tools()
        if callable_tools and self.tool_format is None:
            raise InvalidRequest("the chat template of this model has no tools; leave them out", "tools", "no_tools")
        if must_call:
            assert self.tool_format is not None
            token_id = self.tokenizer.backend.token_to_id(self.tool_format.start)
            params = replace(params, structured=tools.forced(callable_tools, self.tool_format, token_id))
        known = (self.tool_format, tools.names_of(callable_tools)) if self.tool_format and callable_tools else None

        def encode() -> list[int]:
            more = {"tools": callable_tools} if callable_tools else {}
            return self._encode(self.tokenizer.chat(messages, **more), "messages", False)

        prompt = await asyncio.to_thread(encode)
        call = Call(
            body=body,
            adapter=self._known(body.model),
            prompts=[prompt],
            params=params,
            n=params.n,
            sources=sources,
            tools=known,
        )
        return await self.responder.answer(request, call)

    async def embeddings(self, request: HttpRequest) -> Response:
        body: EmbeddingsBody = parse_body(await self._body(request), EmbeddingsBody)
        if self.embedder is not None and body.model not in (self.embedder.name, self.config.model):
            raise ApiError(
                404,
                f"the model {body.model!r} does not exist here; this server embeds by {self.embedder.name!r}",
                param="model",
                code="model_not_found",
            )
        return JSONResponse(await asyncio.to_thread(embeddings, self.embedder, body))

    def _ground(
        self, messages: Messages, body: ChatBody, max_tokens: int | None
    ) -> tuple[Messages, list[dict[str, Any]]]:
        grounding, k = self._passages(body.search_k, "search.k")
        try:
            return grounding.ground(messages, k, max_tokens, body.search_filter)
        except BudgetError as error:
            raise InvalidRequest(str(error), "messages", "context_length_exceeded") from None

    def _passages(self, k: int | None, param: str) -> tuple[Grounding, int]:
        """The index, and how many passages are wanted of it."""
        if self.grounding is None:
            raise InvalidRequest(
                "this server has no index to search; start it with: modicum serve MODEL --index FOLDER",
                param.split(".")[0],
                "no_index",
            )
        if k is not None and not 1 <= k <= MAX_PASSAGES:
            raise InvalidRequest(f"{param}={k} is outside 1 to {MAX_PASSAGES}", param)
        return self.grounding, k or self.grounding.k

    async def search(self, request: HttpRequest) -> Response:
        body: SearchBody = parse_body(await self._body(request), SearchBody)
        grounding, k = self._passages(body.k, "k")
        data = await asyncio.to_thread(grounding.search, body.query, k, body.filter)
        return JSONResponse({"object": "list", "data": data})

    def _encode(self, prompt: str | list[int], param: str, add_special: bool) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param} holds half a surrogate pair at character {error.start}; it is no text", param
            ) from None
        return list(self.tokenizer.encode(prompt, add_special=add_special))
