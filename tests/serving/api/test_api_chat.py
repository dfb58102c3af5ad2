"""Chat Completions, as OpenAI's own client sees them."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gptoss_jax.errors import EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api import sampling
from gptoss_jax.serving.api.chat import prepare
from gptoss_jax.serving.api.errors import as_api_error
from gptoss_jax.serving.api.grammars import GrammarChecks
from gptoss_jax.text import harmony
from gptoss_jax.types import ChatScope, StructuredOutputsParams
from tests.serving.api.support import (
    ANSWER,
    CALL,
    JSON,
    PROMPTS,
    ScriptedOwner,
    Served,
    served,
    server_over,
    serving,
)
from tests.text.harmony.test_parse import MARKS, MESSAGES, tokens_of

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
SUBTRACT = {"type": "function", "function": {"name": "subtract", "parameters": {"type": "object"}}}
ASSISTANT = "<|start|>assistant"
TWO_CALLS = (
    "<|channel|>analysis<|message|>Two.<|end|>"
    f"{ASSISTANT}<|channel|>commentary<|message|>One moment.<|end|>"
    f'{ASSISTANT}<|channel|>commentary to=functions.add <|constrain|>json<|message|>{{"a": 1}}<|end|>'
    f"{ASSISTANT}<|channel|>commentary to=functions.subtract <|constrain|>json<|message|>{{not json<|call|>"
)
SCRIPTS = {
    "answer": ANSWER,
    "call": CALL,
    "two calls": TWO_CALLS,
    "reasoning only": "<|channel|>analysis<|message|>Hmm.<|end|>",
    "reasoning twice": (
        f"<|channel|>analysis<|message|>a<|end|>{ASSISTANT}<|channel|>analysis<|message|>b<|end|>"
        f"{ASSISTANT}<|channel|>final<|message|>c<|return|>"
    ),
    "preamble and answers": (
        f"<|channel|>commentary<|message|>p é<|end|>{ASSISTANT}<|channel|>final<|message|><|end|>"
        f"{ASSISTANT}<|channel|>final<|message|>one<|end|>{ASSISTANT}<|channel|>final<|message|>two 🦄<|return|>"
    ),
    "empty answer": "<|channel|>final<|message|><|return|>",
    "broken header": "<|channel|>final commentary?? x<|message|>text<|return|>",
    "no header": "just text<|end|>",
    "special tokens in texts": (
        f"<|channel|>analysis<|message|>a<|channel|>b<|end|>{ASSISTANT}<|channel|>final<|message|>c<|message|>d"
        "<|constrain|>e<|return|>"
    ),
}


@pytest.fixture(scope="module")
def at() -> Iterator[Served]:
    with served() as found:
        yield found


def ask(at: Served, **fields: Any) -> ChatCompletion:
    """A chat completion, which is valid."""
    body = {"model": at.model, "messages": QUESTION} | fields
    found = at.client.chat.completions.create(**body)
    return ChatCompletion.model_validate(found.to_dict())


def stream(at: Served, **fields: Any) -> list[ChatCompletionChunk]:
    """The chunks of a chat completion, each checked to be valid."""
    body = {"model": at.model, "messages": QUESTION, "stream": True} | fields
    chunks = list(at.client.chat.completions.create(**body))
    return [ChatCompletionChunk.model_validate(chunk.to_dict()) for chunk in chunks]


def refused(at: Served, **fields: Any) -> openai.BadRequestError:
    """The error of a chat completion that is refused."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(at, **fields)
    assert not at.owner.requests
    assert isinstance(caught.value, openai.BadRequestError)
    assert caught.value.type == "invalid_request_error"
    return caught.value


def extra(model: Any, name: str) -> Any:
    return (model.model_extra or {}).get(name)


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> dict[str, Any]:
    """A choice's message as clients add it up, with its finish reason and its tokens."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish": [], "tokens": []}
    for choice in (choice for chunk in chunks for choice in chunk.choices if choice.index == index):
        message["content"] += choice.delta.content or ""
        message["reasoning"] += extra(choice.delta, "reasoning") or ""
        assert extra(choice.delta, "reasoning") == extra(choice.delta, "reasoning_content")
        message["finish"] += [choice.finish_reason] if choice.finish_reason else []
        message["tokens"] += (choice.logprobs and choice.logprobs.content) or []
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.id is not None:
                assert call.index == len(message["calls"])
                message["calls"].append([call.function.name, ""])
            else:
                assert call.function.name is None
            message["calls"][call.index][1] += call.function.arguments or ""
    return message


def whole(found: ChatCompletion, index: int = 0) -> dict[str, Any]:
    """A choice in the shape of `joined`."""
    choice = found.choices[index]
    assert choice.index == index
    return {
        "content": choice.message.content or "",
        "reasoning": extra(choice.message, "reasoning") or "",
        "calls": [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or []],  # type: ignore[union-attr]
        "finish": [choice.finish_reason],
        "tokens": (choice.logprobs and choice.logprobs.content) or [],
    }


def prompt_of(at: Served) -> str:
    assert PROMPTS.tokenizer
    return PROMPTS.tokenizer.decode(at.owner.requests[-1].prompt_token_ids)


def test_an_answer_has_its_reasoning_beside_it(at: Served) -> None:
    at.says(ANSWER)
    found = ask(at)
    [choice] = found.choices
    assert choice.message.content == "The answer is 42."
    assert extra(choice.message, "reasoning") == extra(choice.message, "reasoning_content") == "Think."
    assert choice.message.tool_calls is None
    assert choice.message.refusal is None
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert found.id.startswith("chatcmpl-")
    assert (found.model, found.object, found.service_tier) == (at.model, "chat.completion", "default")
    assert abs(found.created - time.time()) < 60
    assert found.system_fingerprint


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(at: Served) -> None:
    at.says(ANSWER, per_step=3)
    chunks = stream(at)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert first.delta.to_dict() == {"role": "assistant", "content": ""}
    assert last.delta.to_dict() == {}
    assert last.finish_reason == "stop"
    assert all(choice.finish_reason is None for choice in (first, *middle))
    keys = [tuple(choice.delta.to_dict()) for choice in middle]
    reasoning = ("reasoning", "reasoning_content")
    answers = keys.index(("content",))
    assert answers
    assert keys == [reasoning] * answers + [("content",)] * (len(keys) - answers)
    assert all(chunk.usage is None for chunk in chunks)


def test_the_raw_stream_ends_with_done(at: Served) -> None:
    at.says(ANSWER)
    body = {"model": at.model, "messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}}
    response = httpx.post(f"{at.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    data = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["usage"] is None for chunk in data[:-1])
    assert data[-1]["choices"] == []
    assert data[-1]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("per_step", [1, 4, 100])
def test_a_stream_adds_up_to_the_answer(at: Served, script: str, per_step: int) -> None:
    at.says(script, per_step=per_step)
    assert joined(stream(at, tools=[ADD, SUBTRACT])) == whole(ask(at, tools=[ADD, SUBTRACT]))


def test_texts_of_several_messages_are_separated_by_a_blank_line(at: Served) -> None:
    at.says(SCRIPTS["preamble and answers"])
    assert ask(at).choices[0].message.content == "p é\n\none\n\ntwo 🦄"
    at.says(SCRIPTS["reasoning twice"])
    message = ask(at).choices[0].message
    assert (message.content, extra(message, "reasoning")) == ("c", "a\n\nb")


def test_special_tokens_are_in_no_text(at: Served) -> None:
    at.says(SCRIPTS["special tokens in texts"])
    [choice] = ask(at, logprobs=True).choices
    assert (choice.message.content, extra(choice.message, "reasoning")) == ("cde", "ab")
    assert choice.logprobs is not None
    assert [token.token for token in choice.logprobs.content or ()] == ["c", "d", "e"]


def test_content_is_null_only_without_a_message_to_the_user(at: Served) -> None:
    at.says(SCRIPTS["reasoning only"])
    [choice] = ask(at).choices
    assert (choice.message.content, extra(choice.message, "reasoning")) == (None, "Hmm.")
    assert choice.finish_reason == "stop"
    at.says(SCRIPTS["empty answer"])
    [choice] = ask(at).choices
    assert choice.message.content == ""
    assert extra(choice.message, "reasoning") is None


def test_calls_have_ids_and_raw_arguments(at: Served) -> None:
    at.says(TWO_CALLS)
    [choice] = ask(at, tools=[ADD, SUBTRACT]).choices
    first, second = choice.message.tool_calls or []
    assert (first.type, second.type) == ("function", "function")
    assert (first.function.name, first.function.arguments) == ("add", '{"a": 1}')  # type: ignore[union-attr]
    assert (second.function.name, second.function.arguments) == ("subtract", "{not json")  # type: ignore[union-attr]
    assert first.id != second.id
    assert choice.message.content == "One moment."
    assert choice.finish_reason == "tool_calls"
    at.says(CALL)
    [choice] = ask(at, tools=[ADD]).choices
    assert choice.message.content is None


def test_calls_stream_their_name_once_and_then_arguments(at: Served) -> None:
    at.says(TWO_CALLS, per_step=2)
    deltas = [chunk.choices[0].delta for chunk in stream(at, tools=[ADD, SUBTRACT])]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    heads = [call for call in calls if call.id]
    assert [(call.index, call.type, call.function and call.function.name) for call in heads] == [
        (0, "function", "add"),
        (1, "function", "subtract"),
    ]
    assert [call.index for call in calls] == sorted(call.index for call in calls)
    assert all(call.function and call.function.arguments == "" for call in heads)
    assert all(len(delta.to_dict()) == 1 for delta in deltas if delta.tool_calls)


def test_a_call_cut_short_is_there_with_the_reason_length(at: Served) -> None:
    at.says(CALL)
    count = len(tokens_of(PROMPTS.tokenizer, CALL)) - 3  # type: ignore[arg-type]
    [choice] = ask(at, tools=[ADD], max_completion_tokens=count).choices
    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls or []
    assert call.function.name == "add"  # type: ignore[union-attr]
    assert '{"a": 1, "b": 2}'.startswith(call.function.arguments)  # type: ignore[union-attr]
    assert joined(stream(at, tools=[ADD], max_completion_tokens=count))["finish"] == ["length"]


def test_openais_stream_helper_builds_the_message(at: Served) -> None:
    at.says(TWO_CALLS, per_step=2)
    with at.client.chat.completions.stream(
        model=at.model,
        messages=QUESTION,  # type: ignore[arg-type]
        tools=[ADD, SUBTRACT],  # type: ignore[list-item]
        stream_options={"include_usage": True},
    ) as events:
        kinds = [event.type for event in events]
        final = events.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 2
    message = final.choices[0].message
    assert [call.function.name for call in message.tool_calls or []] == ["add", "subtract"]
    assert message.content == "One moment."
    assert final.usage is not None
    assert final.usage == ask(at, tools=[ADD, SUBTRACT]).usage


class Sum(pydantic.BaseModel):
    result: int


def test_parse_returns_the_object(at: Served) -> None:
    at.says(
        '<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>{"result": 42}<|return|>'
    )
    parsed = at.client.chat.completions.parse(
        model=at.model,
        messages=QUESTION,  # type: ignore[arg-type]
        response_format=Sum,
    )
    assert parsed.choices[0].message.parsed == Sum(result=42)
    [request] = at.owner.requests
    assert request.params.structured_outputs is not None
    assert isinstance(request.params.structured_outputs.json, dict)
    assert request.params.structured_outputs.json["properties"]["result"]["type"] == "integer"
    assert isinstance(request.scope, ChatScope)
    assert "# Response Formats" in prompt_of(at)
    at.says(ANSWER)
    with pytest.raises(openai.LengthFinishReasonError):
        at.client.chat.completions.parse(
            model=at.model,
            messages=QUESTION,  # type: ignore[arg-type]
            response_format=Sum,
            max_completion_tokens=3,
        )


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutputsParams(json_object=True)),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
            StructuredOutputsParams(json={"type": "integer"}),
        ),
    ],
)
def test_response_formats(at: Served, form: dict[str, Any], expected: StructuredOutputsParams | None) -> None:
    at.says(ANSWER)
    ask(at, response_format=form)
    assert at.owner.requests[0].params.structured_outputs == expected


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": None},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}},
        {"type": "json_schema", "json_schema": {"name": 1, "schema": {}}},
        {"type": "grammar"},
        {"type": ["json_object"]},
        "json_object",
        3,
    ],
)
def test_bad_response_formats_are_refused_by_name(at: Served, form: Any) -> None:
    at.says(ANSWER)
    error = refused(at, extra_body={"response_format": form})
    assert error.param is not None
    assert error.param.startswith("response_format")


def test_a_schema_that_does_not_compile_is_refused_before_any_token() -> None:
    with served(grammars=GrammarChecks(1)) as at:
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)["}}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        error = refused(at, response_format=form)
        assert error.param == "response_format"
        error = refused(at, response_format=form, stream=True)
        assert error.param == "response_format"
        error = refused(at, extra_body={"structured_outputs": {"regex": "["}})
        assert error.param == "structured_outputs.regex"


def test_structured_outputs(at: Served) -> None:
    at.says(ANSWER)
    ask(at, extra_body={"structured_outputs": {"regex": "[0-9]+"}})
    assert at.owner.requests[0].params.structured_outputs == StructuredOutputsParams(regex="[0-9]+")
    at.says(ANSWER)
    both = {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}
    assert refused(at, extra_body=both).param == "structured_outputs"
    assert refused(at, extra_body={"structured_outputs": {"regexp": "a"}}).param == "structured_outputs.regexp"


@pytest.mark.parametrize(
    ("fields", "calls", "names", "parallel"),
    [
        ({"tool_choice": "required"}, "required", ["functions.add", "functions.subtract"], True),
        ({"tool_choice": "none"}, "none", None, True),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "required", ["functions.add"], True),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "subtract"}}],
                    },
                }
            },
            "auto",
            ["functions.subtract"],
            True,
        ),
        ({"parallel_tool_calls": False}, "auto", ["functions.add", "functions.subtract"], False),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, "auto", None, True),
    ],
)
def test_tool_choices_bind_the_engine(
    at: Served, fields: dict[str, Any], calls: str, names: list[str] | None, parallel: bool
) -> None:
    at.says(ANSWER)
    ask(at, tools=[ADD, SUBTRACT], **fields)
    [request] = at.owner.requests
    assert isinstance(request.scope, ChatScope)
    assert (request.scope.calls, request.scope.parallel) == (calls, parallel)
    found = None if request.scope.tools is None else [name for name, _ in request.scope.tools]
    assert calls == "none" or found == names
    assert request.tools == {"add", "subtract"}
    assert "type subtract = " in prompt_of(at)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": [ADD]}, "tool_choice"),
        ({"tool_choice": 1, "tools": [ADD]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [ADD]}, "tool_choice"),
        ({"parallel_tool_calls": "no", "tools": [ADD]}, "parallel_tool_calls"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": {}}, "tools"),
        ({"tools": [ADD, ADD]}, "tools[1].name"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "bash", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (
            {"messages": [*QUESTION, {"role": "tool", "tool_call_id": "x", "content": "y"}]},
            "messages[1].tool_call_id",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]},
            "messages[0].content[1].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages[0].audio"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]},
            "messages[0].function_call",
        ),
        ({"audio": {"format": "wav", "voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"echo": True}, "echo"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "x"}, "chat_template"),
        ({"best_of": 2}, "best_of"),
        ({"cache_salt": "x"}, "cache_salt"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": ["x" * 1001]}, "stop[0]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 2**31}, "max_completion_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 1, "response_format": {"type": "json_object"}}, "min_tokens"),
        ({"priority": 2**63}, "priority"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"reasoning_effort": "huge"}}, "chat_template_kwargs.reasoning_effort"),
        ({"chat_template_kwargs": {"reasoning_effort": []}}, "chat_template_kwargs.reasoning_effort"),
        ({"chat_template_kwargs": {"model_identity": 1}}, "model_identity"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"model": 3}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(at: Served, fields: dict[str, Any], param: str) -> None:
    at.says(ANSWER)
    body = {"model": at.model, "messages": QUESTION} | fields
    response = httpx.post(f"{at.url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    assert not at.owner.requests


def test_what_changes_nothing_is_accepted_and_logged_once(at: Served, caplog: pytest.LogCaptureFixture) -> None:
    at.says(ANSWER)
    fields: dict[str, Any] = {
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "store": True,
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "verbosity": "low",
        "prediction": {"type": "content", "content": "x"},
        "modalities": ["text"],
    }
    harmless = {"functions": [], "guided_json": None, "skip_special_tokens": True, "made_up": 1}
    harmless |= dict.fromkeys(("add_generation_prompt", "best_of", "length_penalty", "verbosity_level"))
    with caplog.at_level(logging.INFO, "gptoss_jax"):
        for _ in range(2):
            ask(at, extra_body=harmless, **fields)
    logged = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert {"user", "store", "verbosity", "prediction", "'made_up'"} <= set(logged)
    assert len(logged) == len(set(logged))


@pytest.mark.parametrize(
    ("effort", "expected"),
    [
        *(("none", "low"), ("minimal", "low"), ("low", "low"), ("medium", "medium"), (None, "medium")),
        *(("high", "high"), ("xhigh", "high"), ("max", "high")),
    ],
)
def test_efforts(at: Served, effort: str | None, expected: str) -> None:
    at.says(ANSWER)
    ask(at, reasoning_effort=effort)
    assert f"Reasoning: {expected}" in prompt_of(at)
    ask(at, extra_body={"chat_template_kwargs": {"reasoning_effort": effort, "enable_thinking": True}})
    assert f"Reasoning: {expected}" in prompt_of(at)


def test_sampling_fields_reach_the_engine(at: Served) -> None:
    at.says(ANSWER)
    ask(
        at,
        n=2,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        stop=["zzz"],
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        logit_bias={"5": -100},
        max_tokens=7,
        max_completion_tokens=9,
        extra_body={
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "stop_token_ids": [3],
            "ignore_eos": True,
            "priority": -4,
        },
    )
    [request] = at.owner.requests
    params = request.params
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (2, 0.5, 0.9, 0, 0.1)
    assert (params.seed, params.stop, params.stop_token_ids) == (2**64 - 1, ("zzz",), (3,))
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, -0.1, 1.1)
    assert (params.logit_bias, params.max_tokens, params.min_tokens) == ({5: -100}, 9, 2)
    assert (params.ignore_eos, request.priority, params.logprobs) == (True, -4, None)


def test_choices_are_told_apart_by_their_index(at: Served) -> None:
    def script(request: object, index: int) -> str:
        reasoning = f"<|channel|>analysis<|message|>{'x' * index}<|end|>"
        return f"{reasoning}{ASSISTANT}<|channel|>final<|message|>n{index}<|return|>"

    at.says(script, per_step=3)
    found, chunks = ask(at, n=3), stream(at, n=3, stream_options={"include_usage": True})
    assert [choice.message.content for choice in found.choices] == ["n0", "n1", "n2"]
    assert [joined(chunks, index) for index in range(3)] == [whole(found, index) for index in range(3)]
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(
        len(tokens_of(PROMPTS.tokenizer, script(None, index)))  # type: ignore[arg-type]
        for index in range(3)
    )
    assert found.usage.prompt_tokens == len(at.owner.requests[0].prompt_token_ids)
    assert chunks[-1].usage == found.usage


def test_the_prompts_of_all_choices_are_bounded(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    at.says(ANSWER)
    ask(at)
    length = len(at.owner.requests[0].prompt_token_ids)
    monkeypatch.setattr(sampling, "MAX_SAMPLED_TOKENS", 2 * length)
    ask(at, n=2)
    at.says(ANSWER)
    assert refused(at, n=3).param == "n"


@pytest.mark.parametrize("per_step", [1, 100])
def test_stop_strings_are_cut_from_answers(at: Served, per_step: int) -> None:
    at.says(ANSWER, per_step=per_step)
    [choice] = ask(at, stop=["ans", "4"]).choices
    assert (choice.message.content, choice.finish_reason) == ("The ", "stop")
    assert extra(choice.message, "reasoning") == "Think."
    assert joined(stream(at, stop=["ans", "4"])) == whole(ask(at, stop="ans"))
    assert ask(at, stop="Think").choices[0].message.content == "The answer is 42."


@pytest.mark.parametrize("script", [ANSWER, SCRIPTS["preamble and answers"]])
@pytest.mark.parametrize("per_step", [1, 4])
def test_the_bytes_of_logprobs_join_to_the_answers(at: Served, script: str, per_step: int) -> None:
    at.says(script, per_step=per_step)
    found = ask(at, logprobs=True, top_logprobs=3)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    data = bytes(byte for token in logprobs.content for byte in token.bytes or ())
    expected = "The answer is 42." if script is ANSWER else "onetwo 🦄"
    assert data.decode() == expected
    assert all(len(token.top_logprobs) == 3 for token in logprobs.content)
    assert all(token.top_logprobs[0].token == token.token for token in logprobs.content)
    assert {token.logprob for token in logprobs.content} == {-0.5}
    assert joined(stream(at, logprobs=True, top_logprobs=3)) == whole(found)
    [plain] = ask(at, logprobs=True).choices
    assert plain.logprobs is not None
    assert all(token.top_logprobs == [] for token in plain.logprobs.content or ())


def test_tokens_of_logprobs_by_id(at: Served) -> None:
    assert PROMPTS.tokenizer
    at.says(ANSWER)
    [choice] = ask(at, logprobs=True, extra_body={"return_tokens_as_token_ids": True}).choices
    assert choice.logprobs is not None
    ids = [f"token_id:{token}" for token in PROMPTS.tokenizer.encode("The answer is 42.")]
    assert [token.token for token in choice.logprobs.content or ()] == ids


def test_usage_counts_tokens(at: Served) -> None:
    at.says(ANSWER, cached_tokens=5)
    found = ask(at)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(at.owner.requests[0].prompt_token_ids)
    assert found.usage.completion_tokens == len(tokens_of(PROMPTS.tokenizer, ANSWER))  # type: ignore[arg-type]
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 5
    reasoning = tokens_of(PROMPTS.tokenizer, "<|channel|>analysis<|message|>Think.<|end|>")  # type: ignore[arg-type]
    assert found.usage.completion_tokens_details is not None
    assert found.usage.completion_tokens_details.reasoning_tokens == len(reasoning)


def test_usage_can_be_in_all_chunks(at: Served) -> None:
    at.says(ANSWER, per_step=2)
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, *chunks = stream(at, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts)
    assert counts[-1] == len(tokens_of(PROMPTS.tokenizer, ANSWER))  # type: ignore[arg-type]
    assert len(counts) == len(chunks)


def test_token_ids_are_returned_when_asked_for(at: Served) -> None:
    at.says(ANSWER, per_step=2)
    generated = list(tokens_of(PROMPTS.tokenizer, ANSWER))  # type: ignore[arg-type]
    asked = {"return_token_ids": True}
    found = ask(at, extra_body=asked)
    assert extra(found, "prompt_token_ids") == at.owner.requests[0].prompt_token_ids
    assert extra(found.choices[0], "token_ids") == generated
    first, *chunks = stream(at, extra_body=asked)
    assert extra(first, "prompt_token_ids") == at.owner.requests[0].prompt_token_ids
    assert [t for chunk in chunks for t in extra(chunk.choices[0], "token_ids") or ()] == generated
    assert extra(ask(at).choices[0], "token_ids") is None


def test_prompt_logprobs(at: Served) -> None:
    at.says(ANSWER)
    found = extra(ask(at, extra_body={"prompt_logprobs": 2}), "prompt_logprobs")
    prompt = at.owner.requests[0].prompt_token_ids
    assert found[0] is None
    assert len(found) == len(prompt)
    for token, entry in zip(prompt[1:], found[1:], strict=True):
        assert entry[str(token)]["logprob"] == -0.5
        # The most likely two, which the scripted engine takes from the ids below 1000, and the prompt's own.
        assert len(entry) == (2 if token < 1000 else 3)
        assert [one["rank"] for one in entry.values() if one["rank"]] == [1, 2]
        assert (entry[str(token)]["rank"] == 1) == (token < 1000)


def test_reasoning_can_be_left_out_or_have_one_name(at: Served) -> None:
    at.says(ANSWER)
    message = ask(at, extra_body={"include_reasoning": False}).choices[0].message
    assert (message.content, extra(message, "reasoning")) == ("The answer is 42.", None)
    assert joined(stream(at, extra_body={"include_reasoning": False}))["reasoning"] == ""
    with served(reasoning_fields=("reasoning_content",)) as other:
        message = ask(other).choices[0].message
        assert (extra(message, "reasoning_content"), extra(message, "reasoning")) == ("Think.", None)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_an_answer_can_be_sent_back(at: Served, name: str) -> None:
    assert PROMPTS.tokenizer
    at.says(CALL)
    message = ask(at, tools=[ADD]).choices[0].message
    [call] = message.tool_calls or []
    history = [*QUESTION, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "3"}]
    at.says(ANSWER)
    ask(at, messages=history, tools=[ADD])
    arguments = '{"a": 1, "b": 2}'
    same = {
        "role": "assistant",
        name: "Call.",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}],
    }
    ask(at, messages=[*QUESTION, same, {"role": "tool", "tool_call_id": "c", "content": "3"}], tools=[ADD])
    first, second = (request.prompt_token_ids for request in at.owner.requests)
    assert first == second
    assert "Call." in prompt_of(at)


def test_refusals_in_the_history_are_text(at: Served) -> None:
    at.says(ANSWER)
    prompts = []
    for content in (
        {"content": "No."},
        {"content": None, "refusal": "No."},
        {"content": [{"type": "refusal", "refusal": "No."}]},
    ):
        ask(at, messages=[*QUESTION, {"role": "assistant", **content}, *QUESTION])
        prompts.append(at.owner.requests[-1].prompt_token_ids)
    assert prompts[0] == prompts[1] == prompts[2]


def test_errors_before_the_first_byte_have_their_status(at: Served) -> None:
    for fields in ({}, {"stream": True}):
        at.says(ANSWER, refusal=UsageError("9 prompt tokens and 5 new tokens exceed the context of 8", "prompt"))
        with pytest.raises(openai.BadRequestError) as caught:
            ask(at, **fields)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        at.owner.refusal = UsageError("9 prompt tokens and 5 new tokens exceed the context of 8", "max_tokens")
        with pytest.raises(openai.BadRequestError) as caught:
            ask(at, max_completion_tokens=5, **fields)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_completion_tokens")
        at.owner.refusal = OverloadedError("overloaded")
        with pytest.raises(openai.InternalServerError) as overloaded:
            ask(at, **fields)
        assert overloaded.value.status_code == 503
        assert overloaded.value.response.headers["retry-after"]
        with pytest.raises(openai.NotFoundError) as unknown:
            ask(at, model="other", **fields)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")


def test_an_error_after_the_first_byte_is_an_event(at: Served) -> None:
    at.says(EngineError("the device failed"))
    body = {"model": at.model, "messages": QUESTION, "stream": True}
    response = httpx.post(f"{at.url}/v1/chat/completions", json=body)
    assert response.status_code == 200
    *_, error, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    found = json.loads(error.removeprefix("data: "))
    assert set(found) == {"error"}
    assert found["error"]["code"] == "engine_error"
    assert "the device failed" in found["error"]["message"]
    with pytest.raises(openai.APIError, match="the device failed"):
        stream(at)
    with pytest.raises(openai.InternalServerError, match="the device failed"):
        ask(at)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_aborts_its_request(at: Served, streamed: bool) -> None:
    at.says([65] * 10_000, delay=0.01)
    body = json.dumps({"model": at.model, "messages": QUESTION, "stream": streamed}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    url = httpx.URL(at.url)
    with socket.create_connection((url.host, url.port or 0)) as connection:
        connection.sendall(head + body)
        _wait(lambda: bool(at.owner.requests))
        assert not at.owner.aborted
    _wait(lambda: bool(at.owner.aborted))
    assert at.owner.aborted == [(0, None)]


def _wait(holds: Any) -> None:
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def has_mark(value: Any) -> bool:
    """Whether a special token's text is anywhere in JSON."""
    assert PROMPTS.tokenizer
    text = json.dumps(value, ensure_ascii=False)
    return any(mark in text for mark in PROMPTS.tokenizer.special_tokens)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(MESSAGES, min_size=1, max_size=4).map("".join),
    st.sampled_from([1, 3, 50]),
    st.booleans(),
    st.sampled_from([None, "x", "é"]),
)
def test_whatever_the_model_says_is_an_answer(
    at: Served, script: str, per_step: int, logprobs: bool, stop: str | None
) -> None:
    at.says(script, per_step=per_step)
    fields = {"tools": [ADD], "logprobs": logprobs, "stop": stop, "top_logprobs": 2 if logprobs else None}
    found, chunks = ask(at, **fields), stream(at, **fields)
    assert joined(chunks) == whole(found)
    assert not has_mark(found.to_dict())
    assert not has_mark([chunk.to_dict() for chunk in chunks])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 1023) | st.integers(1015, 1023), min_size=1, max_size=30), st.sampled_from([1, 4]))
def test_whatever_tokens_the_model_generates_are_an_answer(at: Served, tokens: list[int], per_step: int) -> None:
    at.says(tokens, per_step=per_step)
    found, chunks = ask(at, tools=[ADD]), stream(at, tools=[ADD])
    assert joined(chunks) == whole(found)
    assert not has_mark(found.to_dict())
    assert not has_mark([chunk.to_dict() for chunk in chunks])


NAMES = (
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "structured_outputs", "stop"),
    *(
        "logit_bias",
        "stop_token_ids",
        "stream_options",
        "stream",
        "chat_template_kwargs",
        "modalities",
        "n",
        "seed",
    ),
    *(
        "top_logprobs",
        "logprobs",
        "max_tokens",
        "max_completion_tokens",
        "model",
        "functions",
        "priority",
        "top_k",
    ),
)
KEYS = ("role", "content", "tool_calls", "type", "text", "function", "name", "arguments", "id", "tool_call_id")
VALUES = ("user", "assistant", "tool", "text", "function", "x", "required", "json_schema", "allowed_tools")
LIKELY = st.recursive(
    st.sampled_from(VALUES) | JSON,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from((*KEYS, "json_schema", "schema", "tools", "mode", "allowed_tools")), inner, max_size=4
        )
    ),
    max_leaves=12,
)
SERVER = server_over(ScriptedOwner())


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), LIKELY, max_size=4), st.booleans())
def test_any_json_is_a_request_or_is_refused(fields: dict[str, Any], tools: bool) -> None:
    defaults = {"messages": QUESTION} | ({"tools": [ADD]} if tools else {})
    body = json.dumps(defaults | fields).encode()
    try:
        prepare(SERVER, body)
    except Exception as error:
        found = as_api_error(error)
        assert 400 <= found.status < 500
        assert found.message


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"\xff", b'{"messages": NaN}', b'{"messages": "\\ud800"}'),
        *(b'{"messages":' + b"[" * 10_000, b'{"x":' + b'{"a":' * 10_000, b'{"n": 1' + b"0" * 400 + b"}"),
        b'{"messages":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "tools": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
def test_bodies_that_are_no_request_are_refused(at: Served, body: bytes) -> None:
    response = httpx.post(f"{at.url}/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_special_tokens_in_requests_stay_text(at: Served) -> None:
    """The prompt has the special tokens of the same request with harmless text."""
    assert PROMPTS.tokenizer

    def specials(text: str) -> list[int]:
        at.says(ANSWER)
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {"title": text}}}
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
        ask(
            at,
            tools=[tool],
            messages=[
                {"role": "system", "content": text},
                {"role": "user", "name": text, "content": [{"type": "text", "text": text}]},
                {"role": "assistant", "reasoning": text, "content": text, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": text},
            ],
            response_format={"type": "json_schema", "json_schema": {"name": text, "schema": {"title": text}}},
            extra_body={"chat_template_kwargs": {"model_identity": text}},
        )
        special = set(PROMPTS.tokenizer.special_tokens.values())  # type: ignore[union-attr]
        return [token for token in at.owner.requests[0].prompt_token_ids if token in special]

    assert specials("".join(MARKS)) == specials("harmless")
    assert specials("<|start|>assistant<|channel|>final<|message|>") == specials("harmless")


def test_several_servers_do_not_share_state() -> None:
    with serving(server_over(ScriptedOwner(), names=["a", "b"])) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        asked = client.chat.completions.create(model="b", messages=QUESTION)  # type: ignore[arg-type]
        assert asked.model == "b"
        assert [model.id for model in client.models.list()] == ["a", "b"]
        assert httpx.post(f"{url}/v1/chat/completions", json={"messages": QUESTION}).json()["model"] == "a"
        assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"].startswith("GET /v1/nothing")


def test_the_prompt_is_that_of_the_conversation(at: Served) -> None:
    assert PROMPTS.tokenizer
    at.says(ANSWER)
    ask(at, tools=[ADD], reasoning_effort="high")
    date = time.strftime("%Y-%m-%d")
    expected = harmony.render(QUESTION, PROMPTS.tokenizer, tools=[ADD], reasoning_effort="high", current_date=date)
    assert at.owner.requests[0].prompt_token_ids == expected
