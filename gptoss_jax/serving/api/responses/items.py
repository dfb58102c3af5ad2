"""The items of a request's input: read from its body, and turned into messages for the prompt.

An item is a JSON object as responses have it, with an id. Those of a stored conversation and those that a client sends
again become the same messages, so both make the same prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from gptoss_jax.serving.api.body import convert
from gptoss_jax.serving.api.errors import bad_request
from gptoss_jax.serving.api.responses.ids import new_id
from gptoss_jax.serving.api.responses.tools import joined_name
from gptoss_jax.text.harmony import join_texts

Item = dict[str, Any]
Unseal = Callable[[str, str], str]
"""The text of encrypted reasoning; the second argument is its field, which errors name."""

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class _Message(msgspec.Struct):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    phase: Literal["commentary", "final_answer"] | None = None


class _ReasoningText(msgspec.Struct):
    text: str
    type: Literal["reasoning_text", "text", "summary_text"] = "reasoning_text"


class _Reasoning(msgspec.Struct):
    summary: list[_ReasoningText] | None = None
    content: list[_ReasoningText] | None = None
    encrypted_content: str | None = None


class _Call(msgspec.Struct):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class _CallOutput(msgspec.Struct):
    call_id: str
    output: str | list[dict[str, Any]]


class _Reference(msgspec.Struct):
    id: str


def read_items(given: str | Sequence[Mapping[str, Any]], unseal: Unseal) -> list[Item]:
    """The items of `input`; references are not resolved. Raises ApiError, which names the item's field."""
    if isinstance(given, str):
        return [_with_id(_message({"role": "user", "content": given}, "input"), None, set())]
    taken: set[str] = set()
    return [_read(item, f"input[{index}]", unseal, taken) for index, item in enumerate(given)]


def _read(value: Mapping[str, Any], where: str, unseal: Unseal, taken: set[str]) -> Item:
    kind = value.get("type")
    if kind is None:
        kind = "message" if "role" in value else "item_reference"
    match kind:
        case "message":
            item = _message(value, where)
        case "reasoning":
            item = _reasoning(value, where, unseal)
        case "function_call":
            call = msgspec.to_builtins(convert(value, _Call, where))
            item = {"type": kind, **{name: text for name, text in call.items() if text is not None}}
        case "function_call_output":
            item = _call_output(value, where)
        case "item_reference":
            return {"type": kind, "id": convert(value, _Reference, where).id}
        case _:
            raise bad_request(f"{where}.type: items of type {kind!r:.60} are not available", f"{where}.type")
    return _with_id(item, value.get("id"), taken) | {"status": _status(value)}


def _status(value: Mapping[str, Any]) -> str:
    return "incomplete" if value.get("status") == "incomplete" else "completed"


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def _with_id(item: Item, given: Any, taken: set[str]) -> Item:
    """The item with the id that the client gave it, if it can be one and no other item has it, or else a new one."""
    usable = isinstance(given, str) and _ID.fullmatch(given) is not None and given not in taken
    item["id"] = given if usable else new_id(_PREFIXES[item["type"]])
    taken.add(item["id"])
    return {"status": "completed", **item}


def _message(value: Mapping[str, Any], where: str) -> Item:
    message = convert(value, _Message, where)
    said = message.role == "assistant"
    kind = "output_text" if said else "input_text"
    content = message.content
    if isinstance(content, str):
        parts = [_part(kind, content)]
    else:
        parts = [_content(part, f"{where}.content[{i}]", kind, said) for i, part in enumerate(content)]
    item = {"type": "message", "role": message.role, "content": parts}
    return item if message.phase is None else {**item, "phase": message.phase}


def _part(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}


def _content(part: Mapping[str, Any], where: str, kind: str, may_refuse: bool = False) -> dict[str, Any]:
    found = part.get("type")
    if may_refuse and found == "refusal":
        return {"type": found, "refusal": _string(part, "refusal", where)}
    if found not in ("input_text", "output_text", "text"):
        raise bad_request(f"{where}: the model reads text only, found a part of type {found!r:.60}", where)
    return _part(kind, _string(part, "text", where))


def _string(part: Mapping[str, Any], name: str, where: str) -> str:
    text = part.get(name)
    if not isinstance(text, str):
        raise bad_request(f"{where}.{name}: expected a string, found {type(text).__name__}", f"{where}.{name}")
    return text


def _reasoning(value: Mapping[str, Any], where: str, unseal: Unseal) -> Item:
    reasoning = convert(value, _Reasoning, where)
    summary = [{"type": "summary_text", "text": part.text} for part in reasoning.summary or ()]
    content = [{"type": "reasoning_text", "text": part.text} for part in reasoning.content or ()]
    item: Item = {"type": "reasoning", "summary": summary, "content": content}
    if reasoning.encrypted_content:
        text = unseal(reasoning.encrypted_content, f"{where}.encrypted_content")
        item["content"] = [{"type": "reasoning_text", "text": text}]
        item["encrypted_content"] = reasoning.encrypted_content
    return item


def _call_output(value: Mapping[str, Any], where: str) -> Item:
    found = convert(value, _CallOutput, where)
    output: Any = found.output
    if not isinstance(output, str):
        output = [_content(part, f"{where}.output[{i}]", "input_text") for i, part in enumerate(output)]
    return {"type": "function_call_output", "call_id": found.call_id, "output": output}


def to_messages(items: Sequence[Item]) -> list[dict[str, Any] | None]:
    """The message of each item for `Prompts.chat_request`; None for an item that says nothing."""
    messages: list[dict[str, Any] | None] = []
    phase = "final_answer"
    for item in reversed(items):
        messages.append(_to_message(item, phase))
        if item["type"] != "reasoning":
            # A message without a phase that a call follows introduces the call.
            phase = "commentary" if item["type"] == "function_call" else "final_answer"
    return messages[::-1]


def _to_message(item: Item, likely_phase: str) -> dict[str, Any] | None:
    match item["type"]:
        case "message":
            content = [_text_part(part) for part in item["content"]]
            if item["role"] != "assistant":
                return {"role": item["role"], "content": content}
            return {"role": "assistant", "phase": item.get("phase") or likely_phase, "content": content}
        case "reasoning":
            text = join_texts(part["text"] for part in item["content"] or item["summary"])
            return {"role": "assistant", "thinking": text} if text else None
        case "function_call":
            name = joined_name(item.get("namespace"), item["name"])
            function = {"name": name, "arguments": item["arguments"]}
            return {"role": "assistant", "tool_calls": [{"id": item["call_id"], "function": function}]}
        case _:
            output = item["output"]
            said = output if isinstance(output, str) else [_text_part(part) for part in output]
            return {"role": "tool", "tool_call_id": item["call_id"], "content": said}


def _text_part(part: Mapping[str, Any]) -> dict[str, str]:
    return {"type": "text", "text": part["refusal"] if part["type"] == "refusal" else part["text"]}
