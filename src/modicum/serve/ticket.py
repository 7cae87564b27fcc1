"""One HTTP call's hold on the engine: its requests, their updates as they come, and what ends them early.

A `Ticket` ties the requests of a call together: whatever ends the call early (a client that goes away, an
error, a shutdown) aborts what is still at work, and its cache blocks are free after the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modicum.core.errors import ModicumError
from modicum.serve.metrics import Metrics
from modicum.serve.request import Request, Update
from modicum.serve.schema import ApiError
from modicum.serve.worker import Worker


class ClientGone(Exception):
    """The client closed its connection."""


class Ticket:
    """The engine requests of one HTTP call. Iterate once for their updates, in order."""

    def __init__(self, worker: Worker, requests: list[Request]):
        self._worker, self.requests = worker, requests
        self._queue: asyncio.Queue[list[Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._open = {r.id: set(range(r.params.n)) for r in requests}
        self._cancelled = False
        try:
            for request in requests:
                worker.submit(request, self._hear)
        except ModicumError:
            self.cancel()
            raise

    def _hear(self, updates: list[Update]) -> None:  # in the engine's thread
        self._loop.call_soon_threadsafe(self._queue.put_nowait, updates)

    def cancel(self) -> None:
        """Abort what is not finished. May be called more than once, and after the end."""
        for id in self._open:
            self._worker.abort(id)
        if self._open:
            self._open, self._cancelled = {}, True
            self._queue.put_nowait([])  # wakes `updates`

    async def updates(self) -> AsyncIterator[Update]:
        """Raises `ClientGone` after `cancel`, `ApiError` if the engine ended a request with an error."""
        while self._open:
            some = await self._queue.get()
            await asyncio.sleep(0)  # a stream that catches up delays neither the others nor news of a lost client
            if self._cancelled:
                raise ClientGone
            for update in some:
                if update.error is not None:
                    self._open.pop(update.request, None)
                    self.cancel()
                    if not self._worker.accepting:
                        raise ApiError(503, update.error, "server_error", code="service_unavailable")
                    raise ApiError(500, update.error, "server_error", code="engine_error")
                if update.finish and update.request in self._open:
                    self._open[update.request].discard(update.index)
                    if not self._open[update.request]:
                        del self._open[update.request]
                yield update
                if self._cancelled:  # meanwhile
                    raise ClientGone


@contextlib.asynccontextmanager
async def watched(ticket: Ticket, receive: Receive) -> AsyncIterator[None]:
    """Cancel the ticket when the client goes away, and in any case at the end."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    task = asyncio.create_task(gone())
    try:
        yield
    finally:
        task.cancel()
        ticket.cancel()


class EventStream(Response):
    """Server-sent events of a ticket, one JSON object each, ended by [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, events: AsyncIterator[dict[str, Any]], metrics: Metrics):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._ticket, self._events, self._metrics = ticket, events, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        async with watched(self._ticket, receive):
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                try:
                    async for event in self._events:
                        await write(json.dumps(event, ensure_ascii=False))
                except ApiError as error:
                    await write(json.dumps(error.body))
                await write("[DONE]", more=False)
            except (ClientGone, OSError):
                self._metrics.aborted.inc()
