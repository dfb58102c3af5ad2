"""OpenAI's `tool_choice`, `parallel_tool_calls` and `strict`: what they allow, in requests and in a model's output."""

import json
import re
import sys
from functools import cache
from typing import Any

import pytest

from gptoss_jax import LLM, EngineOptions, SamplingParams, StructuredOutputsParams
from gptoss_jax.engine.leading import _decoded, _encoded
from gptoss_jax.errors import UsageError
from gptoss_jax.text.harmony import tool_recipients
from gptoss_jax.text.tool_choice import chat_scope
from gptoss_jax.types import ChatScope

ZONE = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
TIME = {"type": "function", "name": "get_time", "parameters": ZONE}
OBJECT = json.dumps({"type": "object"})
QUESTION = [{"role": "user", "content": "What is the weather in Rome?"}]


def scope(choice: Any, parallel: bool | None = None, **more: Any) -> ChatScope:
    return chat_scope(tool_recipients([WEATHER, TIME], ["python", "browser"]), choice, parallel, **more)


def free(*names: str) -> tuple[tuple[str, None], ...]:
    return tuple((name, None) for name in names)


EVERY = ("functions.get_weather", "functions.get_time", "browser.search", "browser.open", "browser.find", "python")
NAMED = {"type": "function", "function": {"name": "get_time"}}
FLAT = {"type": "function", "name": "get_time"}


# The values of the Chat Completions and of the Responses API's reference.
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ChatScope()),
        ("auto", ChatScope()),
        ("none", ChatScope("none")),
        ("required", ChatScope("required", (*((name, OBJECT) for name in EVERY[:-1]), ("python", None)))),
        (NAMED, ChatScope("required", (("functions.get_time", OBJECT),))),
        (FLAT, ChatScope("required", (("functions.get_time", OBJECT),))),
        ({"type": "function", "name": "python"}, ChatScope("required", free("python"))),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [FLAT]},
            ChatScope("auto", free("functions.get_time")),
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
            ChatScope("auto", free("functions.get_time")),
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [FLAT]},
            ChatScope("required", (("functions.get_time", OBJECT),)),
        ),
    ],
)
def test_values_of_tool_choice(choice: Any, expected: ChatScope) -> None:
    assert scope(choice) == expected


def test_a_scope_is_as_wide_as_the_request_allows() -> None:
    assert scope("auto", True).free
    assert not scope("none").free
    assert scope("auto", False) == ChatScope("auto", free(*EVERY), parallel=False)
    assert scope(FLAT, False) == ChatScope("required", (("functions.get_time", OBJECT),), parallel=False)
    # With a constraint on the answer, a name that is no tool's would end the request without one.
    assert scope("auto", has_grammar=True) == ChatScope("auto", free(*EVERY))
    for choice in (None, "auto"):
        assert chat_scope({}, choice, has_grammar=True) == ChatScope("none")
        assert chat_scope({}, choice, False) == ChatScope()
    assert chat_scope({}, "none") == ChatScope("none")


@pytest.mark.parametrize(
    "tool",
    [
        TIME | {"strict": True},
        {"type": "function", "function": {"name": "get_time", "strict": True, "parameters": ZONE}},
        {"type": "function", "strict": True, "function": {"name": "get_time", "parameters": ZONE}},
    ],
)
def test_strict_tools_are_enforced(tool: dict[str, Any]) -> None:
    recipients = tool_recipients([WEATHER, tool])
    for choice, weather in (("auto", None), ("required", OBJECT)):
        (name, other), (strict, schema) = chat_scope(recipients, choice).tools or ()
        assert (name, strict) == ("functions.get_weather", "functions.get_time")
        assert other == weather
        assert json.loads(schema or "") == ZONE
    assert chat_scope(recipients, "none") == ChatScope("none")


def test_a_strict_tool_without_parameters_takes_an_empty_object() -> None:
    [(_, schema)] = chat_scope(tool_recipients([{"name": "f", "strict": True}])).tools or ()
    assert json.loads(schema or "") == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize("parameters", [True, {"type": "string"}, {"type": ["array", "null"]}])
def test_strict_arguments_are_objects(parameters: Any) -> None:
    tool = {"name": "f", "strict": True, "parameters": parameters}
    with pytest.raises(UsageError, match=r"^tools: functions\.f: expected a schema of an object"):
        chat_scope(tool_recipients([tool]))


def test_strict_is_a_boolean() -> None:
    with pytest.raises(UsageError, match=r"^tools\[0\].strict: expected true or false, found 'yes'"):
        tool_recipients([TIME | {"strict": "yes"}])


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ("any", "tool_choice: expected none, auto, required or an object"),
        (["auto"], "tool_choice: expected none, auto"),
        ({}, "tool_choice: expected none, auto"),
        ({"type": "file_search"}, "tool_choice: expected none, auto"),
        ({"type": "function"}, "tool_choice: expected the name of a function"),
        ({"type": "function", "function": "get_time"}, "tool_choice: expected the name of a function"),
        (
            {"type": "function", "name": "get_tim"},
            "tool_choice: no tool is named 'get_tim'; expected one of get_weath",
        ),
        ({"type": "function", "name": "a\nb"}, r"tool_choice: no tool is named 'a\nb'"),
        ({"type": "allowed_tools"}, "tool_choice.mode: expected auto or required, found None"),
        (
            {"type": "allowed_tools", "mode": "none", "tools": [FLAT]},
            "tool_choice.mode: expected auto or required",
        ),
        ({"type": "allowed_tools", "mode": ["auto"], "tools": [FLAT]}, "tool_choice.mode: expected auto or"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice.tools: expected a list of tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": "get_time"}, "tool_choice.tools: expected a list of"),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [FLAT, 5]},
            "tool_choice.tools[1]: expected an object",
        ),
        ({"type": "allowed_tools", "allowed_tools": 5}, "tool_choice.allowed_tools: expected an object"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            },
            "tool_choice.allowed_tools.tools[0]: no tool is named 'f'",
        ),
    ],
)
def test_invalid_tool_choice_is_named_in_one_line(choice: Any, named: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(named)) as caught:
        scope(choice)
    assert "\n" not in str(caught.value)


def test_a_call_needs_tools() -> None:
    with pytest.raises(UsageError, match=r"^tool_choice: expected tools with 'required', found"):
        chat_scope({}, "required")
    with pytest.raises(UsageError, match=r"^tool_choice: no tool is named 'get_time'; there are no tools"):
        chat_scope({}, FLAT)
    with pytest.raises(UsageError, match=r"^parallel_tool_calls: expected true or false, found 1"):
        scope("auto", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", ["auto", "none", "required", FLAT])
def test_a_scope_survives_json(choice: Any) -> None:
    sent = scope(choice, False)
    received = _decoded(json.loads(json.dumps(_encoded(sent))))
    assert received == sent
    assert hash(received) == hash(sent)
    assert _decoded(json.loads(json.dumps(_encoded("text")))) == "text"


def test_missing_library_is_reported_by_the_option_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        llm().chat_request("1", QUESTION, SamplingParams(), tools=[WEATHER], tool_choice=choice)
        for choice in ("auto", "none")
    ]
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm().check(requests[0])
    with pytest.raises(UsageError, match=r"^tool_choice: .*gptoss-jax\[structured\]"):
        llm().check(requests[1])


@cache
def llm() -> LLM:
    # Fixed sizes, so that few step shapes are compiled.
    return LLM(engine=EngineOptions(max_num_seqs=1, page_size=256, enable_prefix_caching=False), progress=False)


def test_requests_of_chats() -> None:
    request = llm().chat_request("1", QUESTION, SamplingParams(), tools=[WEATHER], tool_choice="auto")
    assert request.scope == ChatScope()
    assert llm().engine._constraints_of(request.params, request.scope) == []
    request = llm().chat_request("1", QUESTION, SamplingParams(n=2), tools=[WEATHER], tool_choice="none")
    assert len(llm().engine._constraints_of(request.params, request.scope)) == 2
    # The prompt has the tools nevertheless, so that later turns have the same prefix.
    assert (
        request.prompt_token_ids
        == llm().chat_request("1", QUESTION, SamplingParams(), tools=[WEATHER]).prompt_token_ids
    )
    bound = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    assert llm().chat_request("1", QUESTION, bound, tools=[WEATHER]).scope == ChatScope(
        "auto", free("functions.get_weather")
    )
    assert llm().chat_request("1", QUESTION, bound).scope == ChatScope("none")


@pytest.mark.parametrize("more", [{"min_tokens": 1}, {"ignore_eos": True}])
def test_settings_that_contradict_a_constraint_on_calls(more: dict[str, Any]) -> None:
    params = SamplingParams(**more)
    llm().check(llm().chat_request("1", QUESTION, params, tools=[WEATHER]))
    with pytest.raises(UsageError, match=f"^{next(iter(more))}: expected .* with a constraint on tool calls"):
        llm().check(llm().chat_request("1", QUESTION, params, tools=[WEATHER], tool_choice="required"))


def test_a_schema_that_cannot_be_enforced_is_rejected_before_the_request_runs() -> None:
    tool = {"name": "f", "strict": True, "parameters": {"type": "object", "not": {"required": ["a"]}}}
    with pytest.raises(UsageError, match=r"^request 0: tools: functions\.f: .*not") as caught:
        llm().chat(QUESTION, SamplingParams(max_tokens=1), tools=[tool])
    assert "\n" not in str(caught.value)


def replies(*params: SamplingParams, strict: bool = True, **options: Any) -> list[dict[str, Any]]:
    """The assistant's messages, which keep to the format."""
    tools = [WEATHER, TIME | {"strict": strict}]
    found = []
    for output in llm().chat([QUESTION] * len(params), params, tools=tools, current_date="2026-11-24", **options):
        completion = output.outputs[0]
        assert completion.finish_reason == ("tool_calls" if "tool_calls" in completion.message else "stop")
        assert not completion.malformed
        found.append(completion.message)
    return found


def calls(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]


@pytest.mark.slow
def test_the_shipped_model_keeps_to_the_choice() -> None:
    params = [SamplingParams(max_tokens=200, temperature=1.0, seed=seed) for seed in range(4)]
    for message in replies(*params, tool_choice="none"):
        assert calls(message) == []
    for message in replies(*params, tool_choice="required"):
        assert {name for name, _ in calls(message)} <= {"get_weather", "get_time"}
        assert calls(message)
    for message in replies(*params, tool_choice=FLAT, parallel_tool_calls=False):
        # The question is about the weather, so the model would not call this tool by itself.
        [(name, arguments)] = calls(message)
        assert name == "get_time"
        assert arguments in ({"zone": "UTC"}, {"zone": "CET"})
        assert message["thinking"]


@pytest.mark.slow
def test_reasoning_is_free_and_the_answer_bound() -> None:
    params = SamplingParams(max_tokens=200, temperature=0)
    [unbound] = replies(params, strict=False)
    [called] = replies(params, tool_choice="required")
    assert called["thinking"] == unbound["thinking"]
    assert calls(called) == calls(unbound) == [("get_weather", {"city": "Rome"})]
    bound = SamplingParams(max_tokens=200, structured_outputs=StructuredOutputsParams(regex="[0-9]{3}"))
    [answered] = replies(bound, tool_choice="none")
    assert re.fullmatch("[0-9]{3}", answered["content"])
