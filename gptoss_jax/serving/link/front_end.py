"""The front's end of the link: an EngineOwner whose engine runs in another process."""

from __future__ import annotations

import asyncio
import itertools
import socket
from typing import Any

import msgspec
import numpy as np

from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.errors import EngineError
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.link.messages import (
    HEADER,
    Abort,
    Accepted,
    AskLoad,
    Command,
    Ended,
    Events,
    LoadReply,
    Ready,
    Submit,
    decode_reply,
    encoded,
    error_of,
    unpacked,
)


class FrontEnd:
    """The engine's owner, as the front sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._asks = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[str, _Stream] = {}
        self._end: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        """Resolved once the engine takes requests, and cancelled if it never does."""
        self._receiving = asyncio.ensure_future(self._receive())

    @classmethod
    async def connect(cls, connection: socket.socket) -> FrontEnd:
        """The owner at the other end of a connected stream socket."""
        return cls(*await asyncio.open_unix_connection(sock=connection, limit=2**20))

    async def submit(self, request: Request) -> _Stream:
        """See EngineOwner."""
        ask = next(self._asks)
        prompt = np.asarray(request.prompt_token_ids, np.int32).tobytes()
        answer = self._ask(
            ask, Submit(ask, prompt, request.params, request.scope, request.priority, request.timeout)
        )
        return await answer

    async def load(self) -> Load:
        """See EngineOwner."""
        ask = next(self._asks)
        return await self._ask(ask, AskLoad(ask))

    async def ended(self) -> EngineError:
        """See EngineOwner."""
        return await asyncio.shield(self._end)

    def close(self) -> None:
        """End the connection; the engine's end drops all requests."""
        self._finish(EngineError("the server is being shut down"))

    def _ask(self, ask: int, command: Command) -> asyncio.Future[Any]:
        if self._end.done():
            raise self._end.result()
        future = self._waiting[ask] = asyncio.get_running_loop().create_future()
        self._tell(command)
        return future

    def _tell(self, command: Command) -> None:
        if not self._end.done():
            self._writer.write(encoded(command))

    async def _receive(self) -> None:
        reason = "the engine's process has ended"
        try:
            while not self._end.done():
                size = HEADER.unpack(await self._reader.readexactly(HEADER.size))[0]
                self._take(decode_reply(await self._reader.readexactly(size)))
        except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError):
            pass
        finally:
            self._finish(EngineError(reason))

    def _take(self, reply: Accepted | Events | LoadReply | Ready | Ended) -> None:
        if isinstance(reply, Events):
            for fields in reply.events:
                if (stream := self._streams.get(fields[0])) is not None:
                    stream.put(unpacked(fields))
        elif isinstance(reply, Accepted):
            self._accept(reply)
        elif isinstance(reply, LoadReply):
            future = self._waiting.pop(reply.ask)
            if not future.cancelled():
                future.set_result(reply.load) if reply.error is None else future.set_exception(
                    error_of(reply.error)
                )
        elif isinstance(reply, Ready):
            self.ready.set_result(reply)
        else:
            self._finish(EngineError(reply.reason))

    def _accept(self, reply: Accepted) -> None:
        future = self._waiting.pop(reply.ask)
        if reply.error is not None:
            if not future.cancelled():
                future.set_exception(error_of(reply.error))
        elif future.cancelled():
            self._tell(Abort(reply.name, None))
        else:
            self._streams[reply.name] = stream = _Stream(self, reply.name)
            future.set_result(stream)

    def _finish(self, error: EngineError) -> None:
        """End all that waits for the engine."""
        if self._end.done():
            return
        self._end.set_result(error)
        self.ready.cancel()
        self._writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        for stream in self._streams.values():
            stream.put(TokenEvent(stream.name, 0, -1, finish_reason="error", error=error))

    def drop(self, name: str, index: int | None) -> None:
        """Abort a request, or one of its completions."""
        if index is None:
            self._streams.pop(name, None)
        self._tell(Abort(name, index))

    def forget(self, name: str) -> None:
        """Drop the stream of a request that has finished."""
        self._streams.pop(name, None)


class _Stream:
    """See EventStream."""

    def __init__(self, owner: FrontEnd, name: str) -> None:
        self._owner, self.name = owner, name
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def events(self) -> list[TokenEvent]:
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        events, self._events = self._events, []
        return events

    def abort(self, index: int | None = None) -> None:
        self._owner.drop(self.name, index)

    def close(self) -> None:
        self._owner.forget(self.name)
