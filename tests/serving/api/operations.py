"""An application with a streaming route of its own over a scripted engine, and a real HTTP server for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptoss_jax.serving.api import sse
from gptoss_jax.serving.api.app import Access, build_app
from gptoss_jax.serving.api.body import read_json
from gptoss_jax.serving.api.encoding import JsonResponse
from gptoss_jax.serving.api.protocol import HttpLimits, server_config
from gptoss_jax.serving.api.routing import route
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.generated import Request
from gptoss_jax.types import SamplingParams

GENERATE = "/v1/test/generate"


def app_of(server: Server, access: Access | None = None) -> Starlette:
    """The server's application, with POST /v1/test/generate {prompt, params, stream} in addition."""

    def events(request: Request) -> AsyncGenerator[bytes]:
        async def all_events() -> AsyncGenerator[bytes]:
            async with contextlib.aclosing(server.run(request)) as updates:
                async for update in updates:
                    yield sse.event(str(update.usage.completion_tokens).encode())
            yield sse.DONE

        return all_events()

    async def generate(http: HttpRequest) -> Response:
        fields = await read_json(http, dict)
        params = SamplingParams(**fields.get("params", {}))
        request = server.prompts.chat_request("r", [{"role": "user", "content": fields["prompt"]}], params)
        stream = events(request)
        if fields.get("stream"):
            return sse.EventStream(stream)
        async with contextlib.aclosing(stream):
            count = len([event async for event in stream])
        return JsonResponse({"events": count, "key": getattr(http.state, "key_name", None)})

    app = build_app(server, access)
    app.router.routes.append(route(GENERATE, generate, "POST"))
    return app


@contextlib.contextmanager
def running(app: Starlette, limits: HttpLimits | None = None, **options: Any) -> Iterator[int]:
    """Runs an application as the server does, on a free port, in a thread; the port."""
    http = uvicorn.Server(server_config(app, port=0, limits=limits, graceful_seconds=2, **options))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        assert thread.is_alive(), "the server did not start"
        threading.Event().wait(0.01)
    try:
        yield http.servers[0].sockets[0].getsockname()[1]
    finally:
        http.should_exit = True
        thread.join(10)
    assert not thread.is_alive()
