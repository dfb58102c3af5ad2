"""The web application: all routes over one server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gptoss_jax.serving.api.errors import ApiError, as_api_error
from gptoss_jax.serving.api.server import Server

Handler = Callable[[HttpRequest], Awaitable[Response]]


def build_app(server: Server) -> Starlette:
    """The application of a server."""
    from gptoss_jax.serving.api import messages

    app = Starlette(
        routes=[*messages.routes(server)], exception_handlers={HTTPException: _http_error, Exception: _any_error}
    )
    app.state.server = server
    return app


def route(path: str, handler: Handler, *methods: str) -> Route:
    """A route whose handler may raise any error, which becomes a response in OpenAI's shape."""

    async def answer(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except Exception as error:
            return as_api_error(error).response()

    return Route(path, answer, methods=list(methods))


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()


async def _any_error(http: HttpRequest, error: Exception) -> Response:
    return as_api_error(error).response()


Routes = Sequence[BaseRoute]
