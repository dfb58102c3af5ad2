"""ASGI middleware around all routes: request ids, allowed hosts and origins, and the end of the server.

All of it passes messages on as they come, so streams and disconnects reach the routes and the client unchanged.
"""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss_jax.errors import OverloadedError
from gptoss_jax.serving.api.errors import ApiError, as_api_error
from gptoss_jax.serving.api.lifecycle import Drain
from gptoss_jax.serving.api.refusals import error_response, is_anthropic

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_SAFE = ("GET", "HEAD", "OPTIONS")

EXPOSED_HEADERS = (
    "x-request-id",
    "retry-after",
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens", "concurrent-requests")
    ),
)
"""Response headers that pages of an allowed origin can read."""


def state_of(scope: Scope) -> dict[str, Any]:
    """The values under `request.state`."""
    return scope.setdefault("state", {})


def is_health(scope: Scope) -> bool:
    """Whether a request asks for the server's health, which is always answered."""
    return scope["path"] == "/health" or scope["path"].startswith("/health/")


def starts_work(scope: Scope) -> bool:
    """Whether a request asks for new work; one that cancels work does not."""
    return scope["type"] == "http" and scope["method"] == "POST" and not scope["path"].endswith("/cancel")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with an error."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.message})
    else:
        await error_response(error, scope)(scope, receive, send)


class RequestIds:
    """Gives each request an id, `request.state.request_id`, and answers with it in `x-request-id`, and in
    `request-id` for Anthropic's clients.

    The id is that of the request's own `x-request-id` if it has a printable one. It serves to find a request in logs;
    the ids of responses and other objects are the server's. `answered` is called with the status of each response.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[int], None] = lambda status: None) -> None:
        self._app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        state_of(scope)["request_id"] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(message["status"])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                if is_anthropic(scope["path"]):
                    headers["request-id"] = name
            await send(message)

        await self._app(scope, receive, named)


class Hosts:
    """Refuses requests for other hosts than those allowed, and requests that pages of other sites make.

    A server on the loopback interface is reachable by every page in a browser on that host: by DNS rebinding, which
    the Host header shows, and by requests that need no permission, which Sec-Fetch-Site shows. `hosts` are the allowed
    names, None allows all; `origins` may make requests from their pages.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str] = ()) -> None:
        self._app, self._origins = app, frozenset(origins)
        self._hosts = None if hosts is None else frozenset(map(str.lower, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] == "lifespan" or is_health(scope):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._allows(headers.get("host", "")):
            message = "the Host header names none of the server's hosts; allow others with --allowed-host"
            return await refuse(ApiError(403, message, code="host_not_allowed"), scope, receive, send)
        if scope.get("method") not in _SAFE and self._is_foreign(headers):
            message = "pages of other sites may not use the server; allow their origins with --allowed-origins"
            return await refuse(ApiError(403, message, code="origin_not_allowed"), scope, receive, send)
        await self._app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        if self._hosts is None:
            return True
        name = _host_name(host)
        return name in self._hosts or (LOCALHOST in self._hosts and is_loopback(name))

    def _is_foreign(self, headers: Headers) -> bool:
        if headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
            return False
        return not ({"*", headers.get("origin", "")} & self._origins)


LOCALHOST = "localhost"
"""As an allowed host it stands for all addresses of the loopback interface."""


def allowed_hosts(bound: str | None, more: Sequence[str] = ()) -> list[str] | None:
    """The hosts that requests to a server may name, which listens on the address `bound`; None for all.

    On the loopback interface these are its names, and `more`. Elsewhere they are only restricted if `more` are given.
    """
    if bound is not None and is_loopback(bound):
        return [LOCALHOST, *more]
    return list(more) or None


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is of the loopback interface."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == LOCALHOST


def _host_name(host: str) -> str:
    """A Host header without its port, in lower case."""
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


class Origins(CORSMiddleware):
    """Lets the pages of some origins use the server; they send keys in headers, never by cookies."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """See CORSMiddleware; a refusal has OpenAI's error shape."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        error = ApiError(400, bytes(response.body).decode(), code="origin_not_allowed")
        return error.response()


class Draining:
    """Refuses new work once the server is being drained, and counts the requests in flight."""

    def __init__(self, app: ASGIApp, drain: Drain, shed: Callable[[str], None] = lambda cause: None) -> None:
        self._app, self._drain, self._shed = app, drain, shed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] != "http" or is_health(scope) or scope["path"] == "/metrics":
            return await self._app(scope, receive, send)
        if starts_work(scope):
            try:
                self._drain.check()
            except OverloadedError as error:
                self._shed("draining")
                refusal = as_api_error(error)
                refusal.headers["connection"] = "close"
                return await refuse(refusal, scope, receive, send)
        with self._drain.working():
            await self._app(scope, receive, send)
