"""Chat Completions and Completions, as OpenAI's own client sees them."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.serving.api.support import CALL, ScriptedOwner, server_over, serving

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


def test_an_answer_is_the_same_streamed_or_not() -> None:
    with serving(server_over(ScriptedOwner())) as url, client(url) as asked:
        whole = asked.chat.completions.create(model="gpt-oss-test", messages=QUESTION)
        message = whole.choices[0].message
        assert message.content == "The answer is 42."
        assert message.model_extra is not None
        assert message.model_extra["reasoning"] == message.model_extra["reasoning_content"] == "Think."
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        chunks = list(
            asked.chat.completions.create(
                model="gpt-oss-test", messages=QUESTION, stream=True, stream_options={"include_usage": True}
            )
        )
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == message.content
        assert "".join((delta.model_extra or {}).get("reasoning") or "" for delta in deltas) == "Think."
        assert chunks[-1].usage == whole.usage
        assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]


def test_calls_come_with_name_and_arguments() -> None:
    with serving(server_over(ScriptedOwner(CALL))) as url, client(url) as asked:
        whole = asked.chat.completions.create(model="gpt-oss-test", messages=QUESTION, tools=[ADD])
        [call] = whole.choices[0].message.tool_calls or []
        assert (call.function.name, call.function.arguments) == ("add", '{"a": 1, "b": 2}')
        assert whole.choices[0].finish_reason == "tool_calls"
        assert whole.choices[0].message.content is None


def test_completions_continue_a_prompt() -> None:
    owner = ScriptedOwner([65, 66])
    with serving(server_over(owner)) as url, client(url) as asked:
        whole = asked.completions.create(model="gpt-oss-test", prompt=[1, 2, 3], max_tokens=10)
        assert owner.requests[0].prompt_token_ids == [1, 2, 3]
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 2)


def test_errors_have_openais_shape() -> None:
    with serving(server_over(ScriptedOwner())) as url, client(url) as asked:
        with pytest.raises(openai.NotFoundError) as unknown:
            asked.chat.completions.create(model="other", messages=QUESTION)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            asked.chat.completions.create(model="gpt-oss-test", messages=QUESTION, temperature=-1)
        assert wrong.value.param == "temperature"
        assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"].startswith("GET /v1/nothing")
        assert [model.id for model in asked.models.list()] == ["gpt-oss-test"]
