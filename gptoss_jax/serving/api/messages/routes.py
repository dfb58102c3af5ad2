"""The routes of the Messages API."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute

from gptoss_jax.serving.api import app, sse
from gptoss_jax.serving.api.body import read_json
from gptoss_jax.serving.api.disconnect import while_connected
from gptoss_jax.serving.api.encoding import JsonResponse, encode
from gptoss_jax.serving.api.messages.errors import error_body, error_response
from gptoss_jax.serving.api.messages.events import Event, Message
from gptoss_jax.serving.api.messages.request import Create, Job, Prompt, prepare
from gptoss_jax.serving.api.server import Server

PING = sse.event(b'{"type":"ping"}', "ping")


def routes(server: Server) -> list[BaseRoute]:
    """The routes over a server."""

    async def create(http: HttpRequest, request_id: str) -> Response:
        asked = await read_json(http, Create)
        job = await asyncio.to_thread(prepare, server, asked)
        headers = {"request-id": request_id}
        if asked.stream:
            return await while_connected(http.receive, sse.stream(_stream(server, job, request_id), headers, PING))
        return JsonResponse(await while_connected(http.receive, _message(server, job)), headers=headers)

    async def count(http: HttpRequest, request_id: str) -> Response:
        job = await asyncio.to_thread(prepare, server, await read_json(http, Prompt))
        return JsonResponse(
            {"input_tokens": len(job.request.prompt_token_ids)}, headers={"request-id": request_id}
        )

    return [
        app.route("/v1/messages", _answered(create), "POST"),
        app.route("/v1/messages/count_tokens", _answered(count), "POST"),
    ]


def _answered(handler: Callable[[HttpRequest, str], Awaitable[Response]]) -> app.Handler:
    """A handler whose errors become responses in Anthropic's shape."""

    async def answer(http: HttpRequest) -> Response:
        request_id = f"req_{uuid.uuid4().hex[:24]}"
        try:
            return await handler(http, request_id)
        except Exception as error:
            return error_response(error, request_id)

    return answer


async def _message(server: Server, job: Job) -> Event:
    """The message at once."""
    events, message = job.events(), Message()
    with job.named():
        async with contextlib.aclosing(await server.start(job.request)) as updates:
            async for update in updates:
                message.add(events.of(update))
    return message.content


async def _stream(server: Server, job: Job, request_id: str) -> AsyncGenerator[bytes]:
    """No bytes once the request is submitted, then the events; an error is an event then."""
    events, submitted = job.events(), False
    try:
        with job.named():
            async with contextlib.aclosing(await server.start(job.request)) as updates:
                submitted = True
                yield b""
                async for update in updates:
                    if data := _encoded(events.of(update)):
                        yield data
    except Exception as error:
        if not submitted:
            raise
        yield sse.event(encode(error_body(error, request_id)), "error")


def _encoded(events: Iterable[Event]) -> bytes:
    return b"".join(sse.event(encode(event), event["type"]) for event in events)
