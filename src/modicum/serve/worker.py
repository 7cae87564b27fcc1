"""An engine in a thread of its own, behind a queue.

Any thread may submit and abort; updates come back through a callback per request, called in the engine's
thread with what one step added. The last update of a request has `finish` set for every sample, or one
with `error`, whatever happens: a step that fails, a shutdown, even the thread's own end.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from modicum.core.errors import ModicumError
from modicum.serve.engine import Engine
from modicum.serve.request import Request, Update

log = logging.getLogger("modicum.serve")
Sink = Callable[[list[Update]], None]
T = TypeVar("T")


class QueueFull(ModicumError):
    """Too many requests wait already."""


class Stopping(ModicumError):
    """No new requests: the worker is shutting down, or is gone."""


class Worker:
    """`max_queue` bounds the requests that are accepted and have not finished their first step."""

    def __init__(self, engine: Engine, max_queue: int = 256):
        self.engine, self.max_queue = engine, max_queue
        self._commands: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self._sinks: dict[int, Sink] = {}
        self._lock = threading.Lock()
        self._queued: set[int] = set()  # accepted, no update yet
        self._deadline: float | None = None  # set: draining until then
        self._thread = threading.Thread(target=self._main, daemon=True, name="modicum-engine")
        self._thread.start()

    @property
    def accepting(self) -> bool:
        return self._deadline is None and self._thread.is_alive()

    @property
    def queued(self) -> int:
        return len(self._queued)

    def submit(self, request: Request, sink: Sink) -> None:
        """Raises `InvalidRequest`, `QueueFull` or `Stopping`; otherwise `sink` hears of the request's end."""
        self.engine.check(request)
        with self._lock:
            if not self.accepting:
                raise Stopping("the server is shutting down; try another one, or again later")
            if len(self._queued) >= self.max_queue:
                raise QueueFull(f"{len(self._queued)} requests wait already; try again later")
            self._queued.add(request.id)
            self._commands.put(("add", request, sink))

    def abort(self, request_id: int) -> None:
        """Drop a request: its sink is not called again once this has been carried out."""
        self._commands.put(("abort", request_id, None))

    def run(self, action: Callable[[], T]) -> T:
        """The result of `action`, carried out between two steps; raises what it raises, or `Stopping`."""
        done: Future[T] = Future()
        with self._lock:
            if not self.accepting:
                raise Stopping("the server is shutting down")
            self._commands.put(("run", action, done))
        return done.result()

    def close(self, timeout: float = 0.0) -> None:
        """Refuse new requests, give those at work `timeout` seconds, end the rest with an error."""
        with self._lock:
            self._deadline = min(self._deadline or float("inf"), time.monotonic() + timeout)
        self._commands.put(("wake", None, None))
        self._thread.join(timeout + 30)
        if self._thread.is_alive():
            log.error("the engine's thread did not end; its step takes too long")

    def _main(self) -> None:
        message = "the server is shutting down"
        try:
            while self._deadline is None or (self.engine.busy and time.monotonic() < self._deadline):
                self._listen(wait=not self.engine.busy)
                if self.engine.busy:
                    self._deliver(self.engine.step())
        except BaseException as error:  # nothing may leave a client waiting
            log.exception("the engine's thread ends")
            message = f"the engine stopped: {type(error).__name__}: {error}"
        finally:
            with self._lock:
                self._deadline = self._deadline or 0.0  # from here on submit() refuses
            while not self._commands.empty():
                kind, value, sink = self._commands.get()
                if kind == "add":
                    self._call(value.id, sink, [Update(value.id, 0, finish="error", error=message)])
                elif kind == "run":
                    sink.set_exception(Stopping(message))
            for id, sink in list(self._sinks.items()):
                self._call(id, sink, [Update(id, 0, finish="error", error=message)])
            self._sinks.clear()
            self._queued.clear()
            self.engine.close()

    def _listen(self, wait: bool) -> None:
        """Carry out what was asked for since the last step; sleep for the first command if idle."""
        while True:
            try:
                kind, value, sink = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if kind == "add":
                self._sinks[value.id] = sink
                try:
                    self.engine.add(value)
                except Exception as error:  # checked before: a fault of ours, and this request's alone
                    log.exception("a request could not be added")
                    self._deliver([Update(value.id, 0, finish="error", error=f"{type(error).__name__}: {error}")])
            elif kind == "abort":
                self._forget(value)
                self.engine.abort(value)
            elif kind == "run":
                try:
                    sink.set_result(value())
                except Exception as error:
                    sink.set_exception(error)

    def _forget(self, id: int) -> None:
        self._sinks.pop(id, None)
        self._queued.discard(id)

    def _deliver(self, updates: list[Update]) -> None:
        by_request: dict[int, list[Update]] = {}
        for update in updates:
            by_request.setdefault(update.request, []).append(update)
        for id, some in by_request.items():
            self._queued.discard(id)
            sink = self._sinks.get(id)
            if sink is not None:
                self._call(id, sink, some)
            if id not in self.engine.requests:
                self._forget(id)

    def _call(self, id: int, sink: Sink, updates: list[Update]) -> None:
        try:
            sink(updates)
        except Exception:  # the listener is gone (its event loop was closed): so is the request
            log.warning("the listener of a request failed; the request is dropped", exc_info=True)
            self._forget(id)
            self.engine.abort(id)
