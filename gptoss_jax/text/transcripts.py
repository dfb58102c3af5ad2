"""Converts generated tokens to text incrementally: whole characters, and stop strings across token boundaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from gptoss_jax.text.harmony import (
    SEPARATOR,
    Delta,
    Event,
    Kind,
    MessageStart,
    ParsedMessage,
    StreamParser,
    join_texts,
    meaning,
    to_openai,
)
from gptoss_jax.text.harmony.header import Header
from gptoss_jax.text.tokenizer import StreamDecoder, Tokenizer


class StopMatcher:
    """Passes text through until a stop string occurs; withholds text that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        self.looking = True

    def push(self, text: str) -> str:
        """Consumes text and returns the part that no stop string can begin in.

        The first match sets `stopped`; the stop string and the text after it are dropped. While `looking` is False,
        text is returned unchanged.
        """
        if self.stopped or not self._stop or not self.looking:
            return "" if self.stopped else text
        self._held += text
        found = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            out, self._held = self._held[:found], ""
            return out
        keep = max(_overlap(self._held, s) for s in self._stop)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """The withheld text, at the end of the input."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


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
    malformed: Sequence[str] = ()

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._special = set(tokenizer.special_tokens.values()) if tokenizer else set()
        self._matcher = StopMatcher(stop)
        self._text: list[str] = []

    def push(self, token: int, may_stop: bool = True) -> list[TextDelta]:
        """The text that a token adds; stop strings are matched only if `may_stop`."""
        self._matcher.looking = may_stop
        if self._decoder is None or token in self._special:
            return []
        return self._add(self._matcher.push(self._decoder.push(token)))

    def finish(self) -> list[TextDelta]:
        """The withheld text, at the end of the completion."""
        rest = self._matcher.push(self._decoder.finish()) if self._decoder else ""
        return self._add(rest + self._matcher.finish())

    def _add(self, text: str) -> list[TextDelta]:
        self._text.append(text)
        return [TextDelta(text)] if text else []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._matcher.stopped

    @property
    def text(self) -> str | None:
        """All text so far; None without a tokenizer."""
        return None if self._decoder is None else "".join(self._text)


_FIELDS: dict[Kind, str] = {"answer": "content", "preamble": "content", "reasoning": "thinking"}


class ChatTranscript:
    """A completion in the harmony format.

    Its text is that of its answers, or of its preambles if it has neither answers nor calls. Stop strings are matched
    in each answer. `tools` holds the names of the available tools (`harmony.tool_names`), or None if not known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], tools: Collection[str] | None = None) -> None:
        self._parser = StreamParser(tokenizer, tools=tools)
        self._matcher = StopMatcher(stop)
        self._tools = tools
        self._messages: list[tuple[Kind, list[str]]] = []

    def push(self, token: int, may_stop: bool = True) -> list[TextDelta]:
        """The text that a token adds; stop strings are matched only if `may_stop`."""
        self._matcher.looking = may_stop
        return self._apply(self._parser.push(token))

    def finish(self) -> list[TextDelta]:
        """The withheld text, at the end of the completion."""
        return self._apply(self._parser.finish())

    def _apply(self, events: Sequence[Event]) -> list[TextDelta]:
        deltas = []
        for event in events:
            if isinstance(event, MessageStart):
                self._messages.append((meaning(event.header, self._tools).kind, []))
            elif isinstance(event, Delta):
                is_answer = self._messages[-1][0] == "answer"
                text = self._matcher.push(event.text) if is_answer else event.text
                deltas += self._add(text, event.header)
            else:
                # Withheld text belongs to the message that ends.
                deltas += self._add(self._matcher.finish(), event.message)
                kind = meaning(event.message, self._tools).kind
                self._messages[-1] = kind, self._messages[-1][1]
        return deltas

    def _add(self, text: str, source: Header | ParsedMessage) -> list[TextDelta]:
        if not text:
            return []
        kind, texts = self._messages[-1]
        before = "" if texts or not self._has_earlier(kind) else SEPARATOR
        texts.append(text)
        return [TextDelta(before + text, source.channel, source.recipient, kind)]

    def _has_earlier(self, kind: Kind) -> bool:
        """Whether an earlier message has text for the same field as one of this kind."""
        same = _FIELDS.get(kind)
        return same is not None and any(
            texts and _FIELDS.get(earlier) == same for earlier, texts in self._messages[:-1]
        )

    def _joined(self, *kinds: Kind) -> str:
        return join_texts("".join(texts) for kind, texts in self._messages if kind in kinds)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._matcher.stopped

    @property
    def text(self) -> str:
        """The text of the answers so far."""
        calls = any(kind == "call" for kind, _ in self._messages)
        return self._joined("answer") or ("" if calls else self._joined("preamble"))

    @property
    def message(self) -> dict[str, Any]:
        """The completion as an OpenAI-style assistant message."""
        message = to_openai(self._parser.result.messages, tools=self._tools)
        if self.stopped:
            message["content"] = self._joined("answer", "preamble")
        return message

    @property
    def malformed(self) -> Sequence[str]:
        """Violations of the harmony format, one line each."""
        return self._parser.result.malformed
