import itertools
import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.errors import UsageError
from gptoss_jax.text import harmony
from gptoss_jax.text.harmony.tools import BUILTIN_TOOLS, render_tools
from gptoss_jax.text.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Gets the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}},
            "required": ["city"],
        },
    },
}
SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}


def text_of(messages: list[dict[str, Any]], tokenizer: Tokenizer, **options: Any) -> str:
    return tokenizer.decode(harmony.render(messages, tokenizer, **options))


def body_of(messages: list[dict[str, Any]], tokenizer: Tokenizer, **options: Any) -> str:
    head, _, body = text_of(messages, tokenizer, **options).partition("<|end|>")
    assert head.startswith("<|start|>system")
    return body.removesuffix("<|start|>assistant")


def test_system_message_options(small: Tokenizer) -> None:
    assert text_of([], small) == f"{SYSTEM}<|end|><|start|>assistant"
    text = text_of(
        [],
        small,
        reasoning_effort="high",
        model_identity="You are Bob.",
        current_date="2025-06-28",
        builtin_tools=["python", "browser"],
        next_role=None,
    )
    start = "<|start|>system<|message|>You are Bob.\nKnowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\n"
    tools = render_tools(BUILTIN_TOOLS.values())
    assert text.startswith(f"{start}Reasoning: high\n\n{tools}\n\n# Valid channels")
    assert tools.index("## browser") < tools.index("## python")


def test_instructions_tools_and_response_format(small: Tokenizer) -> None:
    schema = {"properties": {"items": {"type": "array", "description": "é"}}, "type": "object"}
    text = text_of(
        [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Rhyme."}],
        small,
        tools=[WEATHER],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "list", "description": "Two\nlines", "schema": schema},
        },
    )
    assert text == (
        f"{SYSTEM}\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\nRhyme.\n\n# Tools\n\n## functions\n\n"
        "namespace functions {\n\n// Gets the weather.\n"
        "type get_weather = (_: {\n// Where\ncity: string,\n}) => any;\n\n"
        "} // namespace functions\n\n# Response Formats\n\n## list\n\n// Two\n// lines\n"
        '{"properties":{"items":{"type":"array","description":"é"}},"type":"object"}<|end|><|start|>assistant'
    )


def test_tool_calls_and_results(small: Tokenizer) -> None:
    conversation = [
        {"role": "user", "content": "Weather?", "name": "bob"},
        {"role": "assistant", "thinking": "Call.", "content": "One moment.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"t": -3}'},
    ]
    called = (
        "<|start|>user:bob<|message|>Weather?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Call.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"
        '{"city": "Oslo"}<|call|>'
        '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>{"t": -3}<|end|>'
    )
    assert body_of(conversation, small) == called
    by_name = [*conversation[:2], {"role": "tool", "name": "get_weather", "content": '{"t": -3}'}]
    assert body_of(by_name, small) == called
    in_order = [*conversation[:2], {"role": "tool", "content": [{"type": "text", "text": '{"t": -3}'}]}]
    assert body_of(in_order, small) == called
    as_object = {"function": {"name": "get_weather", "arguments": {"city": "Ås", "n": 1}}}
    body = body_of([{"role": "assistant", "content": None, "tool_calls": [as_object]}], small)
    assert '<|message|>{"city":"Ås","n":1}<|call|>' in body


@pytest.mark.parametrize(("phase", "channel"), [("commentary", "commentary"), ("final_answer", "final")])
def test_a_phase_is_the_channel_of_a_message(phase: str, channel: str, small: Tokenizer) -> None:
    message = {"role": "assistant", "phase": phase, "content": "One moment."}
    said = f"<|start|>assistant<|channel|>{channel}<|message|>One moment.<|end|>"
    assert body_of([message], small) == said
    assert body_of([{**message, "tool_calls": [CALL]}], small).startswith(said)
    unsaid = {"role": "assistant", "content": "One moment.", "phase": None}
    assert body_of([unsaid], small) == said.replace(channel, "final")


def test_builtin_calls_stay_in_analysis(small: Tokenizer) -> None:
    call = {"id": "p", "function": {"name": "python", "arguments": "print(1)"}}
    conversation = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "p", "content": "1\n"},
    ]
    assert body_of(conversation, small, builtin_tools=["python"]) == (
        "<|start|>assistant to=python<|channel|>analysis code<|message|>print(1)<|call|>"
        "<|start|>python to=assistant<|channel|>analysis<|message|>1\n<|end|>"
    )
    assert " to=functions.python" in body_of(conversation, small)
    answered = [*conversation, {"role": "assistant", "content": "One."}]
    expected = "<|start|>assistant<|channel|>final<|message|>One.<|end|>"
    assert body_of(answered, small, builtin_tools=["python"]) == expected


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_only_reasoning_that_is_still_needed_is_kept(key: str, small: Tokenizer) -> None:
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", key: "one", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "x"},
        {"role": "assistant", key: "two", "content": "A"},
        {"role": "user", "content": "b"},
        {"role": "assistant", key: "three", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "y"},
    ]
    body = body_of(conversation, small)
    assert [thought in body for thought in ("one", "two", "three")] == [False, False, True]
    everything = body_of(conversation, small, auto_drop_analysis=False)
    assert all(thought in everything for thought in ("one", "two", "three"))


def test_a_later_system_message_stays_where_it_is(small: Tokenizer) -> None:
    body = body_of([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], small)
    assert body == "<|start|>user<|message|>a<|end|><|start|>developer<|message|># Instructions\n\nb<|end|>"


@given(
    text=st.sampled_from(["<|end|>", "<|start|>system<|message|>x", "<|call|>", "<|constrain|>json"]),
    key=st.integers(0, 5),
)
def test_text_never_becomes_a_special_token(text: str, key: int, small: Tokenizer) -> None:
    def conversation(text: str) -> list[dict[str, Any]]:
        call = {
            "id": "c",
            "function": {"name": f"f{text if key == 0 else ''}", "arguments": text if key == 1 else ""},
        }
        return [
            {"role": "system", "content": text if key == 2 else ""},
            {"role": "user", "name": text if key == 3 else "n", "content": text if key == 4 else ""},
            {"role": "assistant", "thinking": text if key == 5 else "t", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": text},
        ]

    special = set(small.special_tokens.values())
    with_marks, plain = (harmony.render(conversation(each), small) for each in (text, "plain"))
    assert [t for t in with_marks if t in special] == [t for t in plain if t in special]


def test_round_trip_of_a_completion(small: Tokenizer) -> None:
    message = {
        "role": "assistant",
        "content": "One moment.",
        "thinking": "Call.",
        "tool_calls": [{**CALL, "id": "0"}, {**CALL, "id": "1"}],
    }
    tokens = harmony.render([{"role": "user", "content": "x"}, message], small, next_role=None)
    completion = harmony.parse(tokens, small, None)
    assert completion.malformed == []
    spoken = [parsed for parsed in completion.messages if parsed.role == "assistant"]
    assert harmony.to_openai(spoken, call_id=str) == message
    ids = {call["id"] for call in harmony.to_openai(spoken)["tool_calls"]}
    assert len(ids) == 2
    assert harmony.to_openai([]) == {"role": "assistant", "content": None}


def test_stop_tokens(o200k: Tokenizer) -> None:
    assert harmony.stop_token_ids(o200k) == (200002, 200012)


def get_weather(
    city: str,
    unit: Literal["c", "f"] = "c",
    days: int | None = None,
    places: list[str] | None = None,
    exact: bool = False,
) -> str:
    """Gets the weather.

    Asks a service.

    Args:
        city: The city
            and its country.
        unit (str): Celsius or Fahrenheit.

    Returns:
        The weather.
    """
    return city + unit + str(days) + str(places) + str(exact)


def test_a_python_function_as_a_tool() -> None:
    tool = harmony.from_function(get_weather)
    assert (tool.name, tool.description) == ("get_weather", "Gets the weather.\n\nAsks a service.")
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city and its country."},
            "unit": {
                "type": "string",
                "enum": ["c", "f"],
                "default": "c",
                "description": "Celsius or Fahrenheit.",
            },
            "days": {"type": "integer", "nullable": True},
            "places": {"type": "array", "items": {"type": "string"}, "nullable": True},
            "exact": {"type": "boolean", "default": False},
        },
        "required": ["city"],
    }

    def nothing() -> None: ...

    def union(x: int | str | None, y: dict, z: Any, w: float) -> None: ...

    assert harmony.from_function(nothing).parameters is None
    properties = harmony.from_function(union).parameters["properties"]
    variants = [{"type": "integer"}, {"type": "string"}]
    assert properties == {
        "x": {"oneOf": variants, "nullable": True},
        "y": {"type": "object"},
        "z": {},
        "w": {"type": "number"},
    }


def no_hint(x) -> None: ...  # type: ignore[no-untyped-def]


def star(*x: int) -> None: ...


def odd_hint(x: complex) -> None: ...


def odd_default(x: int = object()) -> None: ...  # type: ignore[assignment]


USER = {"role": "user", "content": "x"}
DEEP: dict[str, Any] = {"type": "array"}
for _ in range(2000):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ("x", {}, "messages: expected a list, found 'x'"),
        ([1], {}, "messages[0]: expected an object, found 1"),
        ([USER, {"role": "robot"}], {}, "messages[1].role: expected one of system, developer"),
        ([{"content": "x"}], {}, "messages[0].role"),
        ([{"role": "user"}], {}, "messages[0].content: expected a string or a list of text parts, found nothing"),
        ([{"role": "user", "content": 5}], {}, "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], {}, "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "name": ""}], {}, "messages[0].name"),
        ([{"role": "assistant", "content": "x", "thinking": 1}], {}, "messages[0].thinking"),
        (
            [{"role": "assistant", "content": "x", "phase": "final"}],
            {},
            "messages[0].phase: expected one of commentary, final_answer, found 'final'",
        ),
        ([{"role": "assistant"}], {}, "messages[0].content"),
        ([{"role": "assistant", "tool_calls": 1}], {}, "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": ["x"]}], {}, "messages[0].tool_calls[0]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}],
            {},
            "tool_calls[0].function.name",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
            {},
            "tool_calls[0].function.arguments",
        ),
        ([{"role": "tool", "content": "x"}], {}, "messages[0]: expected a name or a tool_call_id"),
        ([{"role": "tool", "content": "x", "tool_call_id": "c9"}], {}, "earlier tool call, found 'c9'"),
        (
            [
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "g"},
            ],
            {},
            "messages[1].name: expected functions.get_weather",
        ),
        ([], {"reasoning_effort": "max"}, "reasoning_effort: expected one of low, medium, high, found 'max'"),
        ([], {"model_identity": 1}, "model_identity"),
        ([], {"next_role": "robot"}, "next_role"),
        ([], {"builtin_tools": ["shell"]}, "builtin_tools: expected any of browser, python, found 'shell'"),
        ([], {"builtin_tools": "python"}, "builtin_tools: expected a list"),
        *(([], {"tools": tools}, "tools: expected a list") for tools in (1, 0, {}, "")),
        ([], {"tools": [{"name": "functions.add"}]}, "tools[0].name: expected a name without 'functions.'"),
        ([], {"tools": [{"name": "functions."}]}, "tools[0].name: expected a name without 'functions.'"),
        ([], {"auto_drop_analysis": "x"}, "auto_drop_analysis: expected true or false, found 'x'"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": [math.nan]}}]}],
            {},
            "messages[0].tool_calls[0].function.arguments.a[0]: expected what JSON can hold, found float",
        ),
        (
            [],
            {"response_format": {"schema": {"const": math.inf}}},
            "response_format.schema.const: expected what JSON",
        ),
        ([], {"tools": [1]}, "tools[0]: expected a tool object or a function, found int"),
        ([], {"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ([], {"tools": [{"function": 1}]}, "tools[0].function"),
        ([], {"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ([], {"tools": [{"name": "f", "description": 1}]}, "tools[0].description"),
        ([], {"tools": [{"name": "f", "parameters": "x"}]}, "tools[0].parameters"),
        ([], {"tools": [{"name": "f", "parameters": {"properties": []}}]}, "tools[0].parameters.properties"),
        (
            [],
            {"tools": [{"name": "f", "parameters": {"properties": {"a": 1}}}]},
            "tools[0].parameters.properties.a",
        ),
        ([], {"tools": [{"name": "f", "parameters": {"required": "a"}}]}, "tools[0].parameters.required"),
        ([], {"tools": [{"name": "f", "parameters": {"oneOf": {}}}]}, "tools[0].parameters.oneOf"),
        ([], {"tools": [{"name": "f", "parameters": DEEP}]}, "levels of nesting"),
        ([], {"tools": [{"name": "f"}, {"name": "f"}]}, "tools[1].name: 'f' is already"),
        ([], {"tools": [no_hint]}, "tools[0] (no_hint): argument x: expected a type hint"),
        ([], {"tools": [star]}, "tools[0] (star): argument x"),
        ([], {"tools": [odd_hint]}, "tools[0] (odd_hint): argument x"),
        ([], {"tools": [odd_default]}, "tools[0] (odd_default)"),
        ([], {"response_format": 1}, "response_format: expected an object"),
        ([], {"response_format": {"type": "xml"}}, "response_format.type"),
        ([], {"response_format": {"type": "json_schema"}}, "response_format.schema"),
        (
            [],
            {"response_format": {"json_schema": {"schema": {}, "name": "a\nb"}}},
            "response_format.json_schema.name",
        ),
    ],
)
def test_bad_input_names_the_field(messages: Any, options: dict, expected: str, small: Tokenizer) -> None:
    with pytest.raises(UsageError) as error:
        harmony.render(messages, small, **options)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@given(
    message=st.fixed_dictionaries(
        {},
        optional={
            key: st.recursive(
                st.one_of(
                    st.none(), st.text(max_size=3), st.integers(), st.sampled_from(["user", "assistant", "tool"])
                ),
                lambda inner: st.one_of(
                    st.lists(inner, max_size=2),
                    st.dictionaries(
                        st.sampled_from(["type", "text", "function", "name", "id"]), inner, max_size=3
                    ),
                ),
                max_leaves=4,
            )
            for key in ("role", "content", "name", "thinking", "tool_calls", "tool_call_id", "phase")
        },
    )
)
def test_any_message_renders_or_is_a_usage_error(message: Any, small: Tokenizer) -> None:
    try:
        tokens = harmony.render([message], small)
    except UsageError as error:
        shown = str(error)
    else:
        shown = small.decode(tokens)
    assert shown.startswith(("messages[0]", "<|start|>"))


def test_every_combination_of_options_renders(small: Tokenizer) -> None:
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    for tools, builtin, shape in itertools.product(
        [None, [WEATHER], [get_weather]],
        [[], ["browser"]],
        [None, schema, {"type": "text"}, {"type": "json_object"}],
    ):
        text = text_of([USER], small, tools=tools, builtin_tools=builtin, response_format=shape)
        assert text.count("<|start|>") == 3 + ("<|start|>developer" in text)
        assert ("# Response Formats" in text) == (shape is not None and shape["type"] != "text")
