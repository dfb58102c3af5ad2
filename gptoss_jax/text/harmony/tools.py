"""Converts tools, given as JSON objects or Python functions, to the namespaces that harmony shows to the model."""

import inspect
import json
import re
import types
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from types import NoneType
from typing import (
    Annotated,
    Any,
    Literal,
    NewType,
    NotRequired,
    Required,
    TypeAliasType,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from gptoss_jax.errors import UsageError
from gptoss_jax.text.harmony.messages import FunctionTool, ToolNamespace
from gptoss_jax.text.harmony.typescript import render_type

Tool = Mapping[str, Any] | Callable[..., Any]
"""A function tool as a caller gives it: OpenAI's, MCP's or Anthropic's JSON, or a Python function with type hints."""

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
"""The tools that gpt-oss was trained with; their descriptions are part of the format."""


def render_tools(namespaces: Iterable[ToolNamespace]) -> str:
    """The "# Tools" section, with the namespaces sorted by name."""
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
    """Function tools from JSON objects or Python functions.

    An object is OpenAI's {"type": "function", "function": {...}} or its inner object, in which the schema may also be
    named `inputSchema` (MCP) or `input_schema` (Anthropic). Raises UsageError naming the tool's index and the field,
    also for an unknown field.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise UsageError(f"expected a list, found {type(tools).__name__}", "tools")
    read = [
        _from_json(f"tools[{index}]", tool)
        if isinstance(tool, Mapping)
        else from_function(tool, f"tools[{index}]")
        for index, tool in enumerate(tools)
    ]
    names = [tool.name for tool in read]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UsageError(f"{name!r} is already the name of another tool", f"tools[{index}].name")
    return tuple(read)


_PARAMETERS = ("parameters", "inputSchema", "input_schema")
"""Names of a function's schema in the APIs of OpenAI, MCP and Anthropic."""

_FIELDS = ("name", "description", *_PARAMETERS)

_NOT_SHOWN = {
    *("type", "strict", "defer_loading", "return"),  # OpenAI's, and the type of the result in transformers
    *("title", "outputSchema", "annotations", "icons", "execution", "meta", "_meta"),  # MCP's
    *("cache_control", "allowed_callers", "input_examples", "eager_input_streaming"),  # Anthropic's
}
"""Fields of a tool that harmony does not render; only `strict` affects a call."""


def _from_json(where: str, tool: Mapping[str, Any]) -> FunctionTool:
    inner = tool.get("function")
    if inner is None:
        return function_tool(where, tool)
    _check_type(where, tool)
    if not isinstance(inner, Mapping):
        raise UsageError(f"expected an object, found {type(inner).__name__}", f"{where}.function")
    for key in _given(tool, besides=("function",)):
        expected = f"expected in {where}.function, found beside it" if key in _FIELDS else "unknown field"
        raise UsageError(f"{expected}", f"{where}.{key}")
    if inner.get("strict") is None and tool.get("strict") is not None:
        inner = {**inner, "strict": tool["strict"]}
    return function_tool(f"{where}.function", inner)


def function_tool(where: str, tool: Mapping[str, Any]) -> FunctionTool:
    """A tool from {"name", "description", "parameters"}, the last also called inputSchema or input_schema.

    Raises UsageError for a field that is unknown or of another type, and for a schema that is none.
    """
    _check_type(where, tool)
    name, description = tool.get("name"), tool.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"expected letters, digits, '_', '-' and '.', found {name!r}", f"{where}.name")
    if name.startswith("functions."):
        # Calls are written to functions.NAME and read without it.
        raise UsageError(
            f"expected a name without 'functions.', which is harmony's prefix, found {name!r}", f"{where}.name"
        )
    if description is not None and not isinstance(description, str):
        raise UsageError(f"expected a string, found {type(description).__name__}", f"{where}.description")
    strict = tool.get("strict")
    if not isinstance(strict, bool | None):
        raise UsageError(f"expected true or false, found {strict!r:.60}", f"{where}.strict")
    for key in _given(tool, besides=_FIELDS):
        raise UsageError(
            f"unknown field, expected name, description and {' or '.join(_PARAMETERS)}", f"{where}.{key}"
        )
    given = [key for key in _PARAMETERS if tool.get(key) is not None]
    if len(given) > 1:
        raise UsageError(f"expected one of {', '.join(_PARAMETERS)}, found {' and '.join(given)}", where)
    parameters = None
    for key in given:
        parameters = plain_json(f"{where}.{key}", tool[key])
        _check_schema(f"{where}.{key}", parameters)
    return FunctionTool(name, description or "", parameters, bool(strict))


def _check_type(where: str, tool: Mapping[str, Any]) -> None:
    kind = tool.get("type")
    # Anthropic's "custom" is a function with a schema; OpenAI's takes free text, which harmony has for python alone.
    if kind not in (None, "function") and not (kind == "custom" and tool.get("input_schema") is not None):
        raise UsageError(f"expected 'function', found {kind!r}", f"{where}.type")


def _given(tool: Mapping[str, Any], besides: Iterable[str]) -> list[str]:
    """The fields that have a value and are not among those that may be passed over."""
    return [key for key, value in tool.items() if value is not None and key not in {*besides, *_NOT_SHOWN}]


def plain_json(where: str, value: Any, depth: int = 0) -> Any:
    """JSON in Python's own types, as json.loads gives it. Raises UsageError for what JSON cannot hold."""
    if depth > _NESTING:
        raise UsageError(f"expected at most {_NESTING} levels of nesting", f"{where[:120]}...")
    if isinstance(value, Mapping):
        return {str(key): plain_json(f"{where}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(f"{where}[{index}]", item, depth + 1) for index, item in enumerate(value)]
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise UsageError(f"expected what JSON can hold, found {type(value).__name__}", where) from None


_NESTING = 128
"""Levels of lists and objects in a schema; openai-harmony reads 117."""


def _check_schema(where: str, schema: Any) -> None:
    """Refuses what no draft of JSON Schema allows, where it would be written wrongly; null is as good as absent."""
    if schema is None or isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UsageError(f"expected a JSON schema, found {type(schema).__name__}", where)
    for key, kind, expected in (
        ("properties", dict, "an object"),
        ("required", list | bool, "a list"),  # a boolean in the drafts before 4
        ("oneOf", list, "a list"),
        ("items", dict | list | bool, "a JSON schema"),
    ):
        value = schema.get(key)
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"expected {expected}, found {type(value).__name__}", f"{where}.{key}")
    for name, value in (schema.get("properties") or {}).items():
        _check_schema(f"{where}.properties.{name}", value)
    for index, value in enumerate(schema.get("oneOf") or []):
        _check_schema(f"{where}.oneOf[{index}]", value)
    if isinstance(schema.get("items"), dict):
        _check_schema(f"{where}.items", schema["items"])


def from_function(function: Callable[..., Any], where: str = "tool") -> FunctionTool:
    """A tool from a Python function: its name, the first paragraphs of its docstring, and its arguments.

    An argument's type comes from its hint, its description from a Google-style "Args:" section or else from the text of
    an Annotated hint. Raises UsageError if it is not a function, if an argument has no hint or one that has no type in
    harmony, and for arguments that cannot be passed by name.
    """
    if isinstance(function, type) or not callable(function) or not hasattr(function, "__name__"):
        raise UsageError(f"expected a tool object or a function, found {type(function).__name__}", where)
    where = f"{where} ({function.__name__})"
    description, arguments = _docstring(function)
    signature = _evaluated(f"{where}: signature", lambda: inspect.signature(function))
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in signature.parameters.items():
        here = f"{where}: argument {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(f"expected one that is passed by name, found {parameter.kind.description}", here)
        if parameter.annotation is parameter.empty:
            raise UsageError("expected a type hint, found none", here)
        schema = _schema(here, _hint(here, function, parameter.annotation))
        if arguments.get(name):
            schema["description"] = arguments[name]
        if parameter.default is parameter.empty:
            required.append(name)
        elif parameter.default is not None:
            schema["default"] = parameter.default
        properties[name] = schema
    parameters = {"type": "object", "properties": properties, "required": required} if properties else None
    return function_tool(where, {"name": function.__name__, "description": description, "parameters": parameters})


def _hint(where: str, function: Callable[..., Any], annotation: Any) -> Any:
    """An argument's type hint, with quoted names resolved in the function's module."""

    def one() -> None: ...

    one.__annotations__ = {"hint": annotation}
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    return _evaluated(where, lambda: get_type_hints(one, scope, include_extras=True)["hint"])


def _evaluated(where: str, evaluate: Callable[[], Any]) -> Any:
    try:
        return evaluate()
    except Exception as error:  # evaluating a hint can raise any exception
        raise UsageError(f"{' '.join(str(error).split())}", where) from None


_SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_LISTS = (list, Sequence, MutableSequence, Collection, Iterable)
_OBJECTS = (dict, Mapping, MutableMapping)


def _schema(where: str, hint: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The JSON schema of a type hint; `within` holds the named types that enclose it."""
    if any(hint is outer for outer in within):
        raise UsageError(f"expected a type that does not contain itself, found {hint!r}", where)
    origin, arguments = get_origin(hint), get_args(hint)
    kind = origin if isinstance(origin, type) else hint if isinstance(hint, type) else None
    if hint is Any or hint is object:
        return {}
    if origin is Annotated:
        notes = [note for note in arguments[1:] if isinstance(note, str)]
        return _schema(where, arguments[0], within) | ({"description": notes[0]} if notes else {})
    if origin in (Required, NotRequired):
        return _schema(where, arguments[0], within)
    if isinstance(hint, NewType):
        return _schema(where, hint.__supertype__, within)
    if isinstance(hint, TypeAliasType):
        return _schema(where, _evaluated(where, lambda: hint.__value__), (*within, hint))
    if is_typeddict(hint):
        return _typed_dict(where, hint, (*within, hint))
    if origin is Literal:
        return _literal(where, hint)
    if origin in (Union, types.UnionType):
        return _union(where, arguments, within)
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if kind in _LISTS:
        return {"type": "array", "items": _schema(where, arguments[0] if arguments else Any, within)}
    if kind is tuple:
        return {"type": "array", "items": _schema(where, _element(where, hint), within)}
    if kind in _OBJECTS:
        return _object(where, hint, within)
    raise UsageError(f"expected a type that JSON has, found {' '.join(repr(hint).split())}", where)


def _element(where: str, hint: Any) -> Any:
    """The type of a tuple's elements."""
    arguments = getattr(hint, "__args__", (Any, ...))
    if len(arguments) != 2 or arguments[1] is not ...:
        raise UsageError(
            f"expected a list or tuple[X, ...], whose elements are of one type, found {hint!r}", where
        )
    return arguments[0]


def _object(where: str, hint: Any, within: tuple[Any, ...]) -> dict[str, Any]:
    key, value = get_args(hint) or (str, Any)
    if key is not Any and _schema(where, key, within) != {"type": "string"}:
        raise UsageError(f"expected an object with strings as keys, found {hint!r}", where)
    values = _schema(where, value, within)
    return {"type": "object"} | ({"additionalProperties": values} if values else {})


def _typed_dict(where: str, hint: Any, within: tuple[Any, ...]) -> dict[str, Any]:
    fields = _evaluated(where, lambda: get_type_hints(hint, include_extras=True))
    properties = {name: _schema(f"{where}: {name}", field, within) for name, field in fields.items()}
    required = [name for name, field in fields.items() if _is_required(hint, name, field)]
    return {"type": "object", "properties": properties, "required": required}


def _is_required(hint: Any, name: str, field: Any) -> bool:
    # If annotations are strings, `__required_keys__` reflects `total` only.
    origin = get_origin(field)
    return origin is Required or (origin is not NotRequired and name in hint.__required_keys__)


def _literal(where: str, hint: Any) -> dict[str, Any]:
    """Harmony renders only string values of an enum, besides null."""
    values = [value for value in get_args(hint) if value is not None]
    if not values or not all(type(value) is str for value in values):
        raise UsageError(f"expected a Literal of strings, found {hint!r}", where)
    return {"type": "string", "enum": values} | ({"nullable": True} if None in get_args(hint) else {})


def _union(where: str, members: tuple[Any, ...], within: tuple[Any, ...]) -> dict[str, Any]:
    variants = [_schema(where, member, within) for member in members if member is not NoneType]
    nullable = {"nullable": True} if NoneType in members else {}
    return (variants[0] if len(variants) == 1 else {"oneOf": variants}) | nullable


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
