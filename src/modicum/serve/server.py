"""The OpenAI-compatible server: /v1/models, /v1/completions, /v1/chat/completions, /v1/search, /metrics, /health.

    with BackgroundServer(engine, ServerConfig(model="mine", port=0)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

The handlers are in `serve.api`; here is what runs them, and how that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from modicum.core.errors import ModicumError, UserError
from modicum.serve.adapters import Attach
from modicum.serve.api import Api, ServerConfig
from modicum.serve.embeddings import Embedder
from modicum.serve.engine import Engine
from modicum.serve.grounding import Grounding
from modicum.serve.worker import Worker


def listen(config: ServerConfig) -> socket.socket:
    """A bound socket. Raises `UserError` if host or port cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise UserError(
            f"cannot listen on {config.host}:{config.port} ({error}); choose another host or port "
            "(port 0 takes a free one)"
        ) from None
    return sock


class Server(uvicorn.Server):
    """uvicorn, which on its way out lets the engine finish what it can within `drain` seconds."""

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        grounding: Grounding | None = None,
        embedder: Embedder | None = None,
        put_on: Attach | None = None,
    ):
        if engine.tokenizer is None:
            raise UserError("the server needs a tokenizer; load the engine from a folder that has a tokenizer.json")
        self.settings = config
        self.socket = listen(config)
        self.worker = Worker(engine, config.max_queue)
        self.api = Api(self.worker, config, grounding, embedder, put_on)
        super().__init__(
            uvicorn.Config(
                self.api.app(),
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=int(config.drain) + 5,
                timeout_keep_alive=30,
                h11_max_incomplete_event_size=64 << 10,
                server_header=False,
            )
        )

    @property
    def url(self) -> str:
        host, port = self.socket.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(asyncio.to_thread(self.worker.close, self.settings.drain))
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(self.worker.close, 0.0)
        await draining

    def serve_until_stopped(self) -> None:
        """Run in this thread until a signal or `should_exit`; the worker is closed afterwards in any case."""
        try:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it is done
                self.run(sockets=[self.socket])
        finally:
            self.worker.close(0.0)
            self.socket.close()


class BackgroundServer:
    """A server in a thread, for a program that also talks to it; a context manager."""

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig | None = None,
        grounding: Grounding | None = None,
        embedder: Embedder | None = None,
        put_on: Attach | None = None,
    ):
        self.server = Server(engine, config or ServerConfig(port=0), grounding, embedder, put_on)
        self.url = self.server.url
        self._thread = threading.Thread(target=self.server.serve_until_stopped, daemon=True, name="modicum-server")

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        for _ in self._until(30.0):
            if self.server.started:
                return self
            if not self._thread.is_alive():
                break
        raise ModicumError(f"the server at {self.url} did not start")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(self.server.settings.drain + 40)

    def _until(self, seconds: float) -> Iterator[None]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            yield
            time.sleep(0.01)
