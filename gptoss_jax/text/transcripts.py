"""Converts generated tokens to the text, and the message, of a completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gptoss_jax.text.harmony import SEPARATOR, Kind, join_texts, to_openai
from gptoss_jax.text.items import ChatItems, Item, ItemEvent, ItemText, RawItems


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """New text; in a chat with the kind (`harmony.meaning`), channel and recipient of its message.

    The concatenated deltas of answers and preambles equal the "content" of the assistant message, those of reasoning
    its "thinking". A separator between two messages belongs to the second one's delta.
    """

    text: str
    channel: str | None = None
    recipient: str | None = None
    kind: Kind | None = None


class RawTranscript:
    """A completion as plain text."""

    message: dict[str, Any] | None = None

    def __init__(self, turn: RawItems) -> None:
        self._turn = turn

    def deltas(self, events: Sequence[ItemEvent]) -> list[TextDelta]:
        """The text that events of the turn add."""
        return [TextDelta(event.text) for event in events if isinstance(event, ItemText) and event.text]

    @property
    def text(self) -> str | None:
        """All text so far; None without a tokenizer."""
        return "".join(item.text for item in self._turn.items) if self._turn.has_text else None


_FIELDS: dict[Kind, str] = {"answer": "content", "preamble": "content", "reasoning": "thinking"}


class ChatTranscript:
    """A completion in the harmony format, as one message.

    Its text is that of its answers, or of its preambles if it has neither answers nor calls.
    """

    def __init__(self, turn: ChatItems) -> None:
        self._turn = turn
        self._written = set[str]()
        self._item: Item | None = None

    def deltas(self, events: Sequence[ItemEvent]) -> list[TextDelta]:
        """The text that events of the turn add."""
        return [
            TextDelta(
                self._separator(event.item) + event.text,
                event.item.channel,
                event.item.recipient,
                event.item.kind,
            )
            for event in events
            if isinstance(event, ItemText) and event.text
        ]

    def _separator(self, item: Item) -> str:
        """What separates an item's first text from that of an earlier one of the same field."""
        if item is self._item:
            return ""
        self._item = item
        if (own := _FIELDS.get(item.kind)) is None:
            return ""
        follows = own in self._written
        self._written.add(own)
        return SEPARATOR if follows else ""

    def _joined(self, *kinds: Kind) -> str:
        return join_texts(item.text for item in self._turn.items if item.kind in kinds)

    @property
    def text(self) -> str:
        """The text of the answers so far."""
        calls = any(item.kind == "call" for item in self._turn.items)
        return self._joined("answer") or ("" if calls else self._joined("preamble"))

    @property
    def message(self) -> dict[str, Any]:
        """The completion as an OpenAI-style assistant message."""
        message = to_openai(self._turn.parser.result.messages, tools=self._turn.tools)
        if self._turn.stopped:
            message["content"] = self._joined("answer", "preamble")
        return message
