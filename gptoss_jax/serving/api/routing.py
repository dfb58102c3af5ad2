"""Routes whose errors become responses, and those of APIs that generate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from gptoss_jax.serving.api import sse
from gptoss_jax.serving.api.body import read_body
from gptoss_jax.serving.api.disconnect import while_connected
from gptoss_jax.serving.api.encoding import JsonResponse
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


class Generation(Protocol):
    """What a request asks an API to generate."""

    @property
    def streams(self) -> bool:
        """Whether the response is a stream of events."""
        ...

    def events(self) -> AsyncGenerator[bytes]:
        """The events of a streamed response; see `sse.stream`."""
        ...

    async def answer(self) -> dict[str, Any]:
        """The response as one object. Raises ApiError."""
        ...


def generation_route(path: str, prepare: Callable[[bytes], Generation]) -> Route:
    """The route of an API that generates; `prepare` reads a request's body, and raises ApiError."""

    async def create(http: HttpRequest) -> Response:
        body = await read_body(http)
        # Long prompts take long to tokenize.
        generation = await asyncio.to_thread(prepare, body)
        if generation.streams:
            return await sse.stream(generation.events())
        return JsonResponse(await while_connected(http.receive, generation.answer()))

    return route(path, create, "POST")
