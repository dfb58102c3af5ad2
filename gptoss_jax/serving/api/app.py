"""The web application: all routes over one server."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute

from gptoss_jax.serving.api.errors import ApiError, as_api_error
from gptoss_jax.serving.api.routing import Handler, route
from gptoss_jax.serving.api.server import Server

__all__ = ["Handler", "Routes", "build_app", "route"]


def build_app(server: Server) -> Starlette:
    """The application of a server."""
    # These modules need `route`.
    from gptoss_jax.serving.api import chat, completions

    routes: list[BaseRoute] = [*chat.routes(server), *completions.routes(server)]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _any_error})
    app.state.server = server
    return app


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()


async def _any_error(http: HttpRequest, error: Exception) -> Response:
    return as_api_error(error).response()


Routes = Sequence[BaseRoute]
