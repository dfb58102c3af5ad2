"""Tools: from OpenAI's JSON form or Python functions to the namespaces that harmony shows the model."""

import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gptoss_jax.errors import UsageError
from gptoss_jax.text.harmony.messages import FunctionTool, ToolNamespace
from gptoss_jax.text.harmony.typescript import render_type, to_json

Tool = Mapping[str, Any] | Callable[..., Any]
"""A function tool as a caller gives it: OpenAI's JSON form, or a Python function with type hints."""

_NAME = re.compile(r"[\w.-]+")
_NUMBER: dict[str, Any] = {"type": "number", "default": -1}

BROWSER = ToolNamespace(
    "browser",
    "Tool for browsing.\n"
    "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
    "Cite information from the tool using the following format:\n"
    "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
    "Do not quote more than 10 words directly from the tool output.\n"
    "sources=web (default: web)",
    (
        FunctionTool(
            "search",
            "Searches for information related to `query` and displays `topn` results.",
            {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "topn": {"type": "number", "default": 10},
                    "source": {"type": "string"},
                },
                "required": ["query"],
            },
        ),
        FunctionTool(
            "open",
            "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing "
            "`num_lines` lines.\n"
            "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
            "If `cursor` is not provided, the most recent page is implied.\n"
            "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
            "If `loc` is not provided, the viewport will be positioned at the beginning of the document or "
            "centered on the most relevant passage, if available.\n"
            "Use this function without `id` to scroll to a new location of an opened page.",
            {
                "type": "object",
                "properties": {
                    "id": {"type": ["number", "string"], "default": -1},
                    "cursor": _NUMBER,
                    "loc": _NUMBER,
                    "num_lines": _NUMBER,
                    "view_source": {"type": "boolean", "default": False},
                    "source": {"type": "string"},
                },
            },
        ),
        FunctionTool(
            "find",
            "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
            {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "cursor": _NUMBER},
                "required": ["pattern"],
            },
        ),
    ),
)

PYTHON = ToolNamespace(
    "python",
    "Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. "
    "This tool should be used for internal reasoning, but not for code that is intended to be visible to the "
    "user (e.g. when creating plots, tables, or files).\n\n"
    "When you send a message containing Python code to python, it will be executed in a stateful Jupyter "
    "notebook environment. python will respond with the output of the execution or time out after 120.0 "
    "seconds. The drive at '/mnt/data' can be used to save and persist user files. Internet access for this "
    "session is UNKNOWN. Depends on the cluster.",
)

BUILTIN_TOOLS = {"browser": BROWSER, "python": PYTHON}
"""The tools that gpt-oss was trained with; their words are part of the format."""


def render_tools(namespaces: Iterable[ToolNamespace]) -> str:
    """The "# Tools" section, namespaces in the order of their names."""
    sections = ["# Tools"]
    for namespace in sorted(namespaces, key=lambda namespace: namespace.name):
        mark = "// " if namespace.functions else ""
        lines = [f"## {namespace.name}\n"]
        lines += [mark + line for line in _lines(namespace.description or "")]
        if namespace.functions:
            lines.append(f"namespace {namespace.name} {{\n")
            for function in namespace.functions:
                lines += [f"// {line}" for line in _lines(function.description)]
                argument = "" if function.parameters is None else f"_: {render_type(function.parameters)}"
                lines.append(f"type {function.name} = ({argument}) => any;\n")
            lines.append(f"}} // namespace {namespace.name}")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _lines(text: str) -> list[str]:
    *lines, last = text.split("\n")
    return [line.removesuffix("\r") for line in lines] + ([last] if last else [])


def function_tools(tools: Sequence[Tool]) -> tuple[FunctionTool, ...]:
    """Function tools from OpenAI's form ({"type": "function", "function": {...}}), its inner object, or
    functions.

    Raises UsageError naming the tool's index and the field.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise UsageError(f"tools: expected a list, found {type(tools).__name__}")
    read = [
        _from_json(f"tools[{index}]", tool)
        if isinstance(tool, Mapping)
        else from_function(tool, f"tools[{index}]")
        for index, tool in enumerate(tools)
    ]
    names = [tool.name for tool in read]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UsageError(f"tools[{index}].name: {name!r} is already the name of another tool")
    return tuple(read)


def _from_json(where: str, tool: Mapping[str, Any]) -> FunctionTool:
    if tool.get("type", "function") != "function":
        raise UsageError(f"{where}.type: expected 'function', found {tool['type']!r}")
    if "function" in tool:
        where, tool = f"{where}.function", tool["function"]
        if not isinstance(tool, Mapping):
            raise UsageError(f"{where}: expected an object, found {type(tool).__name__}")
    return function_tool(where, tool)


def function_tool(where: str, tool: Mapping[str, Any]) -> FunctionTool:
    """A tool from {"name", "description", "parameters"}; raises UsageError for a field of another type."""
    name, description, parameters = tool.get("name"), tool.get("description"), tool.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{where}.name: expected letters, digits, '_', '-' and '.', found {name!r}")
    if description is not None and not isinstance(description, str):
        raise UsageError(f"{where}.description: expected a string, found {type(description).__name__}")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise UsageError(f"{where}.parameters: expected a JSON schema object, found {type(parameters).__name__}")
    if parameters is not None:
        _check_schema(f"{where}.parameters", parameters)
    return FunctionTool(name, description or "", parameters)


def _check_schema(where: str, schema: Any, depth: int = 0) -> None:
    """Refuses what would be written wrongly: a part of a schema that is not an object, or one nested
    without end.
    """
    if not isinstance(schema, Mapping):
        raise UsageError(f"{where}: expected a JSON schema object, found {type(schema).__name__}")
    if depth > 64:
        raise UsageError(f"{where}: expected at most 64 levels of nesting")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise UsageError(f"{where}.properties: expected an object, found {type(properties).__name__}")
    for key, value in properties.items():
        _check_schema(f"{where}.properties.{key}", value, depth + 1)
    if not isinstance(schema.get("required", []), list):
        raise UsageError(f"{where}.required: expected a list, found {type(schema['required']).__name__}")
    try:
        to_json([schema.get("default"), schema.get("enum")])
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f"{where}: expected a default and an enum that JSON can hold") from None
    if "items" in schema:
        _check_schema(f"{where}.items", schema["items"], depth + 1)
    variants = schema.get("oneOf", [])
    if not isinstance(variants, list):
        raise UsageError(f"{where}.oneOf: expected a list, found {type(variants).__name__}")
    for index, value in enumerate(variants):
        _check_schema(f"{where}.oneOf[{index}]", value, depth + 1)


def from_function(function: Callable[..., Any], where: str = "tool") -> FunctionTool:
    """A tool from a Python function: its name, the first paragraphs of its docstring, and its arguments.

    Types come from the hints, and an argument's description from a Google-style "Args:" section. Raises
    UsageError for something that is no function, an argument without a hint or with a hint that JSON has no
    type for, and for *args and **kwargs.
    """
    if not callable(function) or not hasattr(function, "__name__"):
        raise UsageError(f"{where}: expected a tool object or a function, found {type(function).__name__}")
    where = f"{where} ({function.__name__})"
    description, arguments = _docstring(function)
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise UsageError(f"{where}: {error}") from None
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UsageError(f"{where}: argument {name}: a tool cannot take *args or **kwargs")
        if name not in hints:
            raise UsageError(f"{where}: argument {name}: expected a type hint, found none")
        schema = _schema(f"{where}: argument {name}", hints[name])
        if name in arguments:
            schema["description"] = arguments[name]
        if parameter.default is parameter.empty:
            required.append(name)
        elif parameter.default is not None:
            schema["default"] = parameter.default
        properties[name] = schema
    parameters = {"type": "object", "properties": properties, "required": required} if properties else None
    return function_tool(where, {"name": function.__name__, "description": description, "parameters": parameters})


_SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _schema(where: str, hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if origin is Literal and all(isinstance(value, str) for value in arguments):
        return {"type": "string", "enum": list(arguments)}
    if hint in (list, tuple) or origin in (list, tuple, Sequence):
        element = arguments[0] if arguments else Any
        return {"type": "array", "items": _schema(where, element)}
    if hint is dict or origin in (dict, Mapping):
        return {"type": "object"}
    if origin in (Union, types.UnionType):
        variants = [_schema(where, argument) for argument in arguments if argument is not type(None)]
        nullable = {"nullable": True} if type(None) in arguments else {}
        return (variants[0] if len(variants) == 1 else {"oneOf": variants}) | nullable
    raise UsageError(f"{where}: expected a type that JSON has, found {hint!r}")


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    text, _, rest = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    text = re.split(r"\n(?:Returns|Raises|Yields):\n", text)[0]
    arguments: dict[str, str] = {}
    name, indent = "", -1
    for line in rest.split("\n"):
        if line and not line[0].isspace():
            break
        found = re.match(r"\s+(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line)
        if found and indent in (-1, line.index(found[1])):
            name, indent = found[1], line.index(found[1])
            arguments[name] = found[2]
        elif name and line.strip():
            arguments[name] = f"{arguments[name]} {line.strip()}"
    return text.strip(), arguments
