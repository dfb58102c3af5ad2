"""The events of a message, and the message that they add up to."""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from gptoss_jax.serving.api.messages.arguments import json_object
from gptoss_jax.serving.api.messages.conversation import carrying_signature
from gptoss_jax.serving.turns import Update, Usage
from gptoss_jax.text.items import Item, ItemEnd, ItemStart, ItemText

Event = dict[str, Any]
Reasoning = Literal["shown", "omitted", "hidden"]
"""Whether reasoning is answered with its text, as a block without text, or not at all."""

_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
"""The fields of deltas that are joined to one."""


class Events:
    """Turns the updates of a completion into the events of a message.

    A block of text or reasoning begins with its first text, so no block is empty. A call's text comes with its end, as
    one JSON object; until then each update has a delta without text, so that a client sees that the call goes on.
    `fitted` says that the context limited the tokens, not the request.
    """

    def __init__(self, message_id: str, model: str, reasoning: Reasoning, fitted: bool) -> None:
        self._id, self._model, self._reasoning, self._fitted = message_id, model, reasoning, fitted
        self._begun = False
        self._blocks = 0
        self._open: Item | None = None
        self._new: list[Event] = []

    def of(self, update: Update) -> list[Event]:
        """The events of an update; the last one's end the message."""
        self._new = [] if self._begun else [self._start(update.usage)]
        self._begun = True
        for event in update.events:
            if event.item.kind == "reasoning" and self._reasoning == "hidden":
                continue
            match event:
                case ItemStart(item):
                    if item.kind == "call":
                        self._open_block(item)
                case ItemText(item, text):
                    if text:
                        self._add_text(item, text)
                case ItemEnd(item):
                    if self._open is item:
                        self._close_block(item)
        if update.finish_reason:
            self._end(update)
        return self._new

    def _start(self, usage: Usage) -> Event:
        message: Event = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**_usage(usage), "service_tier": "standard"},
        }
        return {"type": "message_start", "message": message}

    def _end(self, update: Update) -> None:
        sequence = next((item.stop_string for item in update.items if item.stop_string is not None), None)
        match update.finish_reason:
            case "length":
                reason, sequence = "model_context_window_exceeded" if self._fitted else "max_tokens", None
            case "tool_calls":
                reason, sequence = "tool_use", None
            case _:
                reason = "end_turn" if sequence is None else "stop_sequence"
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        self._new += [
            {"type": "message_delta", "delta": delta, "usage": _usage(update.usage)},
            {"type": "message_stop"},
        ]

    def _open_block(self, item: Item) -> None:
        block: Event
        match item.kind:
            case "call":
                block = {
                    "type": "tool_use",
                    "id": f"toolu_{uuid.uuid4().hex[:24]}",
                    "name": item.tool,
                    "input": {},
                }
            case "reasoning":
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case _:
                block = {"type": "text", "text": ""}
        self._open = item
        self._new.append({"type": "content_block_start", "index": self._blocks, "content_block": block})

    def _add_text(self, item: Item, text: str) -> None:
        if self._open is not item:
            self._open_block(item)
        match item.kind:
            case "call":
                self._add_delta("input_json_delta", "")
            case "reasoning":
                if self._reasoning == "shown":
                    self._add_delta("thinking_delta", text)
            case _:
                self._add_delta("text_delta", text)

    def _close_block(self, item: Item) -> None:
        if item.kind == "call":
            self._add_delta("input_json_delta", json_object(item.text))
        elif item.kind == "reasoning":
            shown = self._reasoning == "shown"
            signature = _signature(item.text) if shown else carrying_signature(item.text)
            delta = {"type": "signature_delta", "signature": signature}
            self._new.append({"type": "content_block_delta", "index": self._blocks, "delta": delta})
        self._new.append({"type": "content_block_stop", "index": self._blocks})
        self._open = None
        self._blocks += 1

    def _add_delta(self, kind: str, text: str) -> None:
        """Add text to the open block, in the delta before if there is one."""
        field = _DELTAS[kind]
        if self._new and self._new[-1]["type"] == "content_block_delta" and self._new[-1]["delta"]["type"] == kind:
            self._new[-1]["delta"][field] += text
            return
        delta = {"type": kind, field: text}
        self._new.append({"type": "content_block_delta", "index": self._blocks, "delta": delta})


class Message:
    """The message that events add up to, as it is answered at once."""

    def __init__(self) -> None:
        self.content: Event = {}
        self._block: Event = {}
        self._texts: list[str] = []

    def add(self, events: Iterable[Event]) -> None:
        """Add further events."""
        for event in events:
            match event["type"]:
                case "message_start":
                    self.content = event["message"]
                case "content_block_start":
                    self._block, self._texts = event["content_block"], []
                    self.content["content"].append(self._block)
                case "content_block_delta":
                    self._add_delta(event["delta"])
                case "content_block_stop":
                    self._complete("".join(self._texts))
                case "message_delta":
                    self.content |= event["delta"]
                    self.content["usage"] |= event["usage"]

    def _add_delta(self, delta: Event) -> None:
        if delta["type"] == "signature_delta":
            self._block["signature"] = delta["signature"]
        else:
            self._texts.append(delta[_DELTAS[delta["type"]]])

    def _complete(self, text: str) -> None:
        if self._block["type"] == "tool_use":
            self._block["input"] = msgspec.Raw(text.encode())
        else:
            self._block[self._block["type"]] = text


def _signature(text: str) -> str:
    """A signature for clients that expect one; it is not checked."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _usage(usage: Usage) -> Event:
    """Token counts, in which the input's are those that were not found in the prefix cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
