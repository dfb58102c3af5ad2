import asyncio
import dataclasses
import json
import re
import threading
from collections import Counter
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import types
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types.shared import ErrorResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import DeadlineError, EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api.app import build_app
from gptoss_jax.serving.api.messages.arguments import json_object
from gptoss_jax.serving.api.messages.request import Create, reasoning_effort
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.prompts import Prompts
from tests.serving.api.support import ANSWER, CALL, PROMPTS, ScriptedOwner, server_over, serving
from tests.text.harmony.test_parse import MARKS, MESSAGES, tokens_of

MODEL = "gpt-oss-test"
HI = [{"role": "user", "content": "hi"}]
ADD = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
BASE: dict[str, Any] = {"model": MODEL, "max_tokens": 1000, "messages": HI}
EVENTS = {
    "message_start": types.RawMessageStartEvent,
    "content_block_start": types.RawContentBlockStartEvent,
    "content_block_delta": types.RawContentBlockDeltaEvent,
    "content_block_stop": types.RawContentBlockStopEvent,
    "message_delta": types.RawMessageDeltaEvent,
    "message_stop": types.RawMessageStopEvent,
}
PREAMBLE_AND_CALL = (
    "<|channel|>analysis<|message|>First.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>Second.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1, "b": 2}<|call|>'
)
TWO_CALLS = (
    '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|end|>'
    '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2}<|call|>'
)


def post(server: Server, body: Any, path: str = "/v1/messages") -> httpx.Response:
    async def posting() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = body if isinstance(body, bytes) else json.dumps(body)
            return await client.post(path, content=content, headers={"anthropic-version": "2023-06-01"})

    return asyncio.run(posting())


def answer_to(script: Any = ANSWER, **fields: Any) -> dict[str, Any]:
    """The message that is answered at once, which SDK's class accepts."""
    response = post(server_over(ScriptedOwner(script)), {**BASE, **fields})
    assert response.status_code == 200, response.text
    types.Message.model_validate(response.json(), strict=True)
    return response.json()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each has the name of its type."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = re.fullmatch(r"event: (\w+)\ndata: (.*)", block).groups()
        event = json.loads(data)
        assert event["type"] == name
        found.append(event)
    return found


def streamed(script: Any = ANSWER, **fields: Any) -> list[dict[str, Any]]:
    return events_of(post(server_over(ScriptedOwner(script)), {**BASE, "stream": True, **fields}))


def check_order(events: list[dict[str, Any]]) -> None:
    """Blocks are numbered from 0, do not overlap, and have deltas of their type; SDK's classes accept each event."""
    for event in events:
        EVENTS[event["type"]].model_validate(event, strict=True)
    names = [event["type"] for event in events]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    deltas = {
        "text": r"(text_delta )+",
        "thinking": r"(thinking_delta )*signature_delta ",
        "tool_use": r"(input_json_delta )+",
    }
    written, count = "", 0
    for event in events[1:-2]:
        assert event["index"] == count
        if event["type"] == "content_block_start":
            assert not written
            kind, written = event["content_block"]["type"], "start "
        elif event["type"] == "content_block_delta":
            written += event["delta"]["type"] + " "
        else:
            assert re.fullmatch(f"start {deltas[kind]}", written)
            written, count = "", count + 1
    assert not written


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the SDK makes of the events."""
    message, buffers = None, {}
    for event in events:
        message = accumulate_event(
            event=EVENTS[event["type"]].model_validate(event), current_snapshot=message, json_bufs=buffers
        )
    assert message is not None
    return without_ids(message.to_dict())


def without_ids(value: Any) -> Any:
    """A message without ids, and without the fields that the SDK adds."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if not isinstance(value, dict):
        return value
    added = ("parsed_output",)
    return {key: without_ids(item) for key, item in value.items() if key != "id" and key not in added}


def prompt_of(owner: ScriptedOwner) -> str:
    """The prompt of the last request, without the system message and from the first message after it."""
    text = PROMPTS.need_tokenizer("").decode(owner.requests[-1].prompt_token_ids)
    return text.partition("<|end|>")[2]


def asked(messages: Any, **fields: Any) -> str:
    owner = ScriptedOwner()
    response = post(server_over(owner), {**BASE, "messages": messages, **fields})
    assert response.status_code == 200, response.text
    return prompt_of(owner)


def error_of(response: httpx.Response) -> str:
    """The message of an error in Anthropic's shape."""
    body = response.json()
    assert body["request_id"] == response.headers["request-id"]
    if response.status_code != 413:
        ErrorResponse.model_validate(body, strict=True)
    assert set(body) == {"type", "error", "request_id"}
    assert set(body["error"]) == {"type", "message"}
    assert "\n" not in body["error"]["message"]
    return body["error"]["message"]


def test_the_sdk_creates_a_message() -> None:
    owner = ScriptedOwner()
    with serving(server_over(owner)) as url:
        client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
        message = client.messages.create(**BASE, system="Be brief.", metadata={"user_id": "u"}, service_tier="auto")
        counted = client.messages.count_tokens(model=MODEL, messages=HI, system="Be brief.")
        beta = client.beta.messages.create(**BASE, betas=["context-1m-2025-08-07"])
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Think."
    assert message.content[0].signature
    assert message.content[1].text == beta.content[1].text == "The answer is 42."
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == (
        "assistant",
        MODEL,
        "end_turn",
        None,
    )
    assert message.id.startswith("msg_")
    assert message._request_id.startswith("req_")
    assert message.usage.input_tokens == counted.input_tokens == len(owner.requests[0].prompt_token_ids)
    assert message.usage.output_tokens == len(tokens_of(PROMPTS.tokenizer, ANSWER))
    assert 0 < message.usage.output_tokens_details.thinking_tokens < message.usage.output_tokens
    assert "Be brief." in prompt_of(owner) or "Be brief." in PROMPTS.tokenizer.decode(
        owner.requests[0].prompt_token_ids
    )


def test_the_sdk_streams_a_round_trip_with_tools() -> None:
    owner = ScriptedOwner(lambda request, index: ANSWER if "3" in tail(request) else PREAMBLE_AND_CALL)

    def tail(request: Any) -> str:
        return PROMPTS.tokenizer.decode(request.prompt_token_ids).rpartition("<|start|>functions")[2][:60]

    with serving(server_over(owner)) as url:
        client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
        with client.messages.stream(**BASE, tools=[ADD]) as stream:
            kinds = Counter(event.type for event in stream)
            message = stream.get_final_message()
        assert kinds["text"]
        assert kinds["thinking"]
        assert kinds["input_json"]
        assert [block.type for block in message.content] == ["thinking", "text", "thinking", "tool_use"]
        call = message.content[-1]
        assert call.id.startswith("toolu_")
        assert (call.name, call.input, message.stop_reason) == ("add", {"a": 1, "b": 2}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
        again = [*HI, message.to_param(), {"role": "user", "content": [result]}]
        with client.messages.stream(**{**BASE, "messages": again}, tools=[ADD]) as stream:
            assert stream.get_final_text() == "The answer is 42."
    # The turn is written as the model wrote it, but for the header of the call, which harmony writes so.
    said = PREAMBLE_AND_CALL.replace(
        "assistant<|channel|>commentary to=functions.add", "assistant to=functions.add<|channel|>commentary"
    ).replace('{"a": 1, "b": 2}', '{"a":1,"b":2}')
    assert prompt_of(owner).endswith(
        f"<|start|>user<|message|>hi<|end|><|start|>assistant{said}"
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>3<|end|><|start|>assistant"
    )


@pytest.mark.parametrize("script", [ANSWER, CALL, PREAMBLE_AND_CALL, TWO_CALLS, "Plain.<|return|>", "<|return|>"])
def test_a_stream_adds_up_to_the_answer_at_once(script: str) -> None:
    events = streamed(script, tools=[ADD])
    check_order(events)
    assert folded(events) == without_ids(answer_to(script, tools=[ADD]))


def test_calls_have_ids_and_blocks_of_their_own() -> None:
    message = answer_to(TWO_CALLS, tools=[ADD])
    assert [block["input"] for block in message["content"]] == [{"a": 1}, {"a": 2}]
    assert len({block["id"] for block in message["content"]}) == 2


def test_usage_excludes_cached_tokens() -> None:
    class Cached(ScriptedOwner):
        async def submit(self, request: Any) -> Any:
            stream = await super().submit(request)
            events = stream.events

            async def cached() -> Any:
                return [dataclasses.replace(event, cached_tokens=32) for event in await events()]

            stream.events = cached  # type: ignore[method-assign]
            return stream

    for fields in ({}, {"stream": True}):
        owner = Cached()
        response = post(server_over(owner), {**BASE, **fields})
        message = folded(events_of(response)) if fields else response.json()
        length = len(owner.requests[0].prompt_token_ids)
        usage = message["usage"]
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (length - 32, 32)
        assert usage["cache_creation_input_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "script", "reason", "sequence", "text"),
    [
        ({}, ANSWER, "end_turn", None, "The answer is 42."),
        ({"stop_sequences": ["zzz", "swer is"]}, ANSWER, "stop_sequence", "swer is", "The an"),
        ({"stop_sequences": ["zzz"]}, ANSWER, "end_turn", None, "The answer is 42."),
        ({"stop_sequences": ["Think"]}, ANSWER, "end_turn", None, "The answer is 42."),
        ({"max_tokens": 5}, "one two three four five six seven<|return|>", "max_tokens", None, None),
        ({"max_tokens": 4000}, "a b c d " * 2000, "model_context_window_exceeded", None, None),
        ({"stop_sequences": ["zzz"]}, CALL, "tool_use", None, ""),
    ],
)
def test_stop_reasons(
    fields: dict, script: str, reason: str, sequence: str | None, text: str | None, stream: bool
) -> None:
    owner = ScriptedOwner(script, per_step=64)
    server = server_over(owner, max_model_len=400)
    response = post(server, {**BASE, **fields, "stream": stream})
    message = folded(events_of(response)) if stream else response.json()
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)
    if text is not None:
        assert "".join(block["text"] for block in message["content"] if block["type"] == "text") == text
    if reason == "max_tokens":
        assert message["usage"]["output_tokens"] == 5
    if reason == "model_context_window_exceeded":
        assert len(owner.requests[0].prompt_token_ids) + message["usage"]["output_tokens"] == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("thinking", "first"),
    [
        (None, "Think."),
        ({"type": "enabled", "budget_tokens": 2000}, "Think."),
        ({"type": "adaptive", "display": "summarized"}, "Think."),
        ({"type": "adaptive", "display": "omitted"}, ""),
        ({"type": "disabled"}, None),
    ],
)
def test_thinking_is_shown_as_asked(thinking: Any, first: str | None, stream: bool) -> None:
    message = folded(streamed(thinking=thinking)) if stream else answer_to(thinking=thinking)
    if stream:
        check_order(streamed(thinking=thinking))
    blocks = message["content"]
    assert [block["type"] for block in blocks] == (["text"] if first is None else ["thinking", "text"])
    if first is not None:
        assert blocks[0]["thinking"] == first
        assert blocks[0]["signature"]


def test_omitted_thinking_returns_with_its_signature() -> None:
    message = answer_to(CALL, tools=[ADD], thinking={"type": "adaptive", "display": "omitted"})
    assert message["content"][0]["thinking"] == ""
    result = {"type": "tool_result", "tool_use_id": message["content"][1]["id"], "content": "3"}
    said = {"role": "assistant", "content": message["content"]}
    prompt = asked([*HI, said, {"role": "user", "content": [result]}])
    assert "<|start|>assistant<|channel|>analysis<|message|>Call.<|end|>" in prompt
    for signature in ("text.", "text.?", "text./w==", "other", ""):
        thinking = {"type": "thinking", "thinking": "", "signature": signature}
        asked([*HI, {"role": "assistant", "content": [thinking, said["content"][1]]}, {"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "disabled"}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 4999}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5000}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10000}}, "high"),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "enabled", "budget_tokens": 10000}}, "low"),
        ({"output_config": {"effort": "medium"}}, "medium"),
        ({"output_config": {"effort": "xhigh"}}, "high"),
        ({"output_config": {"effort": "max"}, "thinking": {"type": "disabled"}}, "high"),
    ],
)
def test_reasoning_effort(fields: dict, effort: str | None) -> None:
    import msgspec

    assert reasoning_effort(msgspec.convert({**BASE, **fields}, Create)) == effort
    owner = ScriptedOwner()
    assert post(server_over(owner), {**BASE, **fields}).status_code == 200
    prompt = PROMPTS.tokenizer.decode(owner.requests[0].prompt_token_ids)
    assert f"Reasoning: {effort or 'medium'}\n" in prompt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', '{"a": 1}'),
        (' {"a": 1.10, "b": 123456789012345678901}\n', '{"a": 1.10, "b": 123456789012345678901}'),
        ("", "{}"),
        ("{}", "{}"),
        ('{"a": 1}]', '{"a": 1}'),
        ('{"a": 1}\n```', '{"a": 1}'),
        ('{"code": "x\ny\t"}', r'{"code": "x\ny\t"}'),
        (r'{"a": "\ud800"}', '{"a": "?"}'),
        ('{"command": "rm -rf /tmp/x', "{}"),
        ('{"command": "rm -rf /tmp/x"', "{}"),
        ('{"command": "echo "hi" > x"}', "{}"),
        ("[1]", "{}"),
        ('"text"', "{}"),
        ("plain text", "{}"),
        ('{"a": NaN}', "{}"),
        ('{"a": 1e999}', "{}"),
        ("[" * 10000, "{}"),
        ('{"a":' * 10000, "{}"),
    ],
)
def test_arguments_are_an_object(text: str, expected: str) -> None:
    assert json_object(text) == expected
    script = f"<|channel|>commentary to=functions.add <|constrain|>json<|message|>{text}<|call|>"
    owner = ScriptedOwner(script, per_step=1000)
    server = server_over(owner, max_model_len=60000)
    body = {**BASE, "max_tokens": 50000, "tools": [ADD]}
    [block] = post(server, body).json()["content"]
    assert block["input"] == json.loads(expected)
    events = events_of(post(server, {**body, "stream": True}))
    assert folded(events)["content"][0]["input"] == json.loads(expected)


@given(st.text('{}[]",:\\nu0 a1.e-\n', max_size=30))
@settings(max_examples=300)
def test_any_arguments_are_an_object(text: str) -> None:
    found = json.loads(json_object(text), parse_constant=pytest.fail)
    assert isinstance(found, dict)
    try:
        expected = json.loads(text, parse_constant=lambda name: None)
    except ValueError:
        return
    if isinstance(expected, dict) and "1e" not in text:
        assert found == expected or "\\u" in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_short_is_not_part_of_a_call(stream: bool) -> None:
    script = CALL.replace("1, ", "1, " * 100)
    cut = {"max_tokens": 60, "tools": [ADD]}
    message = folded(streamed(script, **cut)) if stream else answer_to(script, **cut)
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][-1] | {"id": ""} == {"type": "tool_use", "id": "", "name": "add", "input": {}}


def use(call_id: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "add", "input": arguments}


def result(call_id: str, content: Any = "3", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def thinking(value: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": value, "signature": "any"}


def call(arguments: str) -> str:
    return f"<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{arguments}<|call|>"


def said(channel: str, value: str) -> str:
    return f"<|start|>assistant<|channel|>{channel}<|message|>{value}<|end|>"


def returned(value: str) -> str:
    return f"<|start|>functions.add to=assistant<|channel|>commentary<|message|>{value}<|end|>"


def user(value: str) -> str:
    return f"<|start|>user<|message|>{value}<|end|>"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "a"), ("user", [text("b"), text("c", cache_control={"type": "ephemeral"})])], user("a\n\nb\n\nc")),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], user("a") + said("final", "b") + user("c")),
        ([("user", "a"), ("assistant", []), ("user", "c")], user("a") + user("c")),
        (
            # The order of the blocks is kept; text before a call is a preamble.
            [
                ("user", "a"),
                ("assistant", [thinking("t"), text("p"), thinking("u"), use("1", a=1), use("2", a=2)]),
                ("user", [result("2", "two"), result("1", [text("one"), text("more")]), text("x"), text("y")]),
            ],
            user("a")
            + said("analysis", "t")
            + said("commentary", "p")
            + said("analysis", "u")
            + call('{"a":1}')
            + call('{"a":2}')
            + returned("two")
            + returned("one\n\nmore")
            + user("x\n\ny"),
        ),
        (
            # The text and the call of one turn may be in two messages.
            [("user", "a"), ("assistant", "p"), ("assistant", [use("1")]), ("user", [result("1")])],
            user("a") + said("commentary", "p") + call("{}") + returned("3"),
        ),
        (
            [("user", "a"), ("assistant", [use("1")]), ("user", [result("1", "no file", is_error=True)])],
            user("a") + call("{}") + returned("Error: no file"),
        ),
        (
            [("user", "a"), ("assistant", [use("1")]), ("user", [{"type": "tool_result", "tool_use_id": "1"}])],
            user("a") + call("{}") + returned(""),
        ),
        (
            # Text behind a call is an answer, and reasoning before an answer is not kept.
            [
                ("user", "a"),
                ("assistant", [thinking("t"), use("1")]),
                ("user", [result("1")]),
                ("assistant", [thinking("u"), {"type": "redacted_thinking", "data": "?"}, text("b")]),
                ("user", "c"),
            ],
            user("a") + call("{}") + returned("3") + said("final", "b") + user("c"),
        ),
        (
            [("user", "a"), ("system", "now"), ("user", [text("b")])],
            user("a")
            + "<|start|>developer<|message|># Instructions\n\nnow<|end|>"
            + user("b"),
        ),
    ],
)
def test_a_conversation_keeps_its_order(turns: list, expected: str) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    assert asked(messages) == expected + "<|start|>assistant"


def test_a_line_that_changes_with_each_request_is_not_part_of_the_prompt() -> None:
    header = "x-anthropic-billing-header: cc_version=2.1.0; cch=abc;"
    expected = "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>" + user("hi") + "<|start|>assistant"
    for system in (
        "Be brief.",
        f"{header}\nBe brief.",
        [text(header), text("Be brief.", cache_control={"type": "ephemeral"})],
    ):
        assert asked(HI, system=system) == expected
    assert header in asked(HI, system=f"Say {header}")


class RecordingPrompts(Prompts):
    """Notes the options, and leaves out those of tool choice."""

    def __init__(self) -> None:
        self.tokenizer = PROMPTS.tokenizer
        self.options: dict[str, Any] = {}

    def chat_request(self, request_id: str, messages: Any, params: Any, **options: Any) -> Any:
        self.options = dict(options)
        for name in ("tool_choice", "parallel_tool_calls"):
            options.pop(name, None)
        return super().chat_request(request_id, messages, params, **options)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {}),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"parallel_tool_calls": False}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
            {"tool_choice": {"type": "function", "function": {"name": "add"}}, "parallel_tool_calls": False},
        ),
    ],
)
def test_tool_choice(choice: dict, expected: dict) -> None:
    server = dataclasses.replace(server_over(ScriptedOwner()), prompts=RecordingPrompts())
    strict = {**ADD, "type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}}
    assert post(server, {**BASE, "tools": [strict], "tool_choice": choice}).status_code == 200
    options = server.prompts.options  # type: ignore[attr-defined]
    assert options.pop("tools") == [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Adds.",
                "parameters": ADD["input_schema"],
                "strict": True,
            },
        }
    ]
    assert {name: value for name, value in options.items() if value is not None} == expected


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_a_format_constrains_the_answer(field: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "schema": schema}
    owner = ScriptedOwner()
    body = {**BASE, field: {"format": form} if field == "output_config" else form}
    assert post(server_over(owner), body).status_code == 200
    assert owner.requests[0].params.structured_outputs.json == schema
    assert owner.requests[0].scope == "final"
    assert json.dumps(schema, separators=(",", ":")) in prompt_of(owner)
    owner.refusal = UsageError("not a schema", "structured_outputs.json")
    place = "output_config.format" if field == "output_config" else field
    assert error_of(post(server_over(owner), body)) == f"{place}.schema: not a schema"


def test_sampling() -> None:
    owner = ScriptedOwner()
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop_sequences": ["a", "b"]}
    post(server_over(owner), {**BASE, **fields})
    post(server_over(owner), {**BASE, **dict.fromkeys(fields)})
    first, second = (request.params for request in owner.requests)
    assert (first.temperature, first.top_p, first.top_k, first.stop) == (0.5, 0.9, 40, ("a", "b"))
    assert (first.max_tokens, second.temperature, second.stop) == (1000, 1.0, ())


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


def turn(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens: expected an integer from 1"),
        ({"max_tokens": 2**70}, "max_tokens: "),
        ({"max_tokens": "5"}, "max_tokens: "),
        ({"temperature": -1}, "temperature: "),
        ({"top_p": 2}, "top_p: "),
        ({"top_k": -2}, "top_k: "),
        ({"stop_sequences": [""]}, "stop_sequences: "),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences: "),
        ({"stop_sequences": ["a" * 1001]}, "stop_sequences[...]: "),
        ({"messages": []}, "messages: expected at least one"),
        ({"messages": None}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: ") if False else
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[...].role: "),
        ({"messages": [*HI, {"role": "assistant", "content": "The"}]}, "messages: the last message must be"),
        (turn(IMAGE), "messages[0].content[0].type: expected one of text, tool_result, found 'image'"),
        (turn(text("x"), {"type": "document", "source": {}}), "messages[0].content[1].type: expected one of text"),
        (turn({"type": 1}), "messages[0].content[0].type: "),
        (turn({"type": ["text"]}), "messages[0].content[0].type: "),
        (turn({}), "messages[0].content[0].type: "),
        (turn({"type": "text"}), "messages[0].content[0]: "),
        (turn({"type": "text", "text": 1}), "messages[0].content[0].text: "),
        (turn(use("1")), "messages[0].content[0].type: expected text or tool_result, found 'tool_use'"),
        (turn(result("1"), role="assistant"), "messages[0].content[0].type: expected text or thinking"),
        (turn(result("1")), "messages[0].content[0].tool_use_id: expected the id of an earlier tool call"),
        (turn(result("1", [IMAGE])), "messages[0].content[0].content[0].type: expected one of text, found 'image'"),
        (
            {"messages": [*HI, {"role": "assistant", "content": [{**use("1"), "name": "a b"}]}, *HI]},
            "messages[1].content[0].name: expected a name without spaces",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "content": [{**use("1"), "input": "x"}]}, *HI]},
            "messages[1].content[0].input: ",
        ),
        ({"system": [IMAGE]}, "system[0].type: expected one of text, found 'image'"),
        ({"system": 1}, "system: "),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type: 'web_search_20250305'"),
        ({"tools": [ADD, {"type": "bash_20250124", "name": "bash"}]}, "tools[1].type: 'bash_20250124'"),
        ({"tools": [{"type": "text_editor_20250728", "name": "x"}]}, "tools[0].type: 'text_editor_20250728'"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema: "),
        ({"tools": [{**ADD, "name": "a b"}]}, "tools[0].name: "),
        ({"tools": [{**ADD, "name": None}]}, "tools[0].name: "),
        ({"tools": [ADD, ADD]}, "tools[1].name: 'add' is already"),
        ({"tools": [{**ADD, "input_schema": {"type": 1}}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type: 'any' needs tools"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [ADD]}, "tool_choice.name: "),
        ({"tool_choice": {"type": "x"}}, "tool_choice.type: "),
        ({"thinking": {"type": "between_tools"}}, "thinking.type: "),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens: "),
        ({"output_config": {"effort": "most"}}, "output_config.effort: "),
        ({"container": "c"}, "container: not supported"),
        ({"mcp_servers": [{"type": "url", "url": "x", "name": "x"}]}, "mcp_servers: not supported"),
        ({"inference_geo": "us"}, "inference_geo: not supported"),
        ({"messages": [{"role": "user", "content": "x " * 500}]}, "prompt is too long: "),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(fields: dict, message: str, stream: bool) -> None:
    server = server_over(ScriptedOwner(), max_model_len=500)
    response = post(server, {**BASE, **fields, "stream": stream})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert error_of(response).startswith(message), error_of(response)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": "\\ud800"}', b"[" * 100000])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_bodies_that_are_no_request(body: bytes, path: str) -> None:
    response = post(server_over(ScriptedOwner()), body, path)
    assert response.status_code == 400
    error_of(response)


def test_the_prompts_length_is_said_in_the_words_that_clients_read() -> None:
    server = server_over(ScriptedOwner(), max_model_len=200)
    long = {**BASE, "messages": [{"role": "user", "content": "x " * 500}]}
    tokens = post(server, {"model": MODEL, "messages": long["messages"]}, "/v1/messages/count_tokens").json()
    response = post(server, long)
    assert error_of(response) == f"prompt is too long: {tokens['input_tokens']} tokens > 199 maximum"
    owner = ScriptedOwner()
    owner.refusal = UsageError("900 prompt tokens and 1 new tokens exceed the KV cache of 500", "prompt")
    assert error_of(post(server_over(owner), BASE)) == (
        "prompt is too long: 900 prompt tokens and 1 new tokens exceed the KV cache of 500"
    )


@pytest.mark.parametrize(
    ("refusal", "status", "kind", "error"),
    [
        (UsageError("token 9 is outside", "prompt"), 400, "invalid_request_error", anthropic.BadRequestError),
        (OverloadedError("too many requests wait"), 529, "overloaded_error", anthropic.APIStatusError),
        (EngineError("the engine has ended"), 503, "api_error", anthropic.InternalServerError),
        (DeadlineError("not finished in time"), 504, "timeout_error", anthropic.InternalServerError),
        (ValueError("a secret"), 500, "api_error", anthropic.InternalServerError),
    ],
)
def test_errors_of_the_engine_have_their_status(
    refusal: Exception, status: int, kind: str, error: type[anthropic.APIStatusError]
) -> None:
    owner = ScriptedOwner()
    owner.refusal = refusal
    with serving(server_over(owner)) as url:
        client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
        for stream in (False, True):
            with pytest.raises(error) as caught:
                client.messages.create(**BASE, stream=stream)
            assert caught.value.status_code == status
            assert caught.value.type == kind
            assert caught.value.request_id == caught.value.body["request_id"]
            assert "secret" not in str(caught.value)
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(**{**BASE, "model": "claude"})
        assert missing.value.type == "not_found_error"
    if kind == "overloaded_error":
        assert caught.value.response.headers["retry-after"]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(EngineError("it broke"), "api_error"), (OverloadedError("shut down"), "overloaded_error")],
)
def test_an_error_after_the_first_event_is_an_event(failure: Exception, kind: str) -> None:
    server = server_over(ScriptedOwner(lambda request, index: failure))
    *events, error = events_of(post(server, {**BASE, "stream": True}))
    assert events[0]["type"] == "message_start"
    assert "message_stop" not in [event["type"] for event in events]
    ErrorResponse.model_validate(error, strict=True)
    assert error["error"]["type"] == kind
    response = post(server, BASE)
    assert response.json()["error"] == error["error"]
    with serving(server) as url:
        client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
        with pytest.raises(anthropic.APIStatusError) as caught, client.messages.stream(**BASE) as stream:
            stream.until_done()
    assert caught.value.type == kind


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(stream: bool) -> None:
    owner = ScriptedOwner("a b c d " * 1000, per_step=1, delay=0.02)
    with serving(server_over(owner)) as url:
        with (
            httpx.Client(base_url=url, timeout=0.3) as client,
            pytest.raises(httpx.ReadTimeout) if not stream else pytest.raises(StopIteration),
        ):
            if not stream:
                client.post("/v1/messages", json=BASE)
            with client.stream("POST", "/v1/messages", json={**BASE, "stream": True}) as response:
                next(response.iter_bytes())
                raise StopIteration
        for _ in range(200):
            if owner.aborted:
                break
            threading.Event().wait(0.01)
    assert owner.aborted == [(0, None)]


def test_pings_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_jax.serving.api.sse.PING_SECONDS", 0.01)
    owner = ScriptedOwner(per_step=4, delay=0.05)
    events = events_of(post(server_over(owner), {**BASE, "stream": True}))
    assert {"type": "ping"} in events
    check_order([event for event in events if event["type"] != "ping"])
    with serving(server_over(owner)) as url:
        client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
        with client.messages.stream(**BASE) as stream:
            assert stream.get_final_text() == "The answer is 42."


def test_special_tokens_in_a_request_stay_text() -> None:
    def body(word: str) -> dict[str, Any]:
        return {
            **BASE,
            "system": [text(word)],
            "tools": [{**ADD, "description": word, "input_schema": {"type": "object", "description": word}}],
            "messages": [
                {"role": "user", "content": word},
                {"role": "assistant", "content": [thinking(word), text(word), {**use(word, **{word: word}), "name": word}]},
                {"role": "user", "content": [result(word, word), text(word)]},
            ],
        }

    special = set(PROMPTS.tokenizer.special_tokens.values())
    marks = []
    for word in ("plain", *MARKS):
        owner = ScriptedOwner()
        assert post(server_over(owner), body(word)).status_code == 200
        marks.append([token for token in owner.requests[0].prompt_token_ids if token in special])
    assert all(found == marks[0] for found in marks)


@given(st.lists(MESSAGES, max_size=4), st.integers(1, 9), st.sampled_from([[], ["{}"], ["x", "é"]]), st.integers(1, 60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_model_says_the_stream_is_the_answer(
    messages: list[str], per_step: int, stops: list[str], limit: int
) -> None:
    tokens = tokens_of(PROMPTS.tokenizer, "".join(messages) or "<|return|>")
    server = server_over(ScriptedOwner(tokens, per_step=per_step))
    body = {**BASE, "stop_sequences": stops, "max_tokens": limit, "tools": [ADD, {**ADD, "name": "f"}]}
    response = post(server, body)
    assert response.status_code == 200
    types.Message.model_validate(response.json(), strict=True)
    events = events_of(post(server, {**body, "stream": True}))
    check_order(events)
    assert folded(events) == without_ids(response.json())
    for block in response.json()["content"]:
        assert block.get("text") != ""
        assert not any(mark in json.dumps(block) for mark in MARKS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
BLOCK = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image", "redacted_thinking"])},
        optional={
            "text": st.text(max_size=5) | JSON,
            "thinking": st.text(max_size=5) | JSON,
            "signature": st.text(max_size=5) | JSON,
            "id": st.sampled_from(["1", "2"]) | JSON,
            "name": st.sampled_from(["add", "f"]) | JSON,
            "input": st.dictionaries(st.text(max_size=3), JSON, max_size=2) | JSON,
            "tool_use_id": st.sampled_from(["1", "2"]) | JSON,
            "content": st.text(max_size=5) | JSON,
            "is_error": st.booleans() | JSON,
        },
    ),
)
TURN = JSON | st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]) | JSON,
        "content": st.text(max_size=5) | st.lists(BLOCK, max_size=3) | JSON,
    }
)
FIELDS: dict[str, st.SearchStrategy] = {
    "model": st.just(MODEL) | JSON,
    "messages": st.lists(TURN, max_size=4) | JSON,
    "max_tokens": st.integers(1, 9) | JSON,
    "system": st.text(max_size=5) | st.lists(BLOCK, max_size=2) | JSON,
    "stop_sequences": st.lists(st.text(max_size=2), max_size=2) | JSON,
    "temperature": JSON,
    "top_p": JSON,
    "top_k": JSON,
    "stream": st.booleans() | JSON,
    "tools": st.lists(st.just(ADD) | JSON | st.builds(lambda value: {**ADD, "input_schema": value}, JSON), max_size=2)
    | JSON,
    "tool_choice": st.fixed_dictionaries({"type": st.sampled_from(["auto", "tool"]) | JSON}, optional={"name": JSON}),
    "thinking": st.fixed_dictionaries(
        {"type": st.sampled_from(["enabled", "disabled", "adaptive"]) | JSON}, optional={"budget_tokens": JSON}
    ),
    "output_config": st.fixed_dictionaries({}, optional={"effort": JSON, "format": JSON}) | JSON,
    "metadata": JSON,
    "container": JSON,
    "context_management": JSON,
}


@given(
    st.fixed_dictionaries(
        {name: FIELDS[name] for name in ("model", "messages", "max_tokens")},
        optional={name: value for name, value in FIELDS.items()},
    ),
    st.sampled_from(["/v1/messages", "/v1/messages/count_tokens"]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_request_is_answered_or_refused(body: dict, path: str) -> None:
    response = post(server_over(ScriptedOwner()), body, path)
    if response.status_code == 200:
        if "event-stream" in response.headers["content-type"]:
            check_order(events_of(response))
        else:
            kind = types.Message if path == "/v1/messages" else types.MessageTokensCount
            kind.model_validate(response.json(), strict=True)
    else:
        assert 400 <= response.status_code < 500
        error_of(response)
