"""Classifies messages as tool calls, answers, preambles to calls or reasoning, even if the header is malformed.

`parse` reads headers as openai-harmony does, which takes a single content type for a recipient and an unknown first
word for a tool's role. This module instead interprets each word of a header independently of its position:

* A word after `<|constrain|>`, or `json`, `code`, `text` or `response` alone, is a content type and no tool.
* `analysis`, `commentary` and `final` are channels, even without `<|channel|>`, repeated, misplaced or joined to the
  next word. The last one applies.
* `to=NAME` is a recipient. `user`, `all`, `assistant` and an empty name are no tools and cannot be called.
* Any other word is a call if it names an available tool. If the available tools are not known, it is a call in a header
  of the commentary channel or with a content type.
* A first word that is no role is the called tool if a content type follows or `<|call|>` ends the message.

A message on the final channel is a call only if its recipient is unambiguous: a function's qualified name, or the name
of an available tool.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from gptoss_jax.text.harmony.header import Header, shorten
from gptoss_jax.text.harmony.messages import ParsedMessage
from gptoss_jax.text.harmony.tools import BUILTIN_TOOLS

Kind = Literal["answer", "preamble", "reasoning", "call", "nothing"]

_CHANNEL = "<|channel|>"
_CONSTRAIN = "<|constrain|>"
_NAMESPACE = "functions."
NON_TOOL_RECIPIENTS = ("user", "all", "assistant")
"""Recipients that are not tools."""

BARE_NAMESPACES = ("functions", *(f"{name}." for name in ("functions", *BUILTIN_TOOLS)))
"""Recipients that consist of a namespace and name no tool in it."""

_MARK = re.compile(r"(<\|\w+\|>)")
_CHANNELS = re.compile(r"analysis|commentary|final", re.IGNORECASE)
_GRAMMAR = re.compile(
    r"(?P<words>(?:assistant|analysis|commentary|final)*)"
    r"(?:(?P<to>(?:to=)+)(?P<recipient>.*)|(?P<type>json|code|text|response))?",
    re.IGNORECASE,
)
_ENDING = re.compile(r"(.+?)(?:json|code|analysis|commentary|final)", re.IGNORECASE)


@dataclass(frozen=True)
class Meaning:
    """The kind of a message; `tool` is the name of a called tool without "functions.".

    Answers, and preambles on the commentary channel, are addressed to the user. Messages that are not the assistant's
    have the kind "nothing".
    """

    kind: Kind
    tool: str | None = None


@dataclass
class _Words:
    """The words of a header by their interpretation.

    `speaker` is the first word if an assistant's header cannot begin with it. `marked` is the number of words after
    `<|channel|>`, `typed` whether there is a content type. `glued` holds words that are several joined without a space.
    """

    speaker: str | None = None
    marked: int = 0
    channels: list[str] = field(default_factory=list)
    recipients: list[str] = field(default_factory=list)
    typed: bool = False
    unknown_channels: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    glued: list[str] = field(default_factory=list)

    @property
    def channel(self) -> str | None:
        return self.channels[-1] if self.channels else None


def meaning(message: Header | ParsedMessage, tools: Collection[str] | None = None) -> Meaning:
    """The kind of a message, or of a message with this header.

    `tools` holds the names of the available tools, as `tool_names` returns them, or None if they are not known.
    """
    if message.role not in ("assistant", "tool"):
        return Meaning("nothing")
    words = _read(message)
    if words.speaker is not None and isinstance(message, ParsedMessage):
        # A message from a tool does not end with <|call|>. The end is unknown if only a header is given.
        words.typed |= message.stop == "<|call|>"
    if tool := _tool(words, tools):
        return Meaning("call", tool)
    if words.speaker is not None and words.channel != "final":
        return Meaning("nothing")
    if words.channel == "analysis":
        return Meaning("reasoning")
    return Meaning("preamble" if words.channel == "commentary" and "user" not in words.recipients else "answer")


def irregularities(header: Header) -> list[str]:
    """The deviations of a header from the format: misplaced, repeated or misspelled words, one line each."""
    if header.role not in ("assistant", "tool"):
        return []
    words = _read(header)
    problems = []
    if words.glued:
        problems.append(f"no space or mark within {shorten(words.glued[0])}")
    if len(words.channels) + len(words.unknown_channels) > 1 or words.marked > 1:
        problems.append("more than one channel")
    elif len(words.channels) > words.marked:
        problems.append(f"channel {words.channels[0]!r} without <|channel|>")
    if words.unknown_channels:
        problems.append(f"unknown channel {shorten(words.unknown_channels[0])}")
    if len(words.recipients) > 1:
        problems.append("more than one recipient")
    if not all(map(_bare, words.recipients)):
        problems.append("a recipient without a name")
    if words.others:
        problems.append(f"unexpected {shorten(' '.join(words.others))}")
    return [f"header: {problem}" for problem in problems]


def _tool(words: _Words, tools: Collection[str] | None) -> str | None:
    """The tool that a message with these words calls."""
    return _recipient(words, tools) if words.recipients else _lone_word(words, tools)


def _recipient(words: _Words, tools: Collection[str] | None) -> str | None:
    called = [name for name in words.recipients if name not in NON_TOOL_RECIPIENTS and _bare(name)]
    if not called:
        return None
    name = called[-1]
    known = _find(name, tools)
    is_certain = known is not None or name.startswith(_NAMESPACE)
    if not is_certain and (words.channel == "final" or words.speaker is not None):
        return None
    return known or _bare(name)


def _lone_word(words: _Words, tools: Collection[str] | None) -> str | None:
    if words.channel == "final":
        return None
    candidates = [*words.others, *words.unknown_channels]
    if words.speaker is not None and words.typed:
        candidates.append(words.speaker)
    for name in candidates:
        if known := _find(name, tools):
            return known
    may_guess = tools is None and (words.typed or words.channel == "commentary")
    guessed = candidates if may_guess else [name for name in candidates if name.startswith(_NAMESPACE)]
    return next((bare for name in guessed if (bare := _bare(name))), None)


def _find(name: str, tools: Collection[str] | None) -> str | None:
    """The available tool with this name, which may be joined to the word that follows it in a header."""
    bare = _bare(name)
    if not tools or bare in tools:
        return bare if tools else None
    glued = _ENDING.fullmatch(bare)
    return glued[1] if glued and glued[1] in tools else None


def _bare(name: str) -> str:
    """A recipient's name as in OpenAI-style calls, without the namespace; empty if it names no tool."""
    if name in BARE_NAMESPACES:
        return ""
    while name.startswith(_NAMESPACE):
        name = name.removeprefix(_NAMESPACE)
    return name


def _read(message: Header | ParsedMessage) -> _Words:
    words = _Words()
    for index, (mark, word) in enumerate(_split(_written(message))):
        words.marked += mark == _CHANNEL
        if mark == _CONSTRAIN:
            words.typed = True
        elif not _take(words, word):
            _keep(words, mark, word, first=message.role == "tool" and not (index or mark))
    return words


def _take(words: _Words, word: str) -> bool:
    """Add a word of the format, or several that are joined, to `words`; False if the format has no such word."""
    found = _GRAMMAR.match(word)
    if found is None or found.end() < len(word):
        return False
    channels = _CHANNELS.findall(found["words"].lower())
    words.channels += channels
    words.typed |= found["type"] is not None
    if found["to"]:
        if _CHANNELS.fullmatch(found["recipient"]):
            words.channels.append(found["recipient"].lower())
        else:
            words.recipients.append(found["recipient"])
    if found.start("to") > 0 or (channels and not found["to"] and channels != [word.lower()]):
        words.glued.append(word)
    return True


def _keep(words: _Words, mark: str, word: str, first: bool) -> None:
    if first and word.partition(":")[0] != "assistant":
        words.speaker = word
    elif mark == _CHANNEL:
        words.unknown_channels.append(word)
    elif words.recipients and not mark and (not words.recipients[-1] or words.recipients[-1].endswith(".")):
        words.recipients[-1] += word
        words.others.append(word)
    elif word.partition(":")[0] != "assistant":
        words.others.append(word)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """The words of a header, each with the special token that it follows, or ""."""
    mark = ""
    for piece in _MARK.split(text):
        if _MARK.fullmatch(piece):
            mark = piece
            continue
        for word in piece.split():
            yield mark, word
            mark = ""


def _written(message: Header | ParsedMessage) -> str:
    """The header's text as the model wrote it, or else rendered from its fields."""
    if message.written is not None:
        return message.written
    role = message.name or message.role if message.role == "tool" else message.role
    recipient = "" if message.recipient is None else f" to={message.recipient}"
    channel = "" if message.channel is None else _CHANNEL + message.channel
    return f"{role}{recipient}{channel} {message.content_type or ''}"
