"""The web application: all routes over one server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptoss_jax.serving.api import chat, completions, health, models, openapi, responses, tokens
from gptoss_jax.serving.api.errors import ApiError, as_api_error
from gptoss_jax.serving.api.keys import KeyGuard, Keys
from gptoss_jax.serving.api.limits import KeyLimits, RateLimits
from gptoss_jax.serving.api.middleware import Draining, Hosts, Origins, RequestIds
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.generated import Request

BODIES: Mapping[str, type] = {
    "POST /v1/chat/completions": chat.ChatRequest,
    "POST /v1/chat/completions/render": chat.ChatRequest,
    "POST /v1/completions": completions.CompletionRequest,
    "POST /v1/responses": responses.CreateRequest,
    "POST /v1/responses/input_tokens": responses.CreateRequest,
}
"""The types of bodies, by the keys of `openapi.OPERATIONS`."""


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may use a server, and how much.

    Args:
      keys: the accepted keys; None needs none.
      open_paths: paths, besides those of /health, that need no key.
      hosts: the hosts that requests may name; see `middleware.allowed_hosts`.
      origins: the origins whose pages may use the server.
      limits: those of each key.
      max_requests: requests for new work that are answered at once.
      timeout: seconds after which a request fails.
    """

    keys: Keys | None = None
    open_paths: tuple[str, ...] = ()
    hosts: Sequence[str] | None = None
    origins: Sequence[str] = ()
    limits: KeyLimits = dataclasses.field(default_factory=KeyLimits)
    max_requests: int | None = None
    timeout: float | None = None


def build_app(server: Server, access: Access | None = None) -> Starlette:
    """The application of a server."""
    apis = (chat, completions, health, models, responses)
    routes = [route for api in apis for route in api.routes(server)]
    routes += [*tokens.routes(server, _chat_request), *openapi.routes(BODIES)]
    app = Starlette(
        routes=routes,
        middleware=middleware_of(server, access or Access()),
        exception_handlers={HTTPException: _http_error, Exception: _any_error},
        lifespan=server.lifespan,
    )
    app.state.server = server
    return app


def middleware_of(server: Server, access: Access) -> list[Middleware]:
    """The middleware around all routes, from the outermost one."""
    metrics = server.metrics
    found = [Middleware(RequestIds, answered=metrics.responded)]
    if access.origins:
        found.append(Middleware(Origins, origins=access.origins))
    found.append(Middleware(Hosts, hosts=access.hosts, origins=access.origins))
    if access.keys:
        found.append(Middleware(KeyGuard, keys=access.keys, open_paths=access.open_paths))
    found.append(Middleware(Draining, drain=server.draining, shed=metrics.shed))
    found.append(
        Middleware(
            RateLimits,
            limits=access.limits,
            max_requests=access.max_requests,
            timeout=access.timeout,
            shed=metrics.shed,
        )
    )
    return found


def _chat_request(server: Server, body: bytes) -> Request:
    return chat.prepare(server, body).request


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()


async def _any_error(http: HttpRequest, error: Exception) -> Response:
    return as_api_error(error).response()
