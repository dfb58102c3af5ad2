"""The tools of a request: those that the model can call, by their names in the prompt, and the choice among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

from gptoss_jax.serving.api.body import convert
from gptoss_jax.serving.api.errors import bad_request
from gptoss_jax.serving.api.server import Server

_CHOICES = ("none", "auto", "required")


class _Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Namespace(msgspec.Struct):
    name: str
    tools: list[dict[str, Any]]
    description: str | None = None


@dataclasses.dataclass
class Tools:
    """A request's tools.

    Args:
      functions: the functions for the prompt; those of a namespace have its name before theirs.
      places: the field of the request of each function.
      shown: all tools, as a response has them.
      namespaced: the namespace and the name of each function of a namespace, by its name in the prompt.
    """

    functions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)
    shown: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    namespaced: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def called(self, name: str) -> dict[str, str]:
        """The fields of a call that name the function with this name in the prompt."""
        if name in self.namespaced:
            namespace, own = self.namespaced[name]
            return {"name": own, "namespace": namespace}
        return {"name": name}


def joined_name(namespace: str | None, name: str) -> str:
    """The name in the prompt of a function, which may be one of a namespace."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def read_tools(given: list[dict[str, Any]] | None, server: Server) -> Tools:
    """The tools of a request. Those that no model here can use are only shown. Raises ApiError."""
    tools = Tools()
    for index, tool in enumerate(given or ()):
        where = f"tools[{index}]"
        match tool.get("type"):
            case "function":
                tools.shown.append(_add(tools, where, tool))
            case "namespace":
                tools.shown.append(_add_namespace(tools, where, tool, server))
            case str(kind):
                server.note_once(f"tools: {kind:.60}", "is not available, so the model does not see it")
                tools.shown.append(tool)
            case kind:
                raise bad_request(
                    f"{where}.type: expected the type of a tool, found {kind!r:.60}", f"{where}.type"
                )
    return tools


def _add(tools: Tools, where: str, tool: Mapping[str, Any], namespace: str | None = None) -> dict[str, Any]:
    """Add a function; it as a response has it."""
    function = convert(tool, _Function, where)
    name = joined_name(namespace, function.name)
    if namespace is not None:
        tools.namespaced[name] = namespace, function.name
    kept = {"name": name, "description": function.description, "parameters": function.parameters}
    tools.functions.append({"type": "function", **kept, "strict": bool(function.strict)})
    tools.places.append(where)
    return {"description": None, "parameters": None, **tool, "strict": bool(function.strict)}


def _add_namespace(tools: Tools, where: str, tool: Mapping[str, Any], server: Server) -> dict[str, Any]:
    namespace = convert(tool, _Namespace, where)
    shown = []
    for index, inner in enumerate(namespace.tools):
        if inner.get("type") == "function":
            shown.append(_add(tools, f"{where}.tools[{index}]", inner, namespace.name))
        else:
            server.note_once("tools: namespace", "only its functions are available to the model")
            shown.append(inner)
    return {"description": "", **tool, "tools": shown}


def read_choice(choice: str | Mapping[str, Any] | None, tools: Tools) -> str | dict[str, Any]:
    """The choice with the names of the prompt.

    Raises ApiError for one that names no function, or that requires one where there is none.
    """
    if choice is None or isinstance(choice, str):
        if choice is not None and choice not in _CHOICES:
            raise bad_request(f"tool_choice: expected {', '.join(_CHOICES)}, found {choice!r:.60}", "tool_choice")
        if choice == "required" and not tools.functions:
            raise bad_request("tool_choice: 'required' needs a function among the tools", "tool_choice")
        return choice or "auto"
    match choice.get("type"):
        case "function":
            return {"type": "function", "name": _named(choice, "tool_choice", tools)}
        case "allowed_tools":
            return _read_allowed(choice, tools)
        case kind:
            raise bad_request(f"tool_choice: there is no tool of type {kind!r:.60} to call", "tool_choice")


def _read_allowed(choice: Mapping[str, Any], tools: Tools) -> dict[str, Any]:
    mode, given = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required"):
        where = "tool_choice.mode"
        raise bad_request(f"{where}: expected auto or required, found {mode!r:.60}", where)
    if not isinstance(given, list) or not given:
        raise bad_request("tool_choice.tools: expected a list that is not empty", "tool_choice.tools")
    names = [_named(tool, f"tool_choice.tools[{index}]", tools) for index, tool in enumerate(given)]
    return {
        "type": "allowed_tools",
        "mode": mode,
        "tools": [{"type": "function", "name": name} for name in names],
    }


def _named(value: Any, where: str, tools: Tools) -> str:
    """The name in the prompt of the function that {"type": "function", "name": ...} refers to."""
    if not isinstance(value, Mapping) or value.get("type") != "function":
        kind = value.get("type") if isinstance(value, Mapping) else value
        raise bad_request(f"{where}: there is no tool of type {kind!r:.60} to call", where)
    name, namespace = value.get("name"), value.get("namespace")
    known = [function["name"] for function in tools.functions]
    if isinstance(name, str):
        own = [one for one, pair in tools.namespaced.items() if namespace in (None, pair[0]) and pair[1] == name]
        found = [name] if name in known and namespace is None else own
        if len(found) == 1:
            return found[0]
    raise bad_request(f"{where}: no function among the tools is named {name!r:.60}", where)
