"""The HTTP side: handlers of the OpenAI-compatible endpoints, of search and of the chat page.

Handlers run in one event loop; the engine in its worker's thread, which `serve.ticket` joins to a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from modicum.core.errors import BudgetError, UserError
from modicum.serve.grounding import MAX_PASSAGES, Grounding, Messages
from modicum.serve.metrics import Metrics
from modicum.serve.request import Completion, InvalidRequest, Request, SamplingParams, Update, collect
from modicum.serve.schema import ApiError, ChatBody, CompletionBody, Format, SearchBody, parse_body, usage
from modicum.serve.ticket import ClientGone, EventStream, Ticket, watched
from modicum.serve.worker import QueueFull, Stopping, Worker

log = logging.getLogger("modicum.serve")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Handler = Callable[[HttpRequest], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """port 0 takes any free one. max_body in bytes, drain in seconds; api_key guards everything under /v1.

    adapter: the name of the adapter that is part of the model, for clients to show. ui: serve the chat page at /.
    """

    model: str = "model"
    adapter: str | None = None
    ui: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_body: int = 8 << 20
    max_queue: int = 256
    drain: float = 10.0


class Api:
    """The handlers."""

    def __init__(self, worker: Worker, config: ServerConfig, grounding: Grounding | None = None):
        self.worker, self.config, self.grounding = worker, config, grounding
        self.metrics = Metrics(worker)
        self.tokenizer = worker.engine.tokenizer
        self.started = int(time.time())

    def app(self) -> Starlette:
        routes = [
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{model:path}", self.model, "GET"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/search", self.search, "POST"),
            ("/metrics", self.figures, "GET"),
            ("/health", self.health, "GET"),
        ]
        if self.config.ui:
            routes.append(("/", self.page, "GET"))
        return Starlette(
            routes=[Route(path, self._guarded(path, handler), methods=[method]) for path, handler, method in routes],
            exception_handlers={HTTPException: self._http_error},
        )

    def _guarded(self, path: str, handler: Handler) -> Handler:
        async def run(request: HttpRequest) -> Response:
            try:
                self._check_host(request)
                if path.startswith("/v1"):
                    self._authorise(request)
                response = await handler(request)
            except ApiError as error:
                response = JSONResponse(error.body, error.status)
            except InvalidRequest as error:
                response = _error(400, str(error), param=error.param, code=error.code)
            except QueueFull as error:
                response = _error(429, str(error), "rate_limit_error", code="rate_limit_exceeded")
                response.headers["retry-after"] = "1"
            except Stopping as error:
                response = _error(503, str(error), "server_error", code="service_unavailable")
            except UserError as error:  # a chat template that refuses the messages
                response = _error(400, str(error))
            except (ClientGone, ClientDisconnect):
                self.metrics.aborted.inc()
                response = _error(499, "the client went away")
            except Exception as error:
                log.exception("a handler failed")
                response = _error(500, f"{type(error).__name__}: {error}", "server_error", code="internal_error")
            self.metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return run

    async def _http_error(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.metrics.requests.labels("other", str(error.status_code)).inc()
        allowed = (error.headers or {}).get("Allow", "")
        if error.status_code == 405:
            message = f"{request.method} is not allowed on {request.url.path}; use {allowed}"
        elif request.url.path == "/":
            message = "there is no chat page here; start the server with --ui, or see /v1/models"
        else:
            message = f"there is no {request.url.path} here; see /v1/models, /v1/completions, /v1/chat/completions"
        return _error(error.status_code, message, headers=dict(error.headers or {}))

    def _check_host(self, request: HttpRequest) -> None:
        """On loopback without a key, refuse foreign host names: a web page whose name is pointed at this machine
        (DNS rebinding) could otherwise read the answers, and the index, through the user's browser."""
        if self.config.api_key is not None or self.config.host not in LOOPBACK:
            return
        host = (request.url.hostname or "").rstrip(".").lower()
        if host == "localhost" or host.endswith(".localhost"):
            return
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(host)
            return
        raise ApiError(
            403,
            f"this server is local and does not answer to the host name {host!r}; use localhost or an address, "
            "or start it with --api-key if a proxy is in front of it",
            code="host_not_allowed",
        )

    def _authorise(self, request: HttpRequest) -> None:
        key = self.config.api_key
        given = request.headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise ApiError(
                401,
                "wrong or missing API key; send the header Authorization: Bearer KEY",
                "authentication_error",
                code="invalid_api_key",
            )

    async def page(self, request: HttpRequest) -> Response:
        from modicum.serve import ui

        return Response(ui.page(), media_type="text/html", headers=ui.headers())

    async def health(self, request: HttpRequest) -> Response:
        ok = self.worker.accepting
        return JSONResponse({"status": "ok" if ok else "stopping", "model": self.config.model}, 200 if ok else 503)

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
            "search": self.grounding.card() if self.grounding else None,
        }

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: HttpRequest) -> Response:
        self._known(request.path_params["model"])
        return JSONResponse(self._card())

    def _known(self, name: str) -> None:
        if name != self.config.model:
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; this server has {self.config.model!r}",
                param="model",
                code="model_not_found",
            )

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
        params, prompts = body.params(), body.prompts()
        tokens = await asyncio.to_thread(lambda: [self._encode(p, "prompt", True) for p in prompts])
        echoes = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts] if body.echo else []
        return await self._answer(request, body, tokens, params, chat=False, echoes=echoes)

    async def chat(self, request: HttpRequest) -> Response:
        body: ChatBody = parse_body(await self._body(request), ChatBody)
        self._known(body.model)
        params = body.params()
        messages: Messages = [m.plain() for m in body.messages]
        sources: list[dict[str, Any]] | None = None
        if body.search_wanted:
            messages, sources = await asyncio.to_thread(self._ground, messages, body.search_k, params.max_tokens)

        def encode() -> list[int]:
            return self._encode(self.tokenizer.chat(messages), "messages", False)

        return await self._answer(request, body, [await asyncio.to_thread(encode)], params, chat=True, sources=sources)

    def _ground(
        self, messages: Messages, k: int | None, max_tokens: int | None
    ) -> tuple[Messages, list[dict[str, Any]]]:
        grounding, k = self._passages(k, "search.k")
        try:
            return grounding.ground(messages, k, max_tokens)
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
        data = await asyncio.to_thread(grounding.search, body.query, k)
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

    async def _answer(
        self,
        request: HttpRequest,
        body: CompletionBody | ChatBody,
        prompts: list[list[int]],
        params: SamplingParams,
        chat: bool,
        echoes: list[str] | None = None,
        sources: list[dict[str, Any]] | None = None,
    ) -> Response:
        ticket = Ticket(self.worker, [Request(p, params) for p in prompts])
        form = Format(chat, self.config.model, self.tokenizer)
        if body.stream:
            events = self._events(ticket, form, body.usage_wanted, echoes or [], sources)
            return EventStream(ticket, events, self.metrics)
        heard: dict[int, list[Update]] = {r.id: [] for r in ticket.requests}
        async with watched(ticket, request.receive):
            async for update in ticket.updates():
                heard[update.request].append(update)
        outputs = collect(ticket.requests, heard)
        choices: list[tuple[int, Completion]] = []
        for i, output in enumerate(outputs):
            for c in output.completions:
                c.text = (echoes[i] if echoes else "") + c.text
                choices.append((i * params.n + c.index, c))
        self._observe(ticket.requests)
        used = usage(
            sum(o.prompt_tokens for o in outputs),
            sum(o.completion_tokens for o in outputs),
            sum(o.cached_tokens for o in outputs),
        )
        return JSONResponse(form.whole(choices, used, sources))

    async def _events(
        self,
        ticket: Ticket,
        form: Format,
        with_usage: bool,
        echoes: list[str],
        sources: list[dict[str, Any]] | None,
    ) -> AsyncIterator[dict[str, Any]]:
        index_of = {r.id: i for i, r in enumerate(ticket.requests)}
        offsets: dict[int, int] = {}
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
            tokens += len(update.tokens)
            offset = offsets.setdefault(index, 0)
            if first or text or update.logprobs or update.finish:
                yield form.chunk(index, text, update.logprobs, update.finish, first, offset) | blank
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


def _error(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(ApiError(status, message, kind, param, code).body, status, headers)
