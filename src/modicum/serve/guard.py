"""What stands before every handler: host names, the API key, and errors as OpenAI's bodies."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from modicum.core.errors import UserError
from modicum.serve.request import InvalidRequest
from modicum.serve.schema import ApiError
from modicum.serve.ticket import ClientGone
from modicum.serve.worker import QueueFull, Stopping

if TYPE_CHECKING:
    from modicum.serve.metrics import Metrics

log = logging.getLogger("modicum.serve")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Handler = Callable[[HttpRequest], Awaitable[Response]]


def guarded(path: str, handler: Handler, host: str, api_key: str | None, metrics: Metrics) -> Handler:
    """The handler behind the checks of a server that listens on `host`, with its
    exceptions as answers; counts what it answered."""

    async def run(request: HttpRequest) -> Response:
        try:
            if api_key is None and host in LOOPBACK:
                check_host(request)
            if path.startswith("/v1"):
                authorise(request, api_key)
            response = await handler(request)
        except ApiError as error:
            response = JSONResponse(error.body, error.status)
        except InvalidRequest as error:
            response = answer(400, str(error), param=error.param, code=error.code)
        except QueueFull as error:
            response = answer(429, str(error), "rate_limit_error", code="rate_limit_exceeded")
            response.headers["retry-after"] = "1"
        except Stopping as error:
            response = answer(503, str(error), "server_error", code="service_unavailable")
        except UserError as error:  # a chat template that refuses the messages
            response = answer(400, str(error))
        except (ClientGone, ClientDisconnect):
            metrics.aborted.inc()
            response = answer(499, "the client went away")
        except Exception as error:
            log.exception("a handler failed")
            response = answer(500, f"{type(error).__name__}: {error}", "server_error", code="internal_error")
        metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return run


def http_error(metrics: Metrics) -> Callable[[HttpRequest, Exception], Awaitable[Response]]:
    """A handler of wrong paths and methods."""

    async def run(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        metrics.requests.labels("other", str(error.status_code)).inc()
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{request.method} is not allowed on {request.url.path}; use {allowed}"
        elif request.url.path == "/":
            message = "there is no chat page here; start the server with --ui, or see /v1/models"
        else:
            message = f"there is no {request.url.path} here; see /v1/models, /v1/completions, /v1/chat/completions"
        return answer(error.status_code, message, headers=dict(error.headers or {}))

    return run


def check_host(request: HttpRequest) -> None:
    """On loopback without a key, refuse foreign host names: a web page whose name is pointed at this machine
    (DNS rebinding) could otherwise read the answers, and the index, through the user's browser."""
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


def authorise(request: HttpRequest, key: str | None) -> None:
    given = request.headers.get("authorization", "")
    if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise ApiError(
            401,
            "wrong or missing API key; send the header Authorization: Bearer KEY",
            "authentication_error",
            code="invalid_api_key",
        )


def answer(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(ApiError(status, message, kind, param, code).body, status, headers)
