"""Converts generated tokens to the text, and the message, of a completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from gptoss_jax.text.harmony import SEPARATOR, Kind, join_texts, to_openai
from gptoss_jax.text.items import ChatItems, Item, ItemEvent, ItemText, RawItems
from gptoss_jax.text.tokenizer import Tokenizer


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
    """A completion as plain text, without special tokens."""

    message: dict[str, Any] | None = None

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._has_text = tokenizer is not None
        self.turn = RawItems(tokenizer, stop)

    def push(self, tokens: Sequence[int], may_stop: bool = True) -> list[TextDelta]:
        """The text that further tokens add; stop strings are matched only if `may_stop`."""
        return _deltas(self.turn.push(tokens, (), may_stop))

    def finish(self) -> list[TextDelta]:
        """The withheld text, at the end of the completion."""
        return _deltas(self.turn.finish())

    @property
    def text(self) -> str | None:
        """All text so far; None without a tokenizer."""
        return "".join(item.text for item in self.turn.items) if self._has_text else None


def _deltas(events: Sequence[ItemEvent]) -> list[TextDelta]:
    return [TextDelta(event.text) for event in events if isinstance(event, ItemText)]


_FIELDS: dict[Kind, str] = {"answer": "content", "preamble": "content", "reasoning": "thinking"}


class ChatTranscript:
    """A completion in the harmony format.

    Its text is that of its answers, or of its preambles if it has neither answers nor calls. Stop strings are matched
    in each answer. `tools` holds the names of the available tools (`harmony.tool_names`), or None if not known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], tools: Collection[str] | None = None) -> None:
        self.turn = ChatItems(tokenizer, stop, tools)
        self._tools = tools
        self._written = set[str]()
        self._item: Item | None = None

    def push(self, tokens: Sequence[int], may_stop: bool = True) -> list[TextDelta]:
        """The text that further tokens add; stop strings are matched only if `may_stop`."""
        return self._apply(self.turn.push(tokens, (), may_stop))

    def finish(self) -> list[TextDelta]:
        """The withheld text, at the end of the completion."""
        return self._apply(self.turn.finish())

    def _apply(self, events: Sequence[ItemEvent]) -> list[TextDelta]:
        deltas = []
        for event in events:
            if isinstance(event, ItemText) and event.text:
                item = event.item
                deltas.append(
                    TextDelta(self._separator(item) + event.text, item.channel, item.recipient, item.kind)
                )
        return deltas

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
        return join_texts(item.text for item in self.turn.items if item.kind in kinds)

    @property
    def text(self) -> str:
        """The text of the answers so far."""
        calls = any(item.kind == "call" for item in self.turn.items)
        return self._joined("answer") or ("" if calls else self._joined("preamble"))

    @property
    def message(self) -> dict[str, Any]:
        """The completion as an OpenAI-style assistant message."""
        message = to_openai(self.turn.parser.result.messages, tools=self._tools)
        if self.turn.stopped:
            message["content"] = self._joined("answer", "preamble")
        return message
