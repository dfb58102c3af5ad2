"""What clients of an engine's owner need, in asyncio: one interface for an owner in this process or in another."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.errors import EngineError
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.worker import Inbox, Worker


class EventStream(Protocol):
    """The events of one request."""

    async def events(self) -> list[TokenEvent]:
        """All events that have not been read, once there are any; the last one of a completion finishes it."""
        ...

    def abort(self, index: int | None = None) -> None:
        """Drop the request, or one of its completions."""
        ...


class EngineOwner(Protocol):
    """Runs requests on an engine."""

    async def submit(self, request: Request) -> EventStream:
        """Queue a request. Raises UsageError for one that can never run, EngineError if no requests are taken."""
        ...

    async def load(self) -> Load:
        """The engine's load and counters. Raises EngineError once the engine has ended."""
        ...

    async def ended(self) -> EngineError:
        """Returns the reason once the engine has ended."""
        ...


class LocalOwner:
    """An owner in a thread of this process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def submit(self, request: Request) -> EventStream:
        """See EngineOwner."""
        await asyncio.to_thread(self._worker.check, request.prompt_token_ids, request.params, request.scope)
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # A loop that has ended has no readers.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ready.set)

        inbox = Inbox(wake)
        name = self._worker.submit(
            request.prompt_token_ids,
            request.params,
            inbox,
            request.scope,
            priority=request.priority,
            timeout=request.timeout,
        )
        return _LocalStream(self._worker, name, inbox, ready)

    async def load(self) -> Load:
        """See EngineOwner."""
        return await asyncio.to_thread(self._worker.load)

    async def ended(self) -> EngineError:
        """See EngineOwner."""
        return await asyncio.to_thread(self._worker.join)


class _LocalStream:
    def __init__(self, worker: Worker, name: str, inbox: Inbox, ready: asyncio.Event) -> None:
        self._worker, self._name, self._inbox, self._ready = worker, name, inbox, ready

    async def events(self) -> list[TokenEvent]:
        while True:
            await self._ready.wait()
            self._ready.clear()
            if events := self._inbox.get(0):
                return events

    def abort(self, index: int | None = None) -> None:
        self._worker.abort(self._name, index)
