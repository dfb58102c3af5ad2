"""From tokens to text as they come: whole characters, and stop strings wherever tokens cut them."""

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
    """Passes text on until one of some strings appears; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        self.looking = True

    def push(self, text: str) -> str:
        """More text in, what is certain out; sets `stopped` at the first match, whose text is left out.

        Text that comes while `looking` is False is passed on as it is.
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
        """What is still held back, when no more text comes."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """New text; in a chat, of a message of this kind (`harmony.meaning`), channel and recipient.

    The deltas of answers and preambles together make the message's content, those of reasoning its thinking: text
    between two messages is the second one's.
    """

    text: str
    channel: str | None = None
    recipient: str | None = None
    kind: Kind | None = None


class RawTranscript:
    """A completion as plain text, special tokens left out."""

    message: dict[str, Any] | None = None
    malformed: Sequence[str] = ()

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._special = set(tokenizer.special_tokens.values()) if tokenizer else set()
        self._matcher = StopMatcher(stop)
        self._text: list[str] = []

    def push(self, token: int, may_stop: bool = True) -> list[TextDelta]:
        """What a token adds; stop strings are looked for in it if it `may_stop`."""
        self._matcher.looking = may_stop
        if self._decoder is None or token in self._special:
            return []
        return self._add(self._matcher.push(self._decoder.push(token)))

    def finish(self) -> list[TextDelta]:
        """What was held back, when no more tokens come."""
        rest = self._matcher.push(self._decoder.finish()) if self._decoder else ""
        return self._add(rest + self._matcher.finish())

    def _add(self, text: str) -> list[TextDelta]:
        self._text.append(text)
        return [TextDelta(text)] if text else []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._matcher.stopped

    @property
    def text(self) -> str | None:
        """All text so far; None without a tokenizer."""
        return None if self._decoder is None else "".join(self._text)


_FIELDS: dict[Kind, str] = {"answer": "content", "preamble": "content", "reasoning": "thinking"}


class ChatTranscript:
    """A completion in harmony. Its text is that of its answers, or of its preambles where it neither answers nor calls.

    Stop strings are looked for in each answer. `tools` are the names of the tools that there are
    (`harmony.tool_names`), where they are known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], tools: Collection[str] | None = None) -> None:
        self._parser = StreamParser(tokenizer, tools=tools)
        self._matcher = StopMatcher(stop)
        self._tools = tools
        self._messages: list[tuple[Kind, list[str]]] = []

    def push(self, token: int, may_stop: bool = True) -> list[TextDelta]:
        """What a token adds; stop strings are looked for in it if it `may_stop`."""
        self._matcher.looking = may_stop
        return self._take(self._parser.push(token))

    def finish(self) -> list[TextDelta]:
        """What was held back, when no more tokens come."""
        return self._take(self._parser.finish())

    def _take(self, events: Sequence[Event]) -> list[TextDelta]:
        deltas = []
        for event in events:
            if isinstance(event, MessageStart):
                self._messages.append((meaning(event.header, self._tools).kind, []))
            elif isinstance(event, Delta):
                is_answer = self._messages[-1][0] == "answer"
                text = self._matcher.push(event.text) if is_answer else event.text
                deltas += self._add(text, event.header)
            else:
                # What was held back goes out with its own message.
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
        """Whether a stop string has appeared."""
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
        """What was wrong with the completion's form."""
        return self._parser.result.malformed
