"""The states of a server: starting, ready, draining while what is running finishes, and failed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Literal

from gptoss_jax.errors import OverloadedError
from gptoss_jax.serving.owner import EngineOwner

Status = Literal["starting", "ready", "draining", "failed"]


class Health:
    """Whether the engine is ready, or why it has ended."""

    def __init__(self) -> None:
        self.ready = False
        self.failure: str | None = None

    async def follow(self, owner: EngineOwner) -> None:
        """Note the end of the engine, which it waits for."""
        self.failure = str(await owner.ended())

    def status(self, draining: bool) -> Status:
        """The state of a server with this engine."""
        if self.failure is not None:
            return "failed"
        return "draining" if draining else "ready" if self.ready else "starting"


class Drain:
    """Counts the work in flight: HTTP requests, and runs of the engine, which can outlive the HTTP request."""

    def __init__(self) -> None:
        self.begun = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count the block as work in flight."""
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def begin(self) -> None:
        """Refuse new work from now on."""
        self.begun = True

    def check(self) -> None:
        """Raise OverloadedError once it has begun."""
        if self.begun:
            raise OverloadedError("the server is being shut down and takes no requests")

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until no work is in flight; returns whether all has finished within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self.in_flight:
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True
