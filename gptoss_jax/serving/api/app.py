"""The web application: all routes over one server."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptoss_jax.serving.api import chat, completions, health, models
from gptoss_jax.serving.api.errors import ApiError, as_api_error
from gptoss_jax.serving.api.server import Server


def build_app(server: Server) -> Starlette:
    """The application of a server."""
    routes = [route for api in (chat, completions, health, models) for route in api.routes(server)]
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _http_error, Exception: _any_error},
        lifespan=server.lifespan,
    )
    app.state.server = server
    return app


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()


async def _any_error(http: HttpRequest, error: Exception) -> Response:
    return as_api_error(error).response()
