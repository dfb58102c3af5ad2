"""From tokens to text as they come: whole characters, and stop strings wherever tokens cut them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gptoss_jax.text.harmony import Delta, Event, StreamParser, to_openai
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
    """New text; in a chat, of the message with this channel and recipient."""

    text: str
    channel: str | None = None
    recipient: str | None = None


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


class ChatTranscript:
    """A completion in harmony: its text is that of the final channel, and stop strings are looked for there."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._parser = StreamParser(tokenizer)
        self._matcher = StopMatcher(stop)
        self._final: list[str] = []

    def push(self, token: int, may_stop: bool = True) -> list[TextDelta]:
        """What a token adds; stop strings are looked for in it if it `may_stop`."""
        self._matcher.looking = may_stop
        return self._take(self._parser.push(token))

    def finish(self) -> list[TextDelta]:
        """What was held back, when no more tokens come."""
        deltas = self._take(self._parser.finish())
        rest = self._matcher.finish()
        self._final.append(rest)
        return [*deltas, TextDelta(rest, "final")] if rest else deltas

    def _take(self, events: Sequence[Event]) -> list[TextDelta]:
        deltas = []
        for event in events:
            if not isinstance(event, Delta):
                continue
            text, header = event.text, event.header
            if header.channel == "final":
                text = self._matcher.push(text)
                self._final.append(text)
            if text:
                deltas.append(TextDelta(text, header.channel, header.recipient))
        return deltas

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._matcher.stopped

    @property
    def text(self) -> str:
        """The text of the final channel so far."""
        return "".join(self._final)

    @property
    def message(self) -> dict[str, Any]:
        """The completion as an OpenAI-style assistant message."""
        message = to_openai(self._parser.result.messages)
        if self.stopped:
            message["content"] = self.text
        return message

    @property
    def malformed(self) -> Sequence[str]:
        """What was wrong with the completion's form."""
        return self._parser.result.malformed
