"""Server-sent events: pings while there is nothing to send, and an end for clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptoss_jax.serving.api.disconnect import disconnected

PING_SECONDS = 15.0
"""Seconds without an event after which a comment is sent, so that proxies keep the connection."""

SLOW_SECONDS = 30.0
"""Seconds that a client may take to read what was sent before its connection is closed."""

DONE = b"data: [DONE]\n\n"


def event(data: bytes, name: str | None = None) -> bytes:
    """An event with one line of data."""
    return b"data: " + data + b"\n\n" if name is None else b"event: %b\ndata: %b\n\n" % (name.encode(), data)


class EventStream(Response):
    """A response that streams what a generator yields, each a whole number of events.

    The generator is closed as soon as the client leaves or stops reading; it must turn its own errors into events.
    `first` is what it has yielded already; see `stream`. `ping` is sent while there is nothing else to send.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        headers: Mapping[str, str] | None = None,
        first: bytes = b"",
        ping: bytes = b": ping\n\n",
    ) -> None:
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._first, self._ping = events, first, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, as an ASGI application."""
        async with contextlib.aclosing(self._events):
            sending = asyncio.ensure_future(self._send_all(send))
            leaving = asyncio.ensure_future(disconnected(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, leaving):
                    task.cancel()
                await asyncio.wait((sending, leaving))
        if not sending.cancelled() and (error := sending.exception()):
            raise error

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._first:
            await _in_time(send, self._first)
        following: asyncio.Future[bytes] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait((following,), timeout=PING_SECONDS)
                if not done:
                    await _in_time(send, self._ping)
                    continue
                try:
                    data = following.result()
                except StopAsyncIteration:
                    break
                following = None
                await _in_time(send, data)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if following and not following.done():
                following.cancel()
                await asyncio.wait((following,))


async def stream(
    events: AsyncGenerator[bytes], headers: Mapping[str, str] | None = None, ping: bytes = b": ping\n\n"
) -> EventStream:
    """A response that streams the events of a generator, whose first are there already, or b"" if it only has begun.

    Raises what the generator raises before, so that a request that is refused has an error's status.
    """
    return EventStream(events, headers, await anext(events), ping)


async def _in_time(send: Send, data: bytes) -> None:
    async with asyncio.timeout(SLOW_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": True})
