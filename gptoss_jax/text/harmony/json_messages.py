"""Reads conversations from JSON: openai-harmony's format, and a neutral one with typed content objects."""

from collections.abc import Collection, Mapping
from typing import Any

from gptoss_jax.errors import UsageError
from gptoss_jax.text.harmony.messages import (
    REASONING_EFFORTS,
    ROLES,
    Content,
    DeveloperContent,
    FunctionTool,
    Message,
    SystemContent,
    ToolNamespace,
)
from gptoss_jax.text.harmony.tools import BUILTIN_TOOLS, function_tool

HEADER_FIELDS = ("recipient", "channel", "content_type")
"""The fields of a message's header that OpenAI-style messages do not have."""


def read_messages(value: Any, where: str = "messages") -> list[Message]:
    """Messages in either format; raises UsageError naming the message's index and the field, also an unknown one.

    Null counts as absent. A message may have `text`, as parsed messages do, instead of `content`.
    In the neutral format a content object has the type "system" or "developer", its fields are those of
    SystemContent and DeveloperContent, and a tool namespace is {"namespace", "description", "functions"} or
    {"namespace", "builtin": true}. In openai-harmony's format the types are "system_content" and
    "developer_content".
    """
    messages = _typed(value, list, where, "a list")
    return [
        _message(_typed(item, Mapping, f"{where}[{i}]", "an object"), f"{where}[{i}]")
        for i, item in enumerate(messages)
    ]


def _message(value: Mapping[str, Any], where: str) -> Message:
    role = value.get("role")
    if role not in ROLES:
        raise UsageError(f"expected one of {', '.join(ROLES)}, found {role!r}", f"{where}.role")
    _only(value, ("role", "name", *HEADER_FIELDS, "content", "text"), where)
    key = "content" if value.get("text") is None else "text"
    if key == "text" and value.get("content") is not None:
        raise UsageError("expected content or text, found both", where)
    content = value.get(key)
    parts = content if isinstance(content, list) else [content]
    return Message(
        role,
        tuple(
            _content(part, f"{where}.{key}[{i}]" if isinstance(content, list) else f"{where}.{key}")
            for i, part in enumerate(parts)
        ),
        **{name: _optional(value, name, str, where, "a string") for name in ("name", *HEADER_FIELDS)},
    )


def _content(part: Any, where: str) -> Content:
    if isinstance(part, str):
        return part
    part = _typed(part, Mapping, where, "a string or a content object")
    match part.get("type"):
        case "text":
            _only(part, ("type", "text"), where)
            text: str = _typed(part.get("text"), str, f"{where}.text", "a string")
            return text
        case "system":
            _only(part, (*_SYSTEM_FIELDS, "current_date", *_CHANNEL_FIELDS), where)
            return _system(part, where, "current_date", part)
        case "system_content":
            _only(part, (*_SYSTEM_FIELDS, "conversation_start_date", "channel_config"), where)
            channels = _optional(part, "channel_config", Mapping, where, "an object") or {}
            _only(channels, _CHANNEL_FIELDS, f"{where}.channel_config")
            return _system(part, where, "conversation_start_date", channels)
        case "developer" | "developer_content":
            _only(part, ("type", "instructions", "tools"), where)
            return DeveloperContent(
                _optional(part, "instructions", str, where, "a string"),
                _namespaces(part.get("tools"), f"{where}.tools"),
            )
        case other:
            raise UsageError(f"expected text, system or developer, found {other!r}", f"{where}.type")


_SYSTEM_FIELDS = ("type", "model_identity", "knowledge_cutoff", "reasoning_effort", "tools")
_CHANNEL_FIELDS = ("valid_channels", "channel_required")


def _system(part: Mapping[str, Any], where: str, date_key: str, channels: Mapping[str, Any]) -> SystemContent:
    effort = _optional(part, "reasoning_effort", str, where, "a string")
    if effort is not None and effort.lower() not in REASONING_EFFORTS:
        raise UsageError(f"expected {', '.join(REASONING_EFFORTS)}, found {effort!r}", f"{where}.reasoning_effort")
    valid = _optional(channels, "valid_channels", list, where, "a list") or []
    required = _optional(channels, "channel_required", bool, where, "true or false")
    return SystemContent(
        model_identity=_optional(part, "model_identity", str, where, "a string"),
        knowledge_cutoff=_optional(part, "knowledge_cutoff", str, where, "a string"),
        current_date=_optional(part, date_key, str, where, "a string"),
        reasoning_effort=None if effort is None else effort.lower(),
        valid_channels=tuple(_typed(name, str, f"{where}.valid_channels", "strings") for name in valid),
        channel_required=bool(required),
        tools=_namespaces(part.get("tools"), f"{where}.tools"),
    )


def _namespaces(value: Any, where: str) -> tuple[ToolNamespace, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = list(value.values())
    namespaces = []
    for index, item in enumerate(_typed(value, list, where, "a list or an object")):
        here = f"{where}[{index}]"
        item = _typed(item, Mapping, here, "an object")
        _only(item, ("namespace", "name", "builtin", "description", "functions", "tools"), here)
        name: str = _typed(item.get("namespace", item.get("name")), str, f"{here}.namespace", "a string")
        if item.get("builtin"):
            if name not in BUILTIN_TOOLS:
                raise UsageError(
                    f"expected one of {', '.join(BUILTIN_TOOLS)}, found {name!r}", f"{here}.namespace"
                )
            namespaces.append(BUILTIN_TOOLS[name])
            continue
        description = _optional(item, "description", str, here, "a string")
        key = "functions" if "functions" in item else "tools"
        functions = _optional(item, key, list, here, "a list") or []
        namespaces.append(
            ToolNamespace(
                name, description, tuple(_function(f, f"{here}.{key}[{i}]") for i, f in enumerate(functions))
            )
        )
    return tuple(namespaces)


def _function(value: Any, where: str) -> FunctionTool:
    return function_tool(where, _typed(value, Mapping, where, "an object"))


def _only(value: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse fields that would not be rendered."""
    for key in value:
        if key not in known and value[key] is not None:
            raise UsageError(f"unknown field, expected one of {', '.join(known)}", f"{where}.{key}")


def _optional(value: Mapping[str, Any], key: str, kind: type, where: str, expected: str) -> Any:
    return None if value.get(key) is None else _typed(value[key], kind, f"{where}.{key}", expected)


def _typed(value: Any, kind: Any, where: str, expected: str) -> Any:
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise UsageError(f"expected {expected}, found {found}", where)
    return value
