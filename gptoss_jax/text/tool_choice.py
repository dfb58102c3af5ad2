"""OpenAI's `tool_choice` and `parallel_tool_calls`, read as the scope of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from gptoss_jax.errors import UsageError, expect
from gptoss_jax.text.harmony import FunctionTool
from gptoss_jax.types import ChatScope

Mode = Literal["none", "auto", "required"]

_MODES: tuple[Mode, ...] = ("none", "auto", "required")
_ANY_OBJECT = json.dumps({"type": "object"})


def chat_scope(
    recipients: Mapping[str, FunctionTool | None],
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
    *,
    has_grammar: bool = False,
) -> ChatScope:
    """The tool calls that a chat allows; it constrains nothing unless the request asks for it.

    Once anything is constrained, the answer included, only the chat's own tools can be called. The arguments of tools
    with `strict` follow their parameters; if a call is required, those of other functions are JSON objects.

    Args:
      recipients: the chat's tools, as `harmony.tool_recipients` returns them.
      tool_choice: "auto" (also None), "none", "required", {"type": "function", ...} with a tool's name, or
        {"type": "allowed_tools", ...} with a mode and tools; as in the Chat Completions and the Responses API.
      parallel_tool_calls: False ends the completion after its first call; None is True.
      has_grammar: whether the answer is constrained.

    Raises:
      UsageError: for any other value, a tool that the chat does not have, and a strict tool whose arguments are not an
        object.
    """
    calls, names = _read_choice(tool_choice, recipients)
    expect(
        isinstance(parallel_tool_calls, bool | None), "parallel_tool_calls", "true or false", parallel_tool_calls
    )
    parallel = parallel_tool_calls is not False
    if calls == "none" or (has_grammar and not recipients):
        return ChatScope("none")
    strict = any(tool is not None and tool.strict for tool in recipients.values())
    if calls == "auto" and not (recipients and (names is not None or strict or has_grammar or not parallel)):
        return ChatScope()
    tools = [
        (recipient, _arguments(recipient, tool, calls == "required"))
        for recipient, tool in recipients.items()
        if names is None or _bare(recipient) in names
    ]
    return ChatScope(calls, tuple(tools), parallel)


def _read_choice(choice: Any, recipients: Mapping[str, Any]) -> tuple[Mode, set[str] | None]:
    """Which calls there may be, and the names of the tools that can be called; None for all tools of the chat."""
    if choice is None:
        return "auto", None
    for mode in _MODES:
        if choice == mode:
            expect(mode != "required" or bool(recipients), "tool_choice", "tools with 'required'", "none")
            return mode, None
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function":
        return "required", {_name(choice, "tool_choice", recipients)}
    if kind == "allowed_tools":
        return _read_allowed(choice, recipients)
    expected = f"{', '.join(_MODES)} or an object of type function or allowed_tools"
    raise UsageError(f"expected {expected}, found {choice!r:.60}", "tool_choice")


def _read_allowed(choice: Mapping[str, Any], recipients: Mapping[str, Any]) -> tuple[Mode, set[str]]:
    """The mode and the names of {"type": "allowed_tools"}, which Chat Completions nest in a field of this name."""
    nested = choice.get("allowed_tools") is not None
    where = "tool_choice.allowed_tools" if nested else "tool_choice"
    given = choice["allowed_tools"] if nested else choice
    expect(isinstance(given, Mapping), where, "an object", given)
    mode, tools = given.get("mode"), given.get("tools")
    if mode not in ("auto", "required"):
        raise UsageError(f"expected auto or required, found {mode!r:.60}", f"{where}.mode")
    if not isinstance(tools, list | tuple) or not tools:
        raise UsageError(f"expected a list of tools that is not empty, found {tools!r:.60}", f"{where}.tools")
    return mode, {_name(tool, f"{where}.tools[{i}]", recipients) for i, tool in enumerate(tools)}


def _name(value: Any, where: str, recipients: Mapping[str, Any]) -> str:
    """The name in {"type": "function", "function": {"name"}} or {"type": "function", "name"}."""
    fine = isinstance(value, Mapping) and value.get("type") == "function"
    expect(fine, where, 'an object with "type": "function"', value)
    inner = value if value.get("function") is None else value["function"]
    name = inner.get("name") if isinstance(inner, Mapping) else None
    expect(isinstance(name, str), where, "the name of a function", value)
    known = [_bare(recipient) for recipient in recipients]
    if name not in known:
        expected = f"expected one of {', '.join(known)}" if known else "there are no tools"
        raise UsageError(f"no tool is named {name!r:.60}; {expected:.200}", where)
    return str(name)


def _bare(recipient: str) -> str:
    return recipient.removeprefix("functions.")


def _arguments(recipient: str, tool: FunctionTool | None, required: bool) -> str | None:
    """The JSON schema of a tool's arguments; None if they are free."""
    if tool is None or not (tool.strict or required):
        return None
    if not tool.strict:
        return _ANY_OBJECT
    schema = {"properties": {}, "additionalProperties": False} if tool.parameters is None else tool.parameters
    types = schema.get("type", "object") if isinstance(schema, Mapping) else type(schema).__name__
    if "object" not in (types if isinstance(types, list) else [types]):
        raise UsageError(f"{recipient}: expected a schema of an object with strict, found {types!r:.60}", "tools")
    return json.dumps({**schema, "type": "object"})
