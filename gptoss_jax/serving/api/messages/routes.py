"""The routes of the Messages API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute

from gptoss_jax.serving.api import sse
from gptoss_jax.serving.api.body import read_body
from gptoss_jax.serving.api.disconnect import while_connected
from gptoss_jax.serving.api.encoding import JsonResponse, encode
from gptoss_jax.serving.api.messages.events import Event, Message
from gptoss_jax.serving.api.messages.request import CountRequest, Job, MessageRequest, prepare
from gptoss_jax.serving.api.refusals import anthropic_error
from gptoss_jax.serving.api.routing import route
from gptoss_jax.serving.api.server import Server

PING = sse.event(b'{"type":"ping"}', "ping")


def routes(server: Server) -> list[BaseRoute]:
    """The routes over a server."""

    async def create(http: HttpRequest) -> Response:
        # Long prompts take long to tokenize.
        job = await asyncio.to_thread(prepare, server, await read_body(http), MessageRequest)
        if job.stream:
            request_id = getattr(http.state, "request_id", None)
            return await sse.stream(_events(server, job, request_id), ping=PING)
        return JsonResponse(await while_connected(http.receive, _message(server, job)))

    async def count(http: HttpRequest) -> Response:
        job = await asyncio.to_thread(prepare, server, await read_body(http), CountRequest)
        return JsonResponse({"input_tokens": len(job.request.prompt_token_ids)})

    return [route("/v1/messages", create, "POST"), route("/v1/messages/count_tokens", count, "POST")]


async def _message(server: Server, job: Job) -> Event:
    """The message at once."""
    events, message = job.events(), Message()
    with job.named():
        async with contextlib.aclosing(await server.start(job.request)) as turn:
            async for update in turn:
                message.add(events.of(update))
    return message.content


async def _events(server: Server, job: Job, request_id: str | None) -> AsyncGenerator[bytes]:
    """The events of the message, after no bytes once the engine has the request; later errors are events."""
    events, begun = job.events(), False
    try:
        with job.named():
            async with contextlib.aclosing(await server.start(job.request)) as turn:
                begun = True
                yield b""
                async for update in turn:
                    if data := _encoded(events.of(update)):
                        yield data
    except Exception as error:
        if not begun:
            raise
        yield sse.event(encode(anthropic_error(error, request_id)), "error")


def _encoded(events: Iterable[Event]) -> bytes:
    return b"".join(sse.event(encode(event), event["type"]) for event in events)
