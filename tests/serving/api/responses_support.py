"""What tests of the Responses API share: a server whose script can be changed, and a check of streams."""

from __future__ import annotations

import contextlib
import json
import typing
from collections.abc import Iterator
from typing import Any

import httpx
import openai
from openai.types import responses

from tests.serving.api.support import ANSWER, PROMPTS, ScriptedOwner, server_over, serving
from tests.text.harmony.test_parse import MARKS, tokens_of


def _event_classes() -> dict[str, Any]:
    [*classes] = typing.get_args(typing.get_args(responses.ResponseStreamEvent)[0])
    return {typing.get_args(one.model_fields["type"].annotation)[0]: one for one in classes}


EVENT_CLASSES = _event_classes()
ADD = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}
PREAMBLE_AND_CALL = (
    "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a":1,"b":2}<|call|>'
)

TEXTS = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}


class _Owner(ScriptedOwner):
    """A script may also be text and the error that follows it."""

    def _tokens(self, request: Any, index: int) -> tuple[list[int], Exception | None]:
        script = self._script(request, index)
        if isinstance(script, tuple):
            return list(tokens_of(PROMPTS.tokenizer, script[0])), script[1]
        return super()._tokens(request, index)


class Api:
    """A client of a server whose engine generates `script`."""

    def __init__(self) -> None:
        self.script: Any = ANSWER
        self.owner = _Owner(lambda request, index: self.script)
        self.url = ""

    @contextlib.contextmanager
    def running(self, **options: Any) -> Iterator[Api]:
        with serving(server_over(self.owner, **options)) as self.url:
            self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0)
            self.http = httpx.Client(base_url=self.url, timeout=20)
            with self.client, self.http:
                yield self

    @property
    def prompt(self) -> list[int]:
        """The tokens of the last prompt."""
        return self.owner.requests[-1].prompt_token_ids

    def create(self, **body: Any) -> dict[str, Any]:
        """The response to a request, as JSON that OpenAI's type accepts."""
        answer = self.http.post("/v1/responses", json={"input": "Hello"} | body)
        assert answer.status_code == 200, answer.text
        responses.Response.model_validate(answer.json())
        return answer.json()

    def error(self, status: int = 400, **body: Any) -> dict[str, Any]:
        """The error of a request that is refused."""
        answer = self.http.post("/v1/responses", json={"input": "Hello"} | body)
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.json()["error"]

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The checked events of a streamed response."""
        answer = self.http.post("/v1/responses", json={"input": "Hello", "stream": True} | body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return check_stream(answer.text)


def check_stream(text: str) -> list[dict[str, Any]]:
    """The events of a body, which follow all rules of the Responses API."""
    *blocks, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT_CLASSES[event["type"]].model_validate(event)
        events.append(event)
    _check_lifecycle(events)
    return events


def _check_lifecycle(events: list[dict[str, Any]]) -> None:
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1]["response"]
    assert events[-1]["type"] == f"response.{final['status']}"
    for event in events[:2]:
        started = event["response"]
        assert (started["id"], started["status"], started["output"]) == (final["id"], "in_progress", [])
        assert started["usage"] is None
    middle = events[2:-1]
    if final["status"] == "failed":
        [error] = [event for event in middle if event["type"] == "error"]
        assert error is middle[-1]
        middle.pop()
    items: list[dict[str, Any]] = []
    while middle:
        items.append(_check_item(middle, len(items)))
    assert items == final["output"]
    cut = [index for index, item in enumerate(items) if item["status"] != "completed"]
    assert cut in ([], [len(items) - 1])
    if cut:
        assert final["status"] in ("incomplete", "failed")


def _check_item(events: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """Take the events of one item from the front; the item at its end."""
    added = events.pop(0)
    assert (added["type"], added["output_index"]) == ("response.output_item.added", index)
    item = added["item"]
    assert item["status"] == "in_progress"
    kind, texts = TEXTS[item["type"]], []
    has_part = item["type"] != "function_call"
    if has_part:
        assert item["content"] == []
        _take(events, "response.content_part.added", item, index)
    else:
        assert item["arguments"] == ""
    logprobs = []
    while events[0]["type"] == f"{kind}.delta":
        delta = _take(events, f"{kind}.delta", item, index)
        texts.append(delta["delta"])
        logprobs += delta.get("logprobs", [])
    done = _take(events, f"{kind}.done", item, index)
    assert done["text" if has_part else "arguments"] == "".join(texts)
    assert done.get("logprobs", []) == logprobs
    if has_part:
        part = _take(events, "response.content_part.done", item, index)["part"]
        assert part["text"] == "".join(texts)
    ended = events.pop(0)
    assert (ended["type"], ended["output_index"]) == ("response.output_item.done", index)
    same = ("id", "type", "call_id", "name", "namespace", "phase", "role")
    assert [item.get(name) for name in same] == [ended["item"].get(name) for name in same]
    if has_part:
        assert ended["item"]["content"] == [part]
    else:
        assert ended["item"]["arguments"] == "".join(texts)
    return ended["item"]


def _take(events: list[dict[str, Any]], kind: str, item: dict[str, Any], index: int) -> dict[str, Any]:
    event = events.pop(0)
    assert (event["type"], event["item_id"], event["output_index"]) == (kind, item["id"], index)
    assert event.get("content_index", 0) == 0
    return event


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs between two equal ones: ids, times and encrypted text."""

    def without(item: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in item.items() if name not in ("id", "call_id", "encrypted_content")}

    assert isinstance(response["created_at"], int)
    output = [without(item) for item in response["output"]]
    times = ("id", "created_at", "completed_at")
    return {name: value for name, value in response.items() if name not in times} | {"output": output}


def texts_of(value: Any) -> Iterator[str]:
    """All strings in JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from texts_of(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts_of(one)


def has_marks(value: Any) -> bool:
    """Whether a special token is part of any text."""
    return any(mark in text for text in texts_of(value) for mark in MARKS)
