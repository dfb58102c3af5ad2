"""Converts the messages and blocks of a request to chat messages: one for each block, in their order."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from gptoss_jax.serving.api.body import convert
from gptoss_jax.serving.api.errors import bad_request
from gptoss_jax.text.harmony import SEPARATOR

_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
"""A line that Claude Code puts before its system prompt; it changes with every request, so prefixes would differ."""

_CARRIES = "text."
"""The beginning of signatures that contain the reasoning."""


class Turn(msgspec.Struct):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class Text(msgspec.Struct):
    """A block of text."""

    text: str


class Thinking(msgspec.Struct):
    """A block of reasoning."""

    thinking: str
    signature: str = ""


class RedactedThinking(msgspec.Struct):
    """A block of reasoning that only Anthropic can read."""


class ToolUse(msgspec.Struct):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResult(msgspec.Struct):
    """The result of a call."""

    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None


Block = Text | Thinking | RedactedThinking | ToolUse | ToolResult

_Placed = tuple[str, str, Block]
"""A block with its place in the request and its role."""

_KINDS: dict[str, type[Block]] = {
    "text": Text,
    "thinking": Thinking,
    "redacted_thinking": RedactedThinking,
    "tool_use": ToolUse,
    "tool_result": ToolResult,
}
_ALLOWED = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
_FIELDS = {
    "tool_calls[0].function.name": "name",
    "tool_calls[0].function.arguments": "input",
    "tool_calls[0].id": "id",
    "tool_call_id": "tool_use_id",
}
"""Fields of a block by those of its chat message."""


@dataclasses.dataclass
class Conversation:
    """Chat messages as `Prompts.chat_request` takes them, each with the place of its block in the request."""

    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)

    def add(self, place: str, role: str, **fields: Any) -> None:
        """Add a message."""
        self.messages.append({"role": role, **fields})
        self.places.append(place)

    def field(self, field: str) -> str:
        """The place in the request of a field such as "messages[3].tool_call_id"."""
        found = re.match(r"messages\[(\d+)\]\.?", field)
        if found is None or int(found[1]) >= len(self.places):
            return field
        rest = field[found.end() :]
        for name, block_name in _FIELDS.items():
            if rest.startswith(name):
                rest = block_name + rest[len(name) :]
                break
        return f"{self.places[int(found[1])]}.{rest}".removesuffix(".")


def conversation(system: str | list[dict[str, Any]] | None, turns: Sequence[Turn]) -> Conversation:
    """The chat messages of a conversation. Raises ApiError, naming the block, for one that cannot be used."""
    talk = Conversation()
    if instructions := _BILLING.sub("", _texts("system", system or "", "system")):
        talk.add("system", "system", content=instructions)
    blocks = [
        (place, turn.role, block)
        for index, turn in enumerate(turns)
        for place, block in _blocks(f"messages[{index}].content", turn.content, turn.role)
    ]
    entries = zip(blocks, _leads_to_call(blocks), strict=True)
    for (role, kind), run in itertools.groupby(entries, lambda entry: (entry[0][1], type(entry[0][2]))):
        if role == "user" and kind is Text:
            _add_texts(talk, [block for block, _ in run])
        else:
            for (place, _, block), leading in run:
                _add(talk, place, role, block, leading)
    return talk


def carrying_signature(text: str) -> str:
    """A signature that contains the text of its block."""
    return _CARRIES + base64.b64encode(text.encode()).decode()


def _carried(signature: str) -> str:
    """The text that a signature contains; "" if it is of another kind."""
    if not signature.startswith(_CARRIES):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_CARRIES), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""


def _add_texts(talk: Conversation, blocks: Sequence[_Placed]) -> None:
    """Add the texts of a user as one message."""
    texts = [block.text for _, _, block in blocks if isinstance(block, Text) and block.text]
    talk.add(blocks[0][0], "user", content=SEPARATOR.join(texts))


def _add(talk: Conversation, place: str, role: str, block: Block, leading: bool) -> None:
    """Add a block; `leading` if the assistant calls a tool after it. A block without text is left out."""
    match block:
        case Text(text) if role == "system":
            if text := _BILLING.sub("", text):
                talk.add(place, role, content=text)
        case Text(text) if text:
            talk.add(place, role, content=text, phase="commentary" if leading else "final_answer")
        case Thinking(thinking, signature):
            if text := thinking or _carried(signature):
                talk.add(place, role, thinking=text)
        case ToolUse(call_id, name, arguments):
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            talk.add(place, role, tool_calls=[call])
        case ToolResult(call_id, content, is_error):
            text = _texts(f"{place}.content", content or "", "system")
            talk.add(place, "tool", tool_call_id=call_id, content=f"Error: {text}" if is_error else text)


def _leads_to_call(blocks: Sequence[_Placed]) -> list[bool]:
    """Whether the assistant calls a tool after each block, before the turn ends."""
    leads, leading = [], False
    for _, role, block in reversed(blocks):
        leading = role == "assistant" and (leading or isinstance(block, ToolUse))
        leads.append(leading)
    return leads[::-1]


def _texts(place: str, content: str | list[dict[str, Any]], role: str) -> str:
    """Content that consists of text."""
    texts = [block.text for _, block in _blocks(place, content, role) if isinstance(block, Text)]
    return SEPARATOR.join(text for text in texts if text)


def _blocks(place: str, content: str | list[dict[str, Any]], role: str) -> list[tuple[str, Block]]:
    """The blocks of a message, each with its place."""
    if isinstance(content, str):
        return [(place, Text(content))]
    return [(f"{place}[{index}]", _block(f"{place}[{index}]", block, role)) for index, block in enumerate(content)]


def _block(place: str, block: dict[str, Any], role: str) -> Block:
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise bad_request(
            f"{place}.type: expected one of {', '.join(_ALLOWED[role])}, found {kind!r:.80}; the model reads text only",
            f"{place}.type",
        )
    if kind not in _ALLOWED[role]:
        raise bad_request(f"{place}.type: expected {' or '.join(_ALLOWED[role])}, found {kind!r}", f"{place}.type")
    return convert(block, _KINDS[kind], place)
