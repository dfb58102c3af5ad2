"""The events of a streamed response, in their wire format."""

from __future__ import annotations

from typing import Any

from gptoss_jax.serving.api import sse
from gptoss_jax.serving.api.encoding import encode


class Events:
    """Numbers events, and keeps them until they are sent. They are encoded at once, as their items change later."""

    def __init__(self) -> None:
        self._number, self._unsent = 0, bytearray()

    def add(self, kind: str, **fields: Any) -> None:
        """Add an event."""
        data = encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        self._unsent += sse.event(data, kind)

    def take(self) -> bytes:
        """The events that were added since the last call."""
        taken = bytes(self._unsent)
        self._unsent.clear()
        return taken


class NoEvents(Events):
    """For a response that is not streamed."""

    def add(self, kind: str, **fields: Any) -> None:
        """Ignore the event."""
