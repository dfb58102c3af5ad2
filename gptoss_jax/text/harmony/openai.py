"""Converts OpenAI-style chat messages to harmony messages, and parsed messages back."""

import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from gptoss_jax.errors import UsageError
from gptoss_jax.text.harmony.meaning import meaning
from gptoss_jax.text.harmony.messages import (
    KNOWLEDGE_CUTOFF,
    MODEL_IDENTITY,
    REASONING_EFFORTS,
    ROLES,
    DeveloperContent,
    FunctionTool,
    Message,
    ParsedMessage,
    ResponseFormat,
    SystemContent,
    ToolNamespace,
)
from gptoss_jax.text.harmony.render import render_conversation
from gptoss_jax.text.harmony.tools import BUILTIN_TOOLS, Tool, function_tools, plain_json
from gptoss_jax.text.harmony.typescript import to_json
from gptoss_jax.text.tokenizer import Tokenizer

_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING = ("thinking", "reasoning_content", "reasoning")
_PHASES = {"commentary": "commentary", "final_answer": "final"}
"""The channels by the `phase` of an assistant's message, a field of OpenAI's Responses API."""

SEPARATOR = "\n\n"
"""Separates the texts of messages that are merged into one."""


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Tool] | None = None,
    builtin_tools: Sequence[str] = (),
    reasoning_effort: str = "medium",
    model_identity: str | None = None,
    current_date: str | None = None,
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF,
    response_format: Mapping[str, Any] | None = None,
    next_role: str | None = "assistant",
    auto_drop_analysis: bool = True,
) -> list[int]:
    """The tokens of OpenAI-style messages, up to the beginning of a message of `next_role`.

    `tools` are OpenAI tool objects or Python functions, `builtin_tools` any of "browser" and "python".
    Without `current_date` (YYYY-MM-DD) the system message has no date. Text is never encoded to special tokens. With
    `auto_drop_analysis`, reasoning is kept only after the last final answer, where a chain of tool calls still needs
    it. Raises UsageError in one line that names the message's index and the field.
    """
    conversation = to_messages(
        messages,
        tools=tools,
        builtin_tools=builtin_tools,
        reasoning_effort=reasoning_effort,
        model_identity=model_identity,
        current_date=current_date,
        knowledge_cutoff=knowledge_cutoff,
        response_format=response_format,
        auto_drop_analysis=auto_drop_analysis,
    )
    _check(next_role is None or next_role in ROLES, "next_role", f"one of {', '.join(ROLES)}", next_role)
    return render_conversation(conversation, tokenizer, next_role=next_role, auto_drop_analysis=False)


def to_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Tool] | None = None,
    builtin_tools: Sequence[str] = (),
    reasoning_effort: str = "medium",
    model_identity: str | None = None,
    current_date: str | None = None,
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF,
    response_format: Mapping[str, Any] | None = None,
    auto_drop_analysis: bool = True,
) -> list[Message]:
    """The harmony conversation of OpenAI-style messages; arguments and errors as for `render`.

    System messages become developer instructions, as the format calls them: those at the beginning share one
    developer message with the tools, and each later one becomes a developer message of its own.
    """
    _check(isinstance(messages, Sequence) and not isinstance(messages, str), "messages", "a list", messages)
    _check(
        reasoning_effort in REASONING_EFFORTS,
        "reasoning_effort",
        f"one of {', '.join(REASONING_EFFORTS)}",
        reasoning_effort,
    )
    for name, value in (
        ("model_identity", model_identity),
        ("current_date", current_date),
        ("knowledge_cutoff", knowledge_cutoff),
    ):
        _check(value is None or isinstance(value, str), name, "a string", value)
    _check(isinstance(auto_drop_analysis, bool), "auto_drop_analysis", "true or false", auto_drop_analysis)
    system = SystemContent(
        model_identity=MODEL_IDENTITY if model_identity is None else model_identity,
        knowledge_cutoff=knowledge_cutoff,
        current_date=current_date,
        reasoning_effort=reasoning_effort,
        tools=_builtin(builtin_tools),
    )
    functions = function_tools(() if tools is None else tools)
    namespaces = (ToolNamespace("functions", None, functions),) if functions else ()
    reader = _Reader({namespace.name for namespace in system.tools})
    body = [message for index, value in enumerate(messages) for message in reader.read(index, value)]
    instructions: list[str] = []
    while body and body[0].role == "developer":
        instructions += [part for part in body.pop(0).content if isinstance(part, str) and part]
    developer = DeveloperContent("\n\n".join(instructions) or None, namespaces, _response_format(response_format))
    head = [Message("system", (system,))]
    if developer != DeveloperContent():
        head.append(Message("developer", (developer,)))
    body = [_as_instructions(message) for message in body]
    return head + (_without_old_analysis(body) if auto_drop_analysis else body)


def _as_instructions(message: Message) -> Message:
    if message.role != "developer":
        return message
    return Message("developer", (DeveloperContent("".join(map(str, message.content))),), message.name)


def _without_old_analysis(messages: list[Message]) -> list[Message]:
    finals = [index for index, message in enumerate(messages) if message.channel == "final"]
    last = finals[-1] if finals else 0
    return [m for m in messages[:last] if m.channel != "analysis"] + messages[last:]


def _builtin(names: Sequence[str]) -> tuple[ToolNamespace, ...]:
    _check(isinstance(names, list | tuple), "builtin_tools", "a list", names)
    for name in names:
        known = isinstance(name, str) and name in BUILTIN_TOOLS
        _check(known, "builtin_tools", f"any of {', '.join(BUILTIN_TOOLS)}", name)
    return tuple(BUILTIN_TOOLS[name] for name in sorted(set(names)))


def _response_format(value: Mapping[str, Any] | None) -> ResponseFormat | None:
    if value is None:
        return None
    _check(isinstance(value, Mapping), "response_format", "an object", value)
    match value.get("type", "json_schema"):
        case "text":
            return None
        case "json_object":
            return ResponseFormat("json_object", {"type": "object"})
        case "json_schema":
            where = "response_format.json_schema" if "json_schema" in value else "response_format"
            inner = value.get("json_schema", value)
            _check(isinstance(inner, Mapping), where, "an object", inner)
            name, schema, description = (
                inner.get("name", "response"),
                inner.get("schema"),
                inner.get("description"),
            )
            _check(isinstance(name, str) and "\n" not in name, f"{where}.name", "one line of text", name)
            _check(isinstance(schema, Mapping), f"{where}.schema", "a JSON schema object", schema)
            _check(
                description is None or isinstance(description, str),
                f"{where}.description",
                "a string",
                description,
            )
            return ResponseFormat(name, plain_json(f"{where}.schema", schema), description)
        case other:
            raise UsageError(f"expected text, json_object or json_schema, found {other!r}", "response_format.type")


class _Reader:
    """Reads OpenAI-style messages in order, and keeps track of the calls that a tool's result may answer."""

    def __init__(self, builtin: set[str]) -> None:
        self._builtin = builtin
        self._calls: dict[str, Message] = {}
        self._unanswered: list[Message] = []

    def read(self, index: int, message: Any) -> list[Message]:
        where = f"messages[{index}]"
        _check(isinstance(message, Mapping), where, "an object", message)
        name = message.get("name")
        _check(name is None or (isinstance(name, str) and name != ""), f"{where}.name", "a name", name)
        match message.get("role"):
            case "system" | "developer":
                return [Message("developer", _text(where, message))]
            case "user":
                return [Message("user", _text(where, message), name)]
            case "assistant":
                return self._assistant(where, message, name)
            case "tool" | "function":
                return [self._tool(where, message, name)]
            case role:
                raise UsageError(f"expected one of {', '.join(ROLES)}, found {role!r}", f"{where}.role")

    def _assistant(self, where: str, message: Mapping[str, Any], name: str | None) -> list[Message]:
        calls = message.get("tool_calls")
        calls = [] if calls is None else calls
        _check(isinstance(calls, list | tuple), f"{where}.tool_calls", "a list", calls)
        written: list[Message] = []
        key = next((key for key in _THINKING if message.get(key) is not None), None)
        if key is not None:
            _check(isinstance(message[key], str), f"{where}.{key}", "a string", message[key])
            if message[key]:
                written.append(Message("assistant", (message[key],), name, None, "analysis"))
        if message.get("content") is not None or not (calls or written):
            content = _assistant_content(where, message)
            if any(content) or not calls:
                channel = _phase_channel(where, message) or ("commentary" if calls else "final")
                written.append(Message("assistant", content, name, None, channel))
        made = [self._call(f"{where}.tool_calls[{i}]", call, name) for i, call in enumerate(calls)]
        self._unanswered = list(made)
        return written + made

    def _call(self, where: str, call: Any, author: str | None) -> Message:
        _check(isinstance(call, Mapping), where, "an object", call)
        function = call.get("function", call)
        _check(isinstance(function, Mapping), f"{where}.function", "an object", function)
        name, arguments, call_id = function.get("name"), function.get("arguments"), call.get("id")
        named = isinstance(name, str) and name != "" and not any(c.isspace() for c in name)
        _check(named, f"{where}.function.name", "a name without spaces", name)
        _check(call_id is None or isinstance(call_id, str), f"{where}.id", "a string", call_id)
        if isinstance(arguments, Mapping):
            arguments = to_json(plain_json(f"{where}.function.arguments", arguments))
        _check(isinstance(arguments, str), f"{where}.function.arguments", "a string or an object", arguments)
        if self._is_builtin(name):
            written = Message("assistant", (arguments,), author, name, "analysis", "code")
        else:
            recipient = _qualified(name)
            written = Message("assistant", (arguments,), author, recipient, "commentary", "<|constrain|>json")
        if call_id is not None:
            self._calls[call_id] = written
        return written

    def _tool(self, where: str, message: Mapping[str, Any], name: str | None) -> Message:
        call_id = message.get("tool_call_id")
        if name is not None:
            name = name if self._is_builtin(name) else _qualified(name)
        if call_id is not None:
            known = isinstance(call_id, str) and call_id in self._calls
            _check(known, f"{where}.tool_call_id", "the id of an earlier tool call", call_id)
            called = self._calls[call_id]
            _check(name in (None, called.recipient), f"{where}.name", str(called.recipient), name)
        elif name is not None:
            called = next((call for call in self._unanswered if call.recipient == name), Message("assistant"))
        else:
            _check(bool(self._unanswered), where, "a name or a tool_call_id", None)
            called = self._unanswered[0]
        self._unanswered = [call for call in self._unanswered if call is not called]
        name = name or called.recipient
        channel = "analysis" if self._is_builtin(name or "") else "commentary"
        return Message("tool", _text(where, message), name, "assistant", channel)

    def _is_builtin(self, name: str) -> bool:
        return name.partition(".")[0] in self._builtin


def _qualified(name: str) -> str:
    return name if name.startswith("functions.") else f"functions.{name}"


def _text(where: str, message: Mapping[str, Any]) -> tuple[str, ...]:
    content = message.get("content")
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list | tuple):
        raise UsageError(f"expected a string or a list of text parts, found {_shown(content)}", f"{where}.content")
    parts = []
    for index, part in enumerate(content):
        here = f"{where}.content[{index}]"
        _check(isinstance(part, Mapping), here, "a text part", part)
        _check(part.get("type") in _TEXT_PARTS, f"{here}.type", "'text'", part.get("type"))
        _check(isinstance(part.get("text"), str), f"{here}.text", "a string", part.get("text"))
        parts.append(part["text"])
    return tuple(parts)


def _assistant_content(where: str, message: Mapping[str, Any]) -> tuple[str, ...]:
    """An assistant's content, which may be null because a completion can be empty."""
    is_empty = message.get("content") is None and any(
        key in message for key in ("content", "tool_calls", *_THINKING)
    )
    return ("",) if is_empty else _text(where, message)


def _phase_channel(where: str, message: Mapping[str, Any]) -> str | None:
    """The channel that a message's phase asks for; None if it has no phase."""
    phase = message.get("phase")
    known = phase is None or (isinstance(phase, str) and phase in _PHASES)
    _check(known, f"{where}.phase", f"one of {', '.join(_PHASES)}", phase)
    return None if phase is None else _PHASES[phase]


def _check(holds: bool, field: str, expected: str, found: Any) -> None:
    if not holds:
        raise UsageError(f"expected {expected}, found {_shown(found)}", field)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
    return shown if len(shown) <= 80 else shown[:80] + "..."


def _new_call_id(_index: int) -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def to_openai(
    messages: Iterable[ParsedMessage],
    *,
    call_id: Callable[[int], str] = _new_call_id,
    tools: Collection[str] | None = None,
) -> dict[str, Any]:
    """Merges the messages of a completion into one OpenAI-style assistant message.

    The kind of each message (`meaning`) decides its field: "thinking" for reasoning, "tool_calls" for calls, with ids
    from `call_id(index)`, and "content" for answers and preambles. Without such messages "content" is None and the
    other fields are absent. `tools` holds the names of the available tools (`tool_names`), or None if not known.
    """
    content: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for message in messages:
        meant = meaning(message, tools)
        if meant.kind == "call":
            function = {"name": meant.tool, "arguments": message.text}
            calls.append({"id": call_id(len(calls)), "type": "function", "function": function})
        elif meant.kind != "nothing":
            (thinking if meant.kind == "reasoning" else content).append(message.text)
    result: dict[str, Any] = {"role": "assistant", "content": join_texts(content) if content else None}
    if thinking:
        result["thinking"] = join_texts(thinking)
    if calls:
        result["tool_calls"] = calls
    return result


def join_texts(texts: Iterable[str]) -> str:
    """The texts of several messages joined by SEPARATOR, without the empty ones."""
    return SEPARATOR.join(text for text in texts if text)


def tool_names(tools: Sequence[Tool] | None = None, builtin_tools: Sequence[str] = ()) -> frozenset[str]:
    """The names by which calls refer to these tools; arguments are as for `render`. Raises UsageError."""
    return frozenset(name.removeprefix("functions.") for name in tool_recipients(tools, builtin_tools))


def tool_recipients(
    tools: Sequence[Tool] | None = None, builtin_tools: Sequence[str] = ()
) -> dict[str, FunctionTool | None]:
    """These tools by the recipient of their calls, or None for a tool that takes free text. Raises UsageError."""
    functions = {_qualified(tool.name): tool for tool in function_tools(() if tools is None else tools)}
    builtin = {
        f"{space.name}.{tool.name}" if tool else space.name: tool
        for space in _builtin(builtin_tools)
        for tool in space.functions or (None,)
    }
    return functions | builtin


def is_tool_call(message: ParsedMessage) -> bool:
    """Whether a message is a tool call."""
    return meaning(message).kind == "call"
