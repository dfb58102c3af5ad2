"""What the APIs need of the engine's owner, which runs in another process: see `link`."""

from __future__ import annotations

from typing import Protocol

from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.errors import EngineError
from gptoss_jax.serving.generated import Request


class EventStream(Protocol):
    """The events of one request."""

    async def events(self) -> list[TokenEvent]:
        """All events that have not been read, once there are any; the last one of a completion finishes it."""
        ...

    def abort(self, index: int | None = None) -> None:
        """Drop the request, or one of its completions."""
        ...

    def close(self) -> None:
        """Forget the request, which has ended."""
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
