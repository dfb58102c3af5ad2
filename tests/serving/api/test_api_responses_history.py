"""Conversations over several responses: by previous_response_id, by items sent again, and by references to items."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.serving.api.responses import routes
from gptoss_jax.serving.api.responses.sealing import Sealing
from tests.serving.api.responses_support import ADD, PREAMBLE_AND_CALL, Api, check_stream, has_marks, plain
from tests.serving.api.support import ANSWER, CALL, PROMPTS
from tests.text.harmony.test_parse import MARKS, MESSAGES, VALID, tokens_of


@pytest.fixture(scope="module")
def shared() -> Iterator[Api]:
    with Api().running() as api:
        yield api


@pytest.fixture
def api(shared: Api) -> Api:
    shared.script = ANSWER
    return shared


def result(call: dict[str, Any], text: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call["call_id"], "output": text}


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_by_id_has_the_prompts_of_one_that_is_sent_again(
    encrypted: bool, stream: bool, api: Api
) -> None:
    scripts = [PREAMBLE_AND_CALL, CALL, ANSWER, PREAMBLE_AND_CALL, "<|channel|>analysis<|message|>Cut sho"]
    options: dict[str, Any] = {"include": ["reasoning.encrypted_content"]} if encrypted else {}
    sent: list[dict[str, Any]] = []
    new: list[dict[str, Any]] = [{"role": "user", "content": "1+2?"}]
    previous = None
    for turn, script in enumerate([*scripts, ANSWER]):
        own = {"instructions": f"Turn {turn}.", "tools": [{**ADD, "description": f"Adds {turn}."}]}
        own["reasoning"] = {"effort": ["low", "medium", "high"][turn % 3]}
        api.script = script
        sent += new
        whole = api.create(**own, **options, input=sent, store=False)
        resent = api.prompt
        body = {**own, **options, "input": new, "previous_response_id": previous}
        response = api.stream(**body)[-1]["response"] if stream else api.create(**body)
        assert api.prompt == resent
        text = PROMPTS.tokenizer.decode(resent)
        assert text.count("# Instructions\n\nTurn") == text.count("// Adds") == 1
        assert (f"Turn {turn}." in text, f"Adds {turn}." in text) == (True, True)
        assert plain(response) == plain(whole) | {"previous_response_id": previous, "store": True}
        previous = response["id"]
        sent += [without_content(item) if encrypted else item for item in whole["output"]]
        # The conversation by id has ids of its own for calls.
        calls = [
            [item for item in made["output"] if item["type"] == "function_call"] for made in (whole, response)
        ]
        new = [result(call, "3") for call in calls[1]] or [{"role": "user", "content": "And then?"}]
        for mine, other in zip(*calls, strict=True):
            for item in sent:
                if item.get("call_id") == mine["call_id"]:
                    item["call_id"] = other["call_id"]
    assert len(sent) > 2 * len(scripts)


def without_content(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if item["type"] != "reasoning" or name != "content"}


def test_openais_client_continues_conversations(api: Api) -> None:
    create = api.client.responses.create
    api.script = PREAMBLE_AND_CALL
    first = create(model="gpt-oss-test", input="1+2?", tools=[ADD])
    call = first.output[-1]
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    create(model="gpt-oss-test", input=[answer], tools=[ADD], previous_response_id=first.id)
    by_id = api.prompt
    create(model="gpt-oss-test", input=[{"role": "user", "content": "1+2?"}, *first.output, answer], tools=[ADD])
    assert api.prompt == by_id
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    create(model="gpt-oss-test", input=[{"role": "user", "content": "1+2?"}, *references, answer], tools=[ADD])
    assert api.prompt == by_id
    untyped = [{"id": item.id} for item in first.output]
    last = create(model="gpt-oss-test", input=[{"role": "user", "content": "1+2?"}, *untyped, answer], tools=[ADD])
    assert api.prompt == by_id
    # References are resolved in the list of what was sent.
    types = [item.type for item in api.client.responses.input_items.list(last.id, order="asc")]
    assert types == ["message", "reasoning", "message", "function_call", "function_call_output"]


def test_a_conversation_outlives_its_earlier_responses(api: Api) -> None:
    first = api.create(input="One")
    second = api.create(input="Two", previous_response_id=first["id"])
    api.create(input="Three", previous_response_id=second["id"])
    prompt = api.prompt
    api.client.responses.delete(first["id"])
    assert api.error(404, previous_response_id=first["id"])["param"] == "previous_response_id"
    assert api.error(404, input=[{"type": "item_reference", "id": first["output"][0]["id"]}])
    api.create(input="Three", previous_response_id=second["id"])
    assert api.prompt == prompt


def test_a_conversation_keeps_its_date(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.date):
        now = datetime.date(2026, 12, 31)

        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return cls.now

    monkeypatch.setattr(routes_module().datetime, "date", Clock)
    first = api.create(input="One")
    Clock.now = datetime.date(2027, 1, 1)
    api.create(input="Two", previous_response_id=first["id"])
    assert "Current date: 2026-12-31" in PROMPTS.tokenizer.decode(api.prompt)
    api.create(input="Two")
    assert "Current date: 2027-01-01" in PROMPTS.tokenizer.decode(api.prompt)


def routes_module() -> Any:
    import sys

    return sys.modules[routes.__module__]


def test_what_is_not_stored_has_no_continuation(api: Api) -> None:
    made = api.create(store=False)
    assert api.error(404, previous_response_id=made["id"])["code"] == "previous_response_not_found"
    second = api.create(input="Two", previous_response_id=api.create(input="One")["id"], store=False)
    assert api.error(404, previous_response_id=second["id"])


def test_encrypted_reasoning(api: Api) -> None:
    include = ["reasoning.encrypted_content"]
    response = api.create(include=include, store=False)
    reasoning, message = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Think."}]
    assert "Think" not in reasoning["encrypted_content"]
    assert "encrypted_content" not in api.create()["output"][0]
    streamed = api.stream(include=include)
    done = [event["item"] for event in streamed if event["type"] == "response.output_item.done"]
    assert done[0]["encrypted_content"] == streamed[-1]["response"]["output"][0]["encrypted_content"]
    # The model sees reasoning until there is an answer.
    api.create(input=[{"role": "user", "content": "x"}, without_content(reasoning)])
    assert "<|channel|>analysis<|message|>Think.<|end|>" in PROMPTS.tokenizer.decode(api.prompt)
    sealed = reasoning["encrypted_content"]
    for wrong in (sealed[:-8] + "AAAAAAAA", sealed[8:], "é", "!", Sealing().seal("Think.", ""), sealed + "\n"):
        item = without_content(reasoning) | {"encrypted_content": wrong}
        error = api.error(input=[{"role": "user", "content": "x"}, item])
        assert error["param"] == "input[1].encrypted_content"
        assert error["code"] == "invalid_encrypted_content"
    assert message["type"] == "message"


def test_the_ids_of_items_are_kept_and_distinct(api: Api) -> None:
    message = {"role": "user", "content": "x", "type": "message"}
    made = api.create(
        input=[{**message, "id": "msg_1"}, {**message, "id": "msg_1"}, {**message, "id": "/"}, message]
    )
    ids = [item.id for item in api.client.responses.input_items.list(made["id"], order="asc")]
    assert ids[0] == "msg_1"
    assert len(set(ids)) == 4
    assert all(one.startswith("msg_") for one in ids)


SCRIPTS = st.one_of(
    st.lists(MESSAGES, max_size=4).map("".join),
    st.lists(
        st.sampled_from([*MARKS, "assistant", "final", " to=functions.add", "{}", "é", "x y"]), max_size=12
    ).map("".join),
    st.tuples(st.integers(0, 60), st.integers(0, 60), st.sampled_from(MARKS)).map(
        lambda cut: VALID[: cut[0]] + cut[2] + VALID[cut[0] + cut[1] :]
    ),
)


@settings(max_examples=60, deadline=None)
@given(script=SCRIPTS, per_step=st.integers(1, 7), most=st.none() | st.integers(1, 40), stop=st.booleans())
def test_whatever_the_model_says(script: str, per_step: int, most: int | None, stop: bool, shared: Api) -> None:
    """It is answered, streamed as not, and can be sent back; special tokens are nowhere part of the text."""
    api = shared
    tokens = tokens_of(PROMPTS.tokenizer, script) or tokens_of(PROMPTS.tokenizer, "<|return|>")
    api.script, api.owner._per_step = tokens, per_step
    body = {"tools": [ADD], "max_output_tokens": most, "stop": ["x"] if stop else None, "top_logprobs": 1}
    whole = api.create(**body)
    streamed = api.stream(**body)[-1]["response"]
    assert plain(streamed) == plain(whole)
    assert not has_marks(whole["output"])
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] <= whole["usage"]["output_tokens"]
    api.script = ANSWER
    results = [result(item, "3") for item in whole["output"] if item["type"] == "function_call"]
    new = [*results, {"role": "user", "content": "Go on."}]
    api.create(tools=[ADD], input=new, previous_response_id=whole["id"])
    by_id = api.prompt
    api.create(tools=[ADD], input=[{"role": "user", "content": "Hello"}, *whole["output"], *new])
    assert api.prompt == by_id


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_client_sends(data: st.DataObject, shared: Api) -> None:
    """It is answered, or refused with an error that has OpenAI's shape."""
    api = shared
    api.script, api.owner._per_step = ANSWER, 4
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=4), st.sampled_from(["message", "function", "function_call", "reasoning", "user", "auto"]),
    )  # fmt: skip
    names = st.sampled_from(
        ["type", "role", "content", "text", "id", "name", "call_id", "output", "tools", "mode"]
    )
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=8,
    )
    fields = [
        *(
            "input",
            "instructions",
            "tools",
            "tool_choice",
            "text",
            "reasoning",
            "include",
            "metadata",
            "temperature",
        ),
        *("max_output_tokens", "top_logprobs", "top_p", "truncation", "previous_response_id", "stop", "seed", "n"),
        *("parallel_tool_calls", "logit_bias", "stream", "store", "background", "model", "unknown"),
    ]
    body = {"input": "Hello"} | data.draw(st.dictionaries(st.sampled_from(fields), values, max_size=3))
    answer = api.http.post("/v1/responses", json=body)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif body.get("stream"):
        check_stream(answer.text)
