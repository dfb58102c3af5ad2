"""Routes whose errors become responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from gptoss_jax.serving.api.refusals import error_response

Handler = Callable[[HttpRequest], Awaitable[Response]]


def route(path: str, handler: Handler, *methods: str) -> Route:
    """A route whose handler may raise any error, which becomes a response in the shape of the path's API."""

    async def answer(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except Exception as error:
            return error_response(error, http.scope)

    return Route(path, answer, methods=list(methods))
