"""Completions, as OpenAI's own client and lm-eval see them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion

from gptoss_jax.errors import EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api import completions, sampling
from gptoss_jax.serving.api.completions import prepare
from gptoss_jax.serving.api.errors import as_api_error
from gptoss_jax.serving.generated import Request
from gptoss_jax.types import StructuredOutputsParams
from tests.serving.api.support import JSON, PROMPTS, ScriptedOwner, Served, served, server_over

assert PROMPTS.tokenizer
TOKENIZER = PROMPTS.tokenizer
TEXT = "Hello wörld 🦄, and more."
TOKENS = TOKENIZER.encode(TEXT)
RETURN = TOKENIZER.encode_special("<|return|>")
ENDED = [*TOKENS, RETURN]


@pytest.fixture(scope="module")
def at() -> Iterator[Served]:
    with served() as found:
        yield found


def ask(at: Served, prompt: Any = "Say", **fields: Any) -> Completion:
    """A completion of up to 100 tokens."""
    found = at.client.completions.create(**({"model": at.model, "prompt": prompt, "max_tokens": 100} | fields))
    # OpenAI's type does not know that the first of a prompt's tokens has no log-probability.
    return Completion.model_validate(found.to_dict()) if not fields.get("echo") else found


def stream(at: Served, prompt: Any = "Say", **fields: Any) -> list[Completion]:
    """The chunks of a completion."""
    body = {"model": at.model, "prompt": prompt, "max_tokens": 100, "stream": True} | fields
    return list(at.client.completions.create(**body))


def added(chunks: list[Completion], index: int = 0) -> dict[str, Any]:
    """A choice as clients add it up."""
    sums: dict[str, Any] = {"text": "", "finish": [], "logprobs": None, "token_ids": []}
    for choice in (choice for chunk in chunks for choice in chunk.choices if choice.index == index):
        sums["text"] += choice.text
        sums["finish"] += [choice.finish_reason] if choice.finish_reason else []
        sums["token_ids"] += (choice.model_extra or {}).get("token_ids") or []
        if choice.logprobs:
            sums["logprobs"] = sums["logprobs"] or {}
            for name, values in choice.logprobs.to_dict().items():
                sums["logprobs"].setdefault(name, []).extend(values)  # type: ignore[arg-type]
    return sums


def whole(found: Completion, index: int = 0) -> dict[str, Any]:
    """A choice in the shape of `added`."""
    choice = found.choices[index]
    assert choice.index == index
    return {
        "text": choice.text,
        "finish": [choice.finish_reason],
        "logprobs": choice.logprobs.to_dict() if choice.logprobs else None,
        "token_ids": (choice.model_extra or {}).get("token_ids") or [],
    }


def _wait(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_text_is_continued(at: Served) -> None:
    at.says(ENDED)
    found = ask(at)
    [choice] = found.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (TEXT, "stop", None)
    assert found.id.startswith("cmpl-")
    assert (found.object, found.model) == ("text_completion", at.model)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(TOKENIZER.encode("Say"))
    assert found.usage.completion_tokens == len(ENDED)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    [request] = at.owner.requests
    assert (request.prompt_token_ids, request.chat) == (TOKENIZER.encode("Say"), False)


def test_special_tokens_are_not_text(at: Served) -> None:
    at.says([RETURN, *TOKENS, TOKENIZER.encode_special("<|channel|>"), RETURN])
    assert ask(at).choices[0].text == TEXT


def test_the_default_is_sixteen_tokens(at: Served) -> None:
    at.says([65] * 100)
    found = at.client.completions.create(model=at.model, prompt="x")
    assert at.owner.requests[0].params.max_tokens == 16
    assert (found.choices[0].finish_reason, found.usage and found.usage.completion_tokens) == ("length", 16)


@pytest.mark.parametrize("per_step", [1, 3, 100])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True},
        {"logprobs": 2},
        {"logprobs": 2, "echo": True},
        {"logprobs": 0, "stop": "and"},
        {"max_tokens": 3, "logprobs": 1},
        {"max_tokens": 0, "logprobs": 1, "echo": True},
        {"n": 2, "extra_body": {"return_token_ids": True}},
    ],
)
def test_a_stream_adds_up_to_the_choices(at: Served, per_step: int, fields: dict[str, Any]) -> None:
    at.says(lambda request, index: [*TOKENS, *[65] * index, RETURN], per_step=per_step)
    prompts = ["Say é", "x"]
    found = ask(at, prompts, **fields)
    chunks = stream(at, prompts, stream_options={"include_usage": True}, **fields)
    assert len(found.choices) == 2 * fields.get("n", 1)
    for index in range(len(found.choices)):
        assert added(chunks, index) == whole(found, index)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == found.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_the_raw_stream_ends_with_done(at: Served) -> None:
    at.says(ENDED)
    body = {"model": at.model, "prompt": "x", "stream": True}
    response = httpx.post(f"{at.url}/v1/completions", json=body)
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith('data: {"id":"cmpl-') for event in events)
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [TOKENIZER.encode("hi")]),
        ([1, 2], [[1, 2]]),
        (["hi", "there"], [TOKENIZER.encode("hi"), TOKENIZER.encode("there")]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["hi", [2, 3]], [TOKENIZER.encode("hi"), [2, 3]]),
    ],
)
def test_prompts(at: Served, prompt: Any, expected: list[list[int]]) -> None:
    at.says(lambda request, index: [*request.prompt_token_ids, 65 + index, RETURN], per_step=1)
    found = ask(at, prompt, n=2)
    assert sorted(request.prompt_token_ids for request in at.owner.requests) == sorted(expected)
    assert [choice.index for choice in found.choices] == list(range(2 * len(expected)))
    for i, tokens in enumerate(expected):
        for j in range(2):
            assert found.choices[2 * i + j].text == TOKENIZER.decode([*tokens, 65 + j])
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(map(len, expected))
    assert found.usage.completion_tokens == sum(2 * (len(tokens) + 2) for tokens in expected)


def test_prompts_of_a_batch_run_at_the_same_time(at: Served) -> None:
    at.says([65, 66, 67, 68], per_step=1, delay=0.1)
    began = time.monotonic()
    ask(at, ["x"] * 30)
    assert time.monotonic() - began < 3


def test_echoed_logprobs_are_those_that_lm_eval_reads(at: Served) -> None:
    at.says([TOKENS[0], TOKENS[1]])
    prompt = TOKENIZER.encode("The capital of é is")
    found = ask(at, [prompt, prompt[:2]], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    for choice, tokens in zip(found.choices, (prompt, prompt[:2]), strict=True):
        lists = choice.logprobs
        assert lists is not None
        assert lists.tokens is not None
        assert lists.token_logprobs is not None
        assert lists.top_logprobs is not None
        assert lists.text_offset is not None
        assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(tokens) + 1
        assert lists.token_logprobs[0] is lists.top_logprobs[0] is None
        assert lists.token_logprobs[1:] == [-0.5] * len(tokens)
        assert all(max(top.values()) == -0.5 for top in lists.top_logprobs[1:])
        assert choice.text == TOKENIZER.decode(tokens) + TOKENIZER.decode(TOKENS[:1])
        assert lists.text_offset[0] == 0
        assert lists.text_offset[-1] == len(TOKENIZER.decode(tokens))
        assert choice.finish_reason == "length"
    assert all(request.params.prompt_logprobs == 1 for request in at.owner.requests)


def test_every_generated_token_has_logprobs_also_the_last_one(at: Served) -> None:
    """lm-eval leaves out the last, so that a missing stop token would cost it one of the prompt's."""
    at.says([RETURN])
    [choice] = ask(at, [1, 2, 3], echo=True, max_tokens=1, logprobs=1).choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or ()) == 4
    assert (choice.logprobs.tokens or [])[-1] == f"token_id:{RETURN}"
    at.says(ENDED)
    [choice] = ask(at, logprobs=0).choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or ()) == len(ENDED)


@pytest.mark.parametrize("per_step", [1, 100])
def test_offsets_are_places_in_the_text(at: Served, per_step: int) -> None:
    at.says(ENDED, per_step=per_step)
    [choice] = ask(at, "ä 🦄", logprobs=1, echo=True).choices
    assert choice.text == "ä 🦄" + TEXT
    lists = choice.logprobs
    assert lists is not None
    data, at_character = b"", []
    for token in [*TOKENIZER.encode("ä 🦄"), *TOKENS]:
        at_character.append(len(data.decode("utf-8", "ignore")))
        data += TOKENIZER.token_bytes(token)
    assert lists.text_offset == [*at_character, len(choice.text)]
    for token, offset in zip(lists.tokens or (), lists.text_offset or (), strict=True):
        if not token.startswith(("bytes:", "token_id:")):
            assert choice.text[offset:].startswith(token)


def test_tokens_of_part_of_a_character_are_bytes(at: Served) -> None:
    parts = TOKENIZER.encode("🦄")
    assert len(parts) > 1
    at.says([*parts, RETURN])
    [choice] = ask(at, logprobs=1).choices
    assert choice.text == "🦄"
    assert choice.logprobs is not None
    *tokens, _ = choice.logprobs.tokens or ()
    assert all(token.startswith("bytes:\\x") for token in tokens)
    assert bytes.fromhex("".join(tokens).replace("bytes:", "").replace("\\x", "")).decode() == "🦄"


def test_top_logprobs_have_the_chosen_token_too(at: Served) -> None:
    at.says([65, 1010])
    [choice] = ask(at, logprobs=3).choices
    assert choice.logprobs is not None
    first, second = choice.logprobs.top_logprobs or ()
    assert len(first) == 3
    assert first[TOKENIZER.decode([65])] == -0.5
    # The scripted engine's most likely tokens have ids below 1000.
    assert len(second) == 4
    [choice] = ask(at, logprobs=1, extra_body={"return_tokens_as_token_ids": True}).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["token_id:65", "token_id:1010"]


def test_no_tokens_give_the_prompt_alone(at: Served) -> None:
    at.says(ENDED)
    found = ask(at, "Hello there", max_tokens=0, echo=True, logprobs=0)
    [choice] = found.choices
    assert (choice.text, choice.finish_reason) == ("Hello there", "length")
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or ()) == len(TOKENIZER.encode("Hello there"))
    assert found.usage is not None
    assert found.usage.completion_tokens == 0
    assert found.usage.total_tokens == found.usage.prompt_tokens
    at.says([RETURN])
    [choice] = ask(at, max_tokens=0).choices
    assert (choice.text, choice.finish_reason) == ("", "length")
    assert added(stream(at, "Hello there", max_tokens=0, echo=True))["text"] == "Hello there"


@pytest.mark.parametrize("per_step", [1, 100])
def test_stop_strings_are_cut(at: Served, per_step: int) -> None:
    at.says(ENDED, per_step=per_step)
    found = ask(at, stop=[", and", "zzz"], logprobs=1)
    [choice] = found.choices
    assert (choice.text, choice.finish_reason) == ("Hello wörld 🦄", "stop")
    assert choice.logprobs is not None
    data = "".join(choice.logprobs.tokens or ())
    assert "and" not in data
    assert ask(at, stop="zzz").choices[0].text == TEXT


def test_stop_tokens_end_the_text(at: Served) -> None:
    at.says([*TOKENS[:2], 65])
    [choice] = ask(at, logprobs=0, extra_body={"stop_token_ids": [65]}).choices
    assert choice.text == TOKENIZER.decode(TOKENS[:2])
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or ()) == 3


def test_token_ids_and_prompt_logprobs(at: Served) -> None:
    at.says(ENDED, per_step=2)
    fields = {"return_token_ids": True, "prompt_logprobs": 1}
    [choice] = ask(at, [7, 8], extra_body=fields).choices
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == ENDED
    assert choice.model_extra["prompt_token_ids"] == [7, 8]
    assert choice.model_extra["prompt_logprobs"] == [
        None,
        {"8": {"logprob": -0.5, "rank": 1, "decoded_token": TOKENIZER.decode([8])}},
    ]


def test_constraints(at: Served) -> None:
    schema = {"type": "object"}
    for fields, expected in (
        ({"structured_outputs": {"regex": "a"}}, StructuredOutputsParams(regex="a")),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            StructuredOutputsParams(json=schema),
        ),
        ({"response_format": {"type": "text"}}, None),
    ):
        at.says(ENDED)
        ask(at, extra_body=fields)
        assert at.owner.requests[0].params.structured_outputs == expected
        assert at.owner.requests[0].scope == "text"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], None]}, "prompt[1]"),
        ({"prompt": [[1, "a"]]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [TOKENIZER.vocab_size]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"n": 129}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
        ({"stream_options": {}}, "stream_options"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "x"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(at: Served, fields: dict[str, Any], param: str) -> None:
    at.says(ENDED)
    response = httpx.post(f"{at.url}/v1/completions", json={"model": at.model, "prompt": "x"} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not at.owner.requests


def test_best_of_all_choices_and_no_suffix_are_fine(at: Served) -> None:
    at.says(ENDED)
    assert len(ask(at, n=2, best_of=2, suffix="").choices) == 2


def test_batches_are_bounded(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    at.says(ENDED)
    monkeypatch.setattr(completions, "MAX_CHOICES", 4)
    assert len(ask(at, ["x", "y"], n=2).choices) == 4
    with pytest.raises(openai.BadRequestError) as caught:
        ask(at, ["x", "y", "z"], n=2)
    assert caught.value.param == "prompt"
    monkeypatch.setattr(sampling, "MAX_SAMPLED_TOKENS", 5)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(at, [[1, 2], [3]], n=2)
    assert caught.value.param == "n"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_that_is_refused_aborts_the_others(at: Served, streamed: bool) -> None:
    at.says([65] * 1000, delay=0.01)
    submit = at.owner.submit

    async def refuse(request: Request) -> Any:
        if request.prompt_token_ids == [9]:
            raise OverloadedError("overloaded")
        return await submit(request)

    at.owner.submit = refuse  # type: ignore[method-assign]
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            ask(at, [[1], [2], [9], [3]], stream=streamed)
    finally:
        at.owner.submit = submit  # type: ignore[method-assign]
    assert caught.value.status_code == 503
    assert sorted(at.owner.aborted) == [(i, None) for i in range(len(at.owner.requests))]
    assert at.owner.requests


def test_errors_name_the_field(at: Served) -> None:
    message = "9 prompt tokens and 5 new tokens exceed the context of 8"
    for refusal, param, code in (
        (UsageError(message, "max_tokens"), "max_tokens", "context_length_exceeded"),
        (UsageError(message, "prompt"), "prompt", "context_length_exceeded"),
        (UsageError("bad", "structured_outputs.json"), "response_format", None),
    ):
        at.says(ENDED, refusal=refusal)
        for streamed in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(at, stream=streamed)
            assert (caught.value.param, caught.value.code) == (param, code)


def test_an_error_after_the_first_byte_is_an_event(at: Served) -> None:
    def script(request: Request, index: int) -> Any:
        return EngineError("the device failed") if request.prompt_token_ids == [2] else [65] * 1000

    at.says(script, delay=0.001)
    body = {"model": at.model, "prompt": [[1], [2]], "stream": True, "max_tokens": 1000}
    *_, error, done, end = httpx.post(f"{at.url}/v1/completions", json=body).text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_error"
    assert (0, None) in at.owner.aborted
    with pytest.raises(openai.InternalServerError, match="the device failed"):
        ask(at, [[1], [2]], max_tokens=1000)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("prompt", [[1], [[1], [2], [3]]])
def test_a_client_that_leaves_aborts_its_requests(at: Served, streamed: bool, prompt: Any) -> None:
    at.says([65] * 10_000, delay=0.01)
    body = json.dumps({"prompt": prompt, "stream": streamed, "max_tokens": 10_000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    count = 3 if isinstance(prompt[0], list) else 1
    url = httpx.URL(at.url)
    with socket.create_connection((url.host, url.port or 0)) as connection:
        connection.sendall(head + body)
        _wait(lambda: len(at.owner.requests) == count)
        assert not at.owner.aborted
    _wait(lambda: len(at.owner.aborted) == count)
    assert sorted(at.owner.aborted) == [(i, None) for i in range(count)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 1023) | st.integers(1015, 1023) | st.sampled_from(TOKENS), min_size=1, max_size=25),
    st.sampled_from([1, 3, 50]),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([None, "e", "🦄"]),
    st.booleans(),
)
def test_whatever_the_model_generates_is_text(
    at: Served, tokens: list[int], per_step: int, logprobs: int | None, stop: str | None, echo: bool
) -> None:
    at.says([*tokens, RETURN], per_step=per_step)
    fields = {"logprobs": logprobs, "stop": stop, "echo": echo}
    found = ask(at, "é", **fields)
    assert added(stream(at, "é", **fields)) == whole(found)
    ordinary = [token for token in tokens if token not in TOKENIZER.special_tokens.values()]
    text, _, _ = TOKENIZER.decode(ordinary).partition(stop or "\0\0")
    [choice] = found.choices
    assert choice.text == ("é" if echo else "") + text
    if logprobs is not None:
        lists = choice.logprobs
        assert lists is not None
        assert all(0 <= offset <= len(choice.text) for offset in lists.text_offset or ())
        if choice.finish_reason == "stop" and text == TOKENIZER.decode(ordinary):
            assert len(lists.tokens or ()) == len(tokens) + 1 + (len(TOKENIZER.encode("é")) if echo else 0)


NAMES = (
    *("prompt", "echo", "logprobs", "max_tokens", "best_of", "n", "suffix", "response_format", "stop", "seed"),
    *("structured_outputs", "logit_bias", "stream_options", "stop_token_ids", "prompt_logprobs", "min_tokens"),
)
SERVER = server_over(ScriptedOwner())


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_json_is_a_request_or_is_refused(fields: dict[str, Any]) -> None:
    try:
        prepare(SERVER, json.dumps({"prompt": "x"} | fields).encode())
    except Exception as error:
        found = as_api_error(error)
        assert 400 <= found.status < 500
