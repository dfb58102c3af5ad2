"""Routes whose errors become responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from gptoss_jax.serving.api.errors import as_api_error

Handler = Callable[[HttpRequest], Awaitable[Response]]


def route(path: str, handler: Handler, *methods: str) -> Route:
    """A route whose handler may raise any error, which becomes a response in OpenAI's shape."""

    async def answer(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except Exception as error:
            return as_api_error(error).response()

    return Route(path, answer, methods=list(methods))
