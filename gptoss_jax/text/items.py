"""The items of an assistant's turn, as they are generated: reasoning, messages to the user, and tool calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from gptoss_jax.text.harmony import Delta, Event, Kind, MessageEnd, MessageStart, StreamParser, meaning
from gptoss_jax.text.stop import StopMatcher
from gptoss_jax.text.tokenizer import StreamDecoder, Tokenizer
from gptoss_jax.types import TokenLogprobs


@dataclasses.dataclass(frozen=True, slots=True)
class TextToken:
    """A token of an item's text, with its bytes and log-probabilities."""

    token_id: int
    data: bytes
    logprobs: TokenLogprobs


@dataclasses.dataclass(slots=True, eq=False)
class Item:
    """A part of an assistant's turn.

    Args:
      kind: see `harmony.meaning`; the kind "nothing" is never reported.
      tool: the called tool's name, without "functions."; None for other items.
      channel, recipient: as written in the header.
      texts: the text, in the pieces in which it was generated.
      tokens: the tokens of an answer's text, if they have log-probabilities.
      complete: whether the item ended before the tokens did.
      stop_string: the stop string that ended an answer.
    """

    kind: Kind
    tool: str | None = None
    channel: str | None = None
    recipient: str | None = None
    texts: list[str] = dataclasses.field(default_factory=list)
    tokens: list[TextToken] = dataclasses.field(default_factory=list)
    complete: bool = False
    stop_string: str | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)


@dataclasses.dataclass(frozen=True, slots=True)
class ItemStart:
    """A new item; it has no text yet."""

    item: Item


@dataclasses.dataclass(frozen=True, slots=True)
class ItemText:
    """More text of the current item, or more of its tokens, which may come a little after their text."""

    item: Item
    text: str
    tokens: Sequence[TextToken] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ItemEnd:
    """The current item has ended."""

    item: Item


ItemEvent = ItemStart | ItemText | ItemEnd


class RawItems:
    """A completion as plain text, which is a single answer, without special tokens."""

    malformed: Sequence[str] = ()

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._special = set(tokenizer.special_tokens.values()) if tokenizer else set()
        self._answer = _Answer(Item("answer"), StopMatcher(stop))
        self.items: list[Item] = []

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._decoder is not None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._answer.matcher.stopped

    def push(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = (), may_stop: bool = True
    ) -> list[ItemEvent]:
        """The events of further tokens; stop strings are matched only if `may_stop`."""
        events = self._begun()
        if self._decoder is None or self._tokenizer is None:
            return events
        self._answer.matcher.looking = may_stop
        for token, logprob in zip(tokens, logprobs, strict=False):
            if token not in self._special:
                self._answer.note(token, self._tokenizer, logprob)
        text = self._decoder.push([token for token in tokens if token not in self._special])
        return events + self._answer.add(text, settled=not self._decoder.pending)

    def finish(self) -> list[ItemEvent]:
        """The events at the end of the completion."""
        rest = self._decoder.finish() if self._decoder else ""
        events = [*self._begun(), *self._answer.add(rest), *self._answer.end()]
        self._answer.item.complete = True
        return [*events, ItemEnd(self._answer.item)]

    def _begun(self) -> list[ItemEvent]:
        if self.items:
            return []
        self.items.append(self._answer.item)
        return [ItemStart(self._answer.item)]


class ChatItems:
    """The items of a completion in the harmony format.

    Stop strings are matched in each answer. `tools` holds the names of the available tools (`harmony.tool_names`), or
    None if not known. A message that is not the assistant's is no item, unless its end shows that it calls a tool.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), tools: Collection[str] | None = None
    ) -> None:
        self._tokenizer, self.tools = tokenizer, tools
        self.parser = StreamParser(tokenizer, tools=tools, keep_special=False)
        self._special = set(tokenizer.special_tokens.values())
        self._matcher = StopMatcher(stop)
        self._one_by_one = bool(stop)
        self._open: Item | None = None
        self._answer: _Answer | None = None
        self.items: list[Item] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._matcher.stopped

    @property
    def malformed(self) -> Sequence[str]:
        """Violations of the harmony format, one line each."""
        return self.parser.result.malformed

    def push(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = (), may_stop: bool = True
    ) -> list[ItemEvent]:
        """The events of further tokens; stop strings are matched only if `may_stop`."""
        self._matcher.looking = may_stop
        if not logprobs and not self._one_by_one:
            return self._apply(self.parser.push_all(tokens))
        events: list[ItemEvent] = []
        for i, token in enumerate(tokens):
            if self.stopped:
                break
            if logprobs and self._answer and token not in self._special:
                self._answer.note(token, self._tokenizer, logprobs[i])
            events += self._apply(self.parser.push(token))
        return events

    def finish(self) -> list[ItemEvent]:
        """The events at the end of the completion."""
        return self._apply(self.parser.finish())

    def _apply(self, parsed: Sequence[Event]) -> list[ItemEvent]:
        events: list[ItemEvent] = []
        for event in parsed:
            if isinstance(event, MessageStart):
                events += self._start(event)
            elif isinstance(event, Delta):
                events += self._text(event.text)
            else:
                events += self._end(event)
        return events

    def _start(self, event: MessageStart) -> list[ItemEvent]:
        meant = meaning(event.header, self.tools)
        self._open = Item(meant.kind, meant.tool, event.header.channel, event.header.recipient)
        self._answer = _Answer(self._open, self._matcher) if meant.kind == "answer" else None
        if meant.kind == "nothing":
            return []
        self.items.append(self._open)
        return [ItemStart(self._open)]

    def _text(self, text: str) -> list[ItemEvent]:
        assert self._open is not None
        if self._answer:
            return self._answer.add(text, settled=not self.parser.pending)
        self._open.texts.append(text)
        return [] if self._open.kind == "nothing" else [ItemText(self._open, text)]

    def _end(self, event: MessageEnd) -> list[ItemEvent]:
        item, answer = self._open, self._answer
        assert item is not None
        self._open = self._answer = None
        item.complete = event.message.stop is not None or self.stopped
        if item.kind == "nothing":
            meant = meaning(event.message, self.tools)
            if meant.kind == "nothing":
                return []
            item.kind, item.tool = meant.kind, meant.tool
            self.items.append(item)
            return [ItemStart(item), *([ItemText(item, item.text)] if item.texts else []), ItemEnd(item)]
        return [*(answer.end() if answer else []), ItemEnd(item)]


class _Answer:
    """The text of an answer while it is generated: part of it is withheld while it may begin a stop string."""

    def __init__(self, item: Item, matcher: StopMatcher) -> None:
        self.item, self.matcher = item, matcher
        self._noted: list[tuple[int, TextToken]] = []
        self._noted_bytes = self._sent_bytes = 0

    def note(self, token: int, tokenizer: Tokenizer, logprobs: TokenLogprobs) -> None:
        """Keep a token of the text, which is reported with the text or after it."""
        data = tokenizer.decode_bytes((token,))
        self._noted.append((self._noted_bytes, TextToken(token, data, logprobs)))
        self._noted_bytes += len(data)

    def add(self, text: str, settled: bool = True) -> list[ItemEvent]:
        """The events of more text; `settled` if it ends with a whole character."""
        return self._report(self.matcher.push(text) if text else "", settled and not self.matcher.withholds)

    def end(self) -> list[ItemEvent]:
        """The events of what is withheld, at the end of the answer."""
        return self._report(self.matcher.finish(), True)

    def _report(self, text: str, settled: bool) -> list[ItemEvent]:
        self.item.stop_string = self.matcher.matched
        tokens: list[TextToken] = []
        if self._noted:
            self._sent_bytes += len(text.encode())
            if self.matcher.stopped:
                tokens = [token for start, token in self._noted if start < self._sent_bytes]
            elif settled:
                tokens = [token for _, token in self._noted]
            if self.matcher.stopped or settled:
                self._noted.clear()
                self._sent_bytes = self._noted_bytes
        if not text and not tokens:
            return []
        if text:
            self.item.texts.append(text)
        self.item.tokens += tokens
        return [ItemText(self.item, text, tokens)]
