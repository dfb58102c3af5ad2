"""The rules of Open Responses: the cases of its compliance tests, and the fields that it requires."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.api.responses_support import Api
from tests.serving.api.support import ANSWER

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Gets the weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CALL = (
    "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary"
    ' to=functions.get_weather <|constrain|>json<|message|>{"place": "Oslo"}<|call|>'
)

NULLABLE = {
    "completed_at": int,
    "incomplete_details": dict,
    "previous_response_id": str,
    "instructions": str,
    "error": dict,
    "reasoning": dict,
    "usage": dict,
    "max_output_tokens": int,
    "max_tool_calls": int,
    "safety_identifier": str,
    "prompt_cache_key": str,
}
REQUIRED = {
    "id": str,
    "object": str,
    "created_at": int,
    "status": str,
    "model": str,
    "output": list,
    "tools": list,
    "tool_choice": str | dict,
    "truncation": str,
    "parallel_tool_calls": bool,
    "text": dict,
    "top_p": int | float,
    "presence_penalty": int | float,
    "frequency_penalty": int | float,
    "top_logprobs": int,
    "temperature": int | float,
    "store": bool,
    "background": bool,
    "service_tier": str,
    "metadata": dict,
}
ITEMS = {
    "message": {"id": str, "status": str, "role": str, "content": list},
    "reasoning": {"id": str, "summary": list, "content": list},
    "function_call": {"id": str, "call_id": str, "name": str, "arguments": str, "status": str},
}
PARTS = {
    "output_text": {"text": str, "annotations": list, "logprobs": list},
    "reasoning_text": {"text": str},
}
TOOL = {"type": str, "name": str, "description": str | None, "parameters": dict | None, "strict": bool | None}


@pytest.fixture(scope="module")
def shared() -> Iterator[Api]:
    with Api().running() as api:
        yield api


@pytest.fixture
def api(shared: Api) -> Api:
    shared.script = ANSWER
    return shared


def has(value: dict[str, Any], fields: dict[str, Any]) -> bool:
    return all(name in value and isinstance(value[name], kind) for name, kind in fields.items())


def follows_the_rules(response: dict[str, Any]) -> bool:
    assert has(response, REQUIRED)
    assert has(response, {name: kind | None for name, kind in NULLABLE.items()})
    for item in response["output"]:
        assert has(item, ITEMS[item["type"]])
        assert all(has(part, PARTS[part["type"]]) for part in item.get("content", []))
    assert all(has(tool, TOOL) for tool in response["tools"])
    if response["usage"]:
        usage = response["usage"]
        assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
        assert set(usage["input_tokens_details"]) >= {"cached_tokens"}
        assert set(usage["output_tokens_details"]) >= {"reasoning_tokens"}
    return True


def completed(api: Api, *types: str, **body: Any) -> dict[str, Any]:
    response = api.create(model="gpt-oss-test", **body)
    assert follows_the_rules(response)
    assert response["status"] == "completed"
    assert [item["type"] for item in response["output"]] == list(types)
    return response


def user(content: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": content}


def test_basic_text(api: Api) -> None:
    completed(api, "reasoning", "message", input=[user("Say hello in three words.")])


def test_text_alone(api: Api) -> None:
    completed(api, "reasoning", "message", input="Say hello in three words.")


def test_parts(api: Api) -> None:
    completed(api, "reasoning", "message", input=[user([{"type": "input_text", "text": "Say hello."}])])


def test_system_prompt(api: Api) -> None:
    completed(
        api,
        *("reasoning", "message"),
        input=[{"type": "message", "role": "system", "content": "You are a pirate."}, user("Say hello.")],
    )


def test_developer_prompt(api: Api) -> None:
    completed(
        api,
        *("reasoning", "message"),
        input=[{"type": "message", "role": "developer", "content": "Be a pirate."}, user("Say hello.")],
    )


def test_instructions(api: Api) -> None:
    response = completed(api, "reasoning", "message", input="Say hello.", instructions="Be a pirate.")
    assert response["instructions"] == "Be a pirate."


def test_multi_turn(api: Api) -> None:
    said = {"type": "message", "role": "assistant", "content": "Hello Ann!"}
    completed(api, "reasoning", "message", input=[user("I am Ann."), said, user("Who am I?")])


def test_previous_response(api: Api) -> None:
    first = completed(api, "reasoning", "message", input=[user("I am Ann.")])
    second = completed(
        api, "reasoning", "message", input=[user("Who am I?")], previous_response_id=first["id"], instructions="x"
    )
    assert second["previous_response_id"] == first["id"]
    # Instructions are of one response alone.
    third = completed(api, "reasoning", "message", input="And now?", previous_response_id=second["id"])
    assert third["instructions"] is None


def test_tool_calling(api: Api) -> None:
    api.script = CALL
    response = completed(api, "reasoning", "function_call", input=[user("The weather?")], tools=[WEATHER])
    assert response["output"][-1]["arguments"] == '{"place": "Oslo"}'


def test_the_round_trip_of_a_call(api: Api) -> None:
    api.script = CALL
    choice = {"type": "function", "name": "get_weather"}
    first = completed(
        api, *("reasoning", "function_call"), input=[user("The weather?")], tools=[WEATHER], tool_choice=choice
    )
    assert first["tool_choice"] == choice
    api.script = ANSWER
    answer = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "Sunny."}
    completed(api, *("reasoning", "message"), input=[answer], tools=[WEATHER], previous_response_id=first["id"])


def test_allowed_tools(api: Api) -> None:
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
    response = completed(api, *("reasoning", "message"), input="Hello", tools=[WEATHER], tool_choice=allowed)
    assert response["tool_choice"] == allowed


def test_streaming(api: Api) -> None:
    events = api.stream(model="gpt-oss-test", input=[user("Count from 1 to 5.")])
    assert events[-1]["response"]["status"] == "completed"
    assert all(follows_the_rules(event["response"]) for event in events if "response" in event)


def test_streaming_of_a_call(api: Api) -> None:
    api.script = CALL
    events = api.stream(model="gpt-oss-test", input=[user("The weather?")], tools=[WEATHER])
    kinds = [event["type"] for event in events]
    for kind in ("delta", "done"):
        assert f"response.function_call_arguments.{kind}" in kinds
    for kind in ("added", "done"):
        found = [event["item"]["type"] for event in events if event["type"] == f"response.output_item.{kind}"]
        assert found == ["reasoning", "function_call"]
    assert all(follows_the_rules(event["response"]) for event in events if "response" in event)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"},
    ],
)
def test_images_and_files_are_refused_by_name(part: dict[str, Any], api: Api) -> None:
    content = [{"type": "input_text", "text": "What is this?"}, part]
    error = api.error(input=[user("Hello"), user(content)])
    assert error["param"] == "input[1].content[1]"
    assert part["type"] in error["message"]
