"""Parses tokens to messages, one token at a time. It accepts any tokens: format violations are reported, not raised."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from gptoss_jax.text.harmony.header import Header, read_header, shorten
from gptoss_jax.text.harmony.meaning import irregularities, meaning
from gptoss_jax.text.harmony.messages import ParsedCompletion, ParsedMessage, Role
from gptoss_jax.text.tokenizer import Tokenizer

_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_CHANNEL, _CONSTRAIN = "<|channel|>", "<|constrain|>"
_SHOWN = 64  # tokens of a stray run that are kept for error lines
_BACKLOG = 64  # bytes that may be pending behind invalid ones
# Text that begins like an assistant's header and unlike an answer.
_HEADER_BEGUN = re.compile(r"\s*(?:(?:assistant|analysis|commentary|final)\s*)*(?:to=|to?$|$)")


@dataclass(frozen=True)
class MessageStart:
    """A header is complete; content follows."""

    header: Header


@dataclass(frozen=True)
class Delta:
    """More text of the current message."""

    text: str
    header: Header


@dataclass(frozen=True)
class MessageEnd:
    """A message is complete; its text is the concatenation of its deltas."""

    message: ParsedMessage


Event = MessageStart | Delta | MessageEnd


@dataclass
class _Content:
    header: Header
    start: int
    text: list[str] = field(default_factory=list)
    noted: set[str] = field(default_factory=set)


class StreamParser:
    """Parses a completion (or a whole conversation) token by token.

    `role` is the role that the end of the prompt announced; None starts at the first `<|start|>`. Messages and state
    are those of openai-harmony's StreamableParser wherever that does not raise, with two exceptions: a `<|start|>`
    ends the message or header that it occurs in, and a message without `<|message|>` is kept for any role. `strict`
    removes both exceptions. `tools` holds the names of the available tools, or None if they are not known; the report
    of malformed calls depends on them. Special tokens where the format has none are text, as in openai-harmony, unless
    `keep_special` is False, which leaves them out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        role: Role | None = "assistant",
        *,
        strict: bool = False,
        tools: Collection[str] | None = None,
        keep_special: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._tools = tools
        self._strict = strict
        self._start, self._message, self._channel = map(
            tokenizer.encode_special, ("<|start|>", "<|message|>", "<|channel|>")
        )
        self._ends = {tokenizer.encode_special(name): name for name in _ENDS}
        self._special = {token: name for name, token in tokenizer.special_tokens.items()}
        self._in_headers = {self._channel, tokenizer.special_tokens.get(_CONSTRAIN)}
        self._completes = role == "assistant"
        self._default_role: Role = role or "assistant"
        self._next_role = role
        self._header: list[int] | None = None if role is None else []
        self._header_start = 0
        self._content: _Content | None = None
        self._bytes = bytearray()
        self._position = 0
        self._stray: list[int] = []
        self._stray_start: int | None = None
        self._delta: str | None = None
        self.result = ParsedCompletion()

    @property
    def last_delta(self) -> str | None:
        """The text that the last token added, or None if it added none."""
        return self._delta

    @property
    def role(self) -> Role | None:
        """The current message's role, or None if it is not known yet."""
        return self._content.header.role if self._content else self._next_role

    @property
    def channel(self) -> str | None:
        """The channel of the message whose content is being read."""
        return self._content.header.channel if self._content else None

    @property
    def recipient(self) -> str | None:
        """The recipient of the message whose content is being read."""
        return self._content.header.recipient if self._content else None

    @property
    def content_type(self) -> str | None:
        """The content type of the message whose content is being read."""
        return self._content.header.content_type if self._content else None

    def push(self, token: int) -> list[Event]:
        """Consumes the next token and returns the events that it caused."""
        self._delta = None
        events: list[Event] = []
        if self._content is not None:
            self._push_content(self._content, token, events)
        elif self._header is not None:
            self._push_header(self._header, token, events)
        else:
            self._push_between(token, events)
        self._position += 1
        return events

    def push_all(self, tokens: Sequence[int]) -> list[Event]:
        """As `push` for one token after the other, but with a single delta for the text of adjacent tokens."""
        events: list[Event] = []
        at = 0
        while at < len(tokens):
            end = max(at + 1, self._end_of_run(tokens, at) if self._content else 0)
            if not (self._content and self._push_run(self._content, tokens[at:end], events)):
                for token in tokens[at:end]:
                    events += self.push(token)
            at = end
        return events

    def _end_of_run(self, tokens: Sequence[int], at: int) -> int:
        """The index of the first token from `at` that is special or unknown."""
        ordinary = self._tokenizer.ordinary_tokens
        while at < len(tokens) and tokens[at] in ordinary:
            at += 1
        return at

    def _push_run(self, content: _Content, tokens: Sequence[int], events: list[Event]) -> bool:
        """Consumes tokens of the content at once; returns False for others and for invalid UTF-8."""
        if len(tokens) == 1:
            return False
        data = bytes(self._bytes) + self._tokenizer.decode_bytes(tokens)
        try:
            text, rest = data.decode(), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return False
            text, rest = data[: error.start].decode(), data[error.start :]
        self._bytes[:] = rest
        self._position += len(tokens)
        self._delta = text or None
        if text:
            content.text.append(text)
            events.append(Delta(text, content.header))
        return True

    @property
    def pending(self) -> bool:
        """Whether the last character of the content is incomplete."""
        return bool(self._bytes)

    def finish(self) -> list[Event]:
        """Ends the token stream, and returns the events for the rest of the current message."""
        self._delta = None
        events: list[Event] = []
        if self._content is not None:
            self._end_content(self._content, None, self._position, events)
        elif self._header is not None and self._strict and (self._ends.keys() & set(self._header)):
            events += self._read_again(self._header)
        elif self._header is not None:
            self._end_header(self._header, None, self._position, events)
        self._close_stray(self._position)
        return events

    def _read_again(self, header: list[int]) -> list[Event]:
        """Parses an unterminated header again without `strict`, which finds the messages in it."""
        self._strict = False
        self._position -= len(header)
        self._header = []
        events = [event for token in header for event in self.push(token)]
        return events + self.finish()

    def _note(self, problem: str) -> None:
        self.result.malformed.append(problem)

    def _push_between(self, token: int, events: list[Event]) -> None:
        if token == self._start:
            self._open_header(self._position, None, [])
        elif not self._strict and token in (self._channel, self._message):
            self._note(f"token {self._position}: a message without <|start|>")
            self._open_header(self._position, self._default_role, [token] if token == self._channel else [])
            if token == self._message:
                self._begin_content([], events)
        else:
            if self._stray_start is None:
                self._stray_start = self._position
            if len(self._stray) < _SHOWN:
                self._stray.append(token)

    def _open_header(self, position: int, role: Role | None, tokens: list[int]) -> None:
        self._close_stray(position)
        self._header, self._header_start, self._next_role = tokens, position, role

    def _close_stray(self, end: int) -> None:
        if self._stray_start is not None:
            self.result.stray.append((self._stray_start, end))
            text = shorten(self._tokenizer.decode(self._stray))
            self._note(f"tokens {self._stray_start} to {end - 1} outside of any message: {text}")
        self._stray_start, self._stray = None, []

    def _push_header(self, header: list[int], token: int, events: list[Event]) -> None:
        if token == self._message:
            self._begin_content(header, events)
        elif token in self._ends and not self._strict:
            self._end_header(header, self._ends[token], self._position + 1, events)
        elif token == self._start and not self._strict:
            if header or self._header_start < self._position:
                self._end_header(header, None, self._position, events)
            self._open_header(self._position, None, [])
        elif self._keep_special or token not in self._special or token in self._in_headers:
            header.append(token)
        else:
            problem = f"header: unexpected {self._special[token]}"
            if not self.result.malformed or not self.result.malformed[-1].endswith(problem):
                self._note(f"token {self._position}: {problem}")

    def _read_header(self, header: list[int], fields: bool) -> Header:
        data = self._tokenizer.decode_bytes(header)
        text = data.decode("utf-8", "replace")
        read = read_header(text, self._next_role, fields=fields)
        for problem in read.malformed or irregularities(read):
            self._note(f"token {self._header_start}: {problem}")
        if text.encode() != data or not all(token in self._tokenizer for token in header):
            self._note(f"token {self._header_start}: header: not valid UTF-8")
        return read

    def _begin_content(self, header: list[int], events: list[Event]) -> None:
        read = self._read_header(header, fields=True)
        self._header, self._next_role = None, None
        self._content = _Content(read, self._header_start)
        events.append(MessageStart(read))

    def _end_header(self, header: list[int], stop: str | None, end: int, events: list[Event]) -> None:
        """Ends a header that lacks `<|message|>`: its words are content, unless the header itself was truncated."""
        start, role = self._header_start, self._next_role
        cut_short = stop is None and (role is None or self._channel in header or self._begins_header(header))
        read = None if cut_short or not header else self._read_header(header, fields=False)
        self._header, self._next_role = None, None
        if read is None:
            text = shorten(self._tokenizer.decode(header[:_SHOWN]))
            self._note(f"token {start}: a header without <|message|>: {text}")
            if end > start:
                self.result.stray.append((start, end))
            return
        self._note(f"token {start}: no <|message|> between header and content")
        events.append(MessageStart(read))
        text = read.rest if self._keep_special else read.rest.replace(_CHANNEL, "").replace(_CONSTRAIN, "")
        if text:
            events.append(Delta(text, read))
        self._add_message(read, text, stop, (start, end), events)

    def _begins_header(self, tokens: list[int]) -> bool:
        return _HEADER_BEGUN.match(self._tokenizer.decode(tokens)) is not None

    def _add_message(
        self, header: Header, text: str, stop: str | None, span: tuple[int, int], events: list[Event]
    ) -> None:
        message = ParsedMessage(
            header.role,
            text,
            header.name,
            header.recipient,
            header.channel,
            header.content_type,
            stop,
            span,
            header.written,
        )
        if self._completes:
            self._note_meaning(message)
        self.result.messages.append(message)
        events.append(MessageEnd(message))

    def _note_meaning(self, message: ParsedMessage) -> None:
        """Reports messages that are not the assistant's, and `<|call|>` after a message that calls no tool."""
        kind = meaning(message, self._tools).kind
        start, end = message.span
        if kind == "nothing":
            who = shorten(message.name or message.role)
            self._note(f"token {start}: a message of {who}, not of the assistant: {shorten(message.text)}")
        elif message.stop == "<|call|>" and kind != "call":
            self._note(f"token {end - 1}: <|call|> after a message that calls no tool")

    def _push_content(self, content: _Content, token: int, events: list[Event]) -> None:
        if token in self._ends:
            self._end_content(content, self._ends[token], self._position + 1, events)
            return
        if token == self._start and not self._strict:
            self._note(f"token {self._position}: <|start|> before the end of a message")
            self._end_content(content, None, self._position, events)
            self._open_header(self._position, None, [])
            return
        if token in self._special:
            self._note_once(content, f"{self._special[token]} in the content")
            if not self._keep_special:
                return
        elif token not in self._tokenizer:
            self._note_once(content, "a token outside the vocabulary in the content")
        self._bytes += self._tokenizer.decode_bytes((token,))
        text = self._decode(content)
        if text:
            self._delta = text
            content.text.append(text)
            events.append(Delta(text, content.header))

    def _note_once(self, content: _Content, problem: str) -> None:
        if problem not in content.noted:
            content.noted.add(problem)
            self._note(f"token {self._position}: {problem}")

    def _decode(self, content: _Content) -> str:
        """The text that is complete: at most one invalid sequence for each token, as in openai-harmony."""
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError as error:
            text = self._bytes[: error.start].decode()
            if error.reason == "unexpected end of data":
                del self._bytes[: error.start]
                return text
            self._note_once(content, "not valid UTF-8 in the content")
            if len(self._bytes) > _BACKLOG:
                return self._flush()
            del self._bytes[: error.end]
            return text + "\ufffd"
        self._bytes.clear()
        return text

    def _flush(self) -> str:
        text = self._bytes.decode("utf-8", "replace")
        self._bytes.clear()
        return text

    def _end_content(self, content: _Content, stop: str | None, end: int, events: list[Event]) -> None:
        if self._bytes:
            text = self._flush()
            if "\ufffd" in text:
                self._note_once(content, "not valid UTF-8 in the content")
            content.text.append(text)
            events.append(Delta(text, content.header))
        self._content = None
        self._add_message(content.header, "".join(content.text), stop, (content.start, end), events)


def parse(
    tokens: Iterable[int], tokenizer: Tokenizer, role: Role | None = "assistant", *, strict: bool = False
) -> ParsedCompletion:
    """The messages of a completion and its format violations. Arguments are as for StreamParser. Never raises."""
    parser = StreamParser(tokenizer, role, strict=strict)
    parser.push_all(list(tokens))
    parser.finish()
    return parser.result
