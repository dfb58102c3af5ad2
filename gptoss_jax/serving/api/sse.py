"""Server-sent events: pings while there is nothing to send, and an end for clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING_SECONDS = 15.0
"""Seconds without an event after which a comment is sent, so that proxies keep the connection."""

SLOW_SECONDS = 30.0
"""Seconds that a client may take to read what was sent before its connection is closed."""

WATCH_SECONDS = 5.0
"""Seconds between two looks at a response."""

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


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
        ping: bytes = PING,
    ) -> None:
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._first, self._ping = events, first, ping
        self._sent_at = time.monotonic()
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, as an ASGI application."""
        async with contextlib.aclosing(self._events):
            sending = asyncio.ensure_future(self._send_all(send))
            others = [asyncio.ensure_future(task) for task in (_disconnected(receive), self._watch(send))]
            try:
                await asyncio.wait((sending, *others), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, *others):
                    task.cancel()
                await asyncio.wait((sending, *others))
        if not sending.cancelled() and (error := sending.exception()):
            raise error

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._first:
            await self._send(send, self._first)
        async for data in self._events:
            await self._send(send, data)
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        self._sending_since = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._sending_since, self._sent_at = None, time.monotonic()

    async def _watch(self, send: Send) -> None:
        """Send pings; returns once the client has not read for too long."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            if self._sending_since is not None:
                if now - self._sending_since > SLOW_SECONDS:
                    return
            elif now - self._sent_at > PING_SECONDS:
                await self._send(send, self._ping)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def stream(
    events: AsyncGenerator[bytes], headers: Mapping[str, str] | None = None, ping: bytes = PING
) -> EventStream:
    """A response that streams the events of a generator, whose first are there already, or b"" if it only has begun.

    Raises what the generator raises before, so that a request that is refused has an error's status.
    """
    return EventStream(events, headers, await anext(events), ping)
