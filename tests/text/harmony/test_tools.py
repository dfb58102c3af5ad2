"""Tools in the formats of several APIs, and as Python functions."""

import collections.abc
import dataclasses
import enum
import functools
import re
import typing
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    Required,
    TypedDict,
    TypeVar,
)

import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.text import harmony
from gptoss_jax.text.harmony import FunctionTool, function_tools

SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
SAME = FunctionTool("f", "d", SCHEMA)
NAMED = {"name": "f", "description": "d"}


# From the documentation of each API, in the latest version known in 2025.
@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": NAMED | {"parameters": SCHEMA, "strict": True}},
        {"type": "function", "function": NAMED | {"parameters": SCHEMA, "return": {"type": "number"}}},
        {"type": "function", "function": NAMED | {"parameters": SCHEMA}, "cache_control": {"type": "ephemeral"}},
        {"type": "function", "strict": None, "defer_loading": True} | NAMED | {"parameters": SCHEMA},
        {"type": "function", "function": None} | NAMED | {"parameters": SCHEMA},
        NAMED | {"parameters": SCHEMA},
        NAMED | {"input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
        NAMED | {"input_schema": SCHEMA, "type": "custom", "input_examples": [{"x": "a"}]},
        NAMED
        | {"inputSchema": SCHEMA, "outputSchema": {"type": "object"}, "title": "F", "_meta": {"a": 1}}
        | {"annotations": {"readOnlyHint": True}, "icons": [], "execution": {"taskSupport": "forbidden"}},
        NAMED | {"inputSchema": SCHEMA, "parameters": None, "input_schema": None, "arguments": None},
    ],
)
def test_tools_in_the_formats_of_several_apis(tool: dict) -> None:
    assert function_tools([tool]) == (SAME,)


@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        *(
            (NAMED | {key: SCHEMA}, f"tools[0].{key}: unknown field, expected name, description and parameters")
            for key in (
                "arguments",
                "parameter",
                "params",
                "Parameters",
                "schema",
                "required",
                "parametersJsonSchema",
            )
        ),
        ({"function": NAMED | {"args": SCHEMA}}, "tools[0].function.args: unknown field"),
        *(
            (
                {"type": "function", "function": NAMED, key: SCHEMA},
                f"tools[0].{key}: expected in tools[0].function, found beside it",
            )
            for key in ("parameters", "inputSchema", "input_schema", "description", "name")
        ),
        ({"function": NAMED, "arguments": SCHEMA}, "tools[0].arguments: unknown field"),
        (NAMED | {"parameters": SCHEMA, "inputSchema": SCHEMA}, "found parameters and inputSchema"),
        (NAMED | {"inputSchema": SCHEMA, "input_schema": SCHEMA}, "found inputSchema and input_schema"),
        (
            {"function": NAMED | {"parameters": SCHEMA, "input_schema": SCHEMA}},
            "found parameters and input_schema",
        ),
        (NAMED | {"inputSchema": "x"}, "tools[0].inputSchema: expected a JSON schema, found str"),
        (NAMED | {"input_schema": {"required": 1}}, "tools[0].input_schema.required: expected a list, found int"),
        (NAMED | {"type": "custom"}, "tools[0].type: expected 'function', found 'custom'"),
        ({"type": "web_search_20250305", "name": "web_search"}, "tools[0].type: expected 'function'"),
        (NAMED | {"parameters": SCHEMA | {"default": {1}}}, "tools[0].parameters.default: expected what JSON can"),
        (NAMED | {"parameters": {"default": float("nan")}}, "tools[0].parameters.default: expected what JSON can"),
    ],
)
def test_unknown_field_is_rejected_by_name(tool: dict, expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)) as caught:
        function_tools([tool])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parameters", [True, False, {}, {"properties": None}, {"$ref": "#/$defs/a", "$defs": {}}])
def test_any_schema_is_kept_unchanged(parameters: Any) -> None:
    assert function_tools([{"name": "f", "parameters": parameters}]) == (FunctionTool("f", "", parameters),)


def test_a_schema_becomes_plain_json() -> None:
    class Size(enum.StrEnum):
        BIG = "big"

    [tool] = function_tools(
        [
            {
                "name": "f",
                "parameters": collections.OrderedDict(required=("x",), properties={"x": {"default": Size.BIG}}),
            }
        ]
    )
    assert tool.parameters == {"required": ["x"], "properties": {"x": {"default": "big"}}}
    assert type(tool.parameters["properties"]["x"]["default"]) is str


def taking(hint: Any) -> Any:
    def f(x):  # type: ignore[no-untyped-def]
        ...

    f.__annotations__ = {"x": hint}
    return f


class Point(TypedDict):
    lat: float
    name: NotRequired[Annotated[str, "What people say"]]


class Loose(Point, total=False):
    near: Required[list[Point]]
    far: "str | None"


class Tree(TypedDict):
    children: "list[Tree]"


@dataclasses.dataclass
class Data:
    x: int


class Pair(NamedTuple):
    x: int


class Colour(enum.StrEnum):
    RED = "red"


type Alias = list[int]
type Endless = list[Endless]
City = NewType("City", str)
T = TypeVar("T")
STRING, INTEGER = {"type": "string"}, {"type": "integer"}
POINT = {
    "type": "object",
    "properties": {"lat": {"type": "number"}, "name": {"type": "string", "description": "What people say"}},
    "required": ["lat"],
}


def array(items: dict) -> dict:
    return {"type": "array", "items": items}


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (object, {}),
        ("int", INTEGER),
        (list, array({})),
        (list[int], array(INTEGER)),
        (list["str"], array(STRING)),
        (list[list[str]], array(array(STRING))),
        (typing.List, array({})),  # noqa: UP006
        (collections.abc.Sequence, array({})),
        (collections.abc.Iterable[str], array(STRING)),
        (tuple, array({})),
        (typing.Tuple, array({})),  # noqa: UP006
        (tuple[int, ...], array(INTEGER)),
        (tuple[tuple[str, ...], ...], array(array(STRING))),
        (dict, {"type": "object"}),
        (typing.Dict, {"type": "object"}),  # noqa: UP006
        (dict[str, Any], {"type": "object"}),
        (dict[City, int], {"type": "object", "additionalProperties": INTEGER}),
        (dict[str, list[int]], {"type": "object", "additionalProperties": array(INTEGER)}),
        (collections.abc.Mapping[str, int], {"type": "object", "additionalProperties": INTEGER}),
        (Optional[int], INTEGER | {"nullable": True}),  # noqa: UP045
        (int | None, INTEGER | {"nullable": True}),
        ("int | None", INTEGER | {"nullable": True}),
        (int | list[str], {"oneOf": [INTEGER, array(STRING)]}),
        (Literal["a", "b"], STRING | {"enum": ["a", "b"]}),
        (Literal["a", None], STRING | {"enum": ["a"], "nullable": True}),
        (Annotated[int, "How many", 5], INTEGER | {"description": "How many"}),
        (list[Annotated[int, []]], array(INTEGER)),
        (Annotated[int | None, {}], INTEGER | {"nullable": True}),
        (City, STRING),
        (Alias, array(INTEGER)),
        (Point, POINT),
        (
            Loose,
            POINT
            | {"properties": POINT["properties"] | {"near": array(POINT), "far": STRING | {"nullable": True}}}
            | {"required": ["lat", "near"]},
        ),
    ],
    ids=repr,
)
def test_schema_of_a_type_hint(hint: Any, schema: dict) -> None:
    parameters = harmony.from_function(taking(hint)).parameters
    assert parameters == {"type": "object", "properties": {"x": schema}, "required": ["x"]}


@pytest.mark.parametrize(
    "hint",
    [
        *(
            tuple[int, str],
            tuple[int, int],
            tuple[int],
            tuple[()],
            tuple[int, *tuple[str, ...]],
            list[tuple[int, str]],
        ),
        *(dict[int, str], dict[str, tuple[int, str]], dict[Literal["a"], int], dict[str, bytes]),
        *(set, set[int], frozenset[str], bytes, bytearray, complex, None, type, type[int]),
        *(Literal[1, 2], Literal["a", 1], Literal[True], Literal[None], Literal[Colour.RED], Literal[b"a"]),
        *(Colour, Data, Pair, Tree, Endless, T, list[T], int | bytes, collections.abc.Callable[[int], str]),
        *(
            "Nowhere",
            "list[Nowhere]",
            "int | Nowhere",
            "not a type",
            "1 / 0",
            "typing.Nothing",
            5,
            [int],
            {"a": 1},
        ),
    ],
    ids=repr,
)
def test_type_hint_without_a_schema_is_rejected(hint: Any) -> None:
    with pytest.raises(UsageError, match=r"^tools\[0\] \(f\): argument x: ") as caught:
        function_tools([taking(hint)])
    assert "\n" not in str(caught.value)


def test_arguments_and_defaults() -> None:
    def f(a: int, b: tuple[str, ...] = ("x", "y"), *, c: "float", d: Colour | str = Colour.RED) -> "Nowhere": ...  # type: ignore[name-defined] # noqa: F821

    f.__annotations__["d"] = str
    assert harmony.from_function(f).parameters == {
        "type": "object",
        "properties": {
            "a": INTEGER,
            "b": array(STRING) | {"default": ["x", "y"]},
            "c": {"type": "number"},
            "d": STRING | {"default": "red"},
        },
        "required": ["a", "c"],
    }


def test_methods_and_wrapped_functions() -> None:
    class Service:
        def ask(self, x: "City") -> None: ...

    @functools.wraps(Service.ask)
    def wrapped(*args: object, **more: object) -> None: ...

    assert harmony.from_function(Service().ask).parameters["properties"] == {"x": STRING}
    with pytest.raises(UsageError, match=r"\(ask\): argument self: expected a type hint"):
        harmony.from_function(wrapped)


def positional(x: int, /) -> None: ...


def several(*x: int) -> None: ...


def keywords(**x: int) -> None: ...


def unbounded(x: float = float("inf")) -> None: ...


def binary(x: str | None = b"") -> None: ...  # type: ignore[assignment]


@pytest.mark.parametrize("function", [positional, several, keywords, unbounded, binary])
def test_argument_that_cannot_be_passed_by_name_is_rejected(function: Any) -> None:
    with pytest.raises(UsageError, match=rf"^tools\[0\] \({function.__name__}\).*\bx\b") as caught:
        function_tools([function])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [Data, int, functools.partial(positional), max, print, lambda: None, 5, None])
def test_non_function_is_rejected(function: Any) -> None:
    with pytest.raises(UsageError, match=r"^tools\[0\]") as caught:
        function_tools([function])
    assert "\n" not in str(caught.value)
