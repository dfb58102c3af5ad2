"""The three OpenAI APIs that a load is sent to: the body of a request, and what a streamed event says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Prompt = str | list[int]


class EventError(Exception):
    """An event that reports an error of the server, or that is not of its API; the message is one line."""


class Event(NamedTuple):
    """What a streamed event says.

    `output` is whether it carries output of the model, whose visible text is `text`; `finished` whether it ends the
    output. `input_tokens` and `output_tokens` are the request's usage, None where the event has none.
    """

    output: bool
    text: str = ""
    finished: bool = False
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True)
class Endpoint:
    """One API: its path, the body of a request (of a prompt and its maximum output tokens), and its events."""

    path: str
    body: Callable[[Prompt, int], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], Event]


def error_message(body: Mapping[str, Any]) -> str | None:
    """The message of an error in OpenAI's format, None without one."""
    error = body.get("error")
    if error is None:
        return None
    message = error.get("message") if isinstance(error, Mapping) else error
    return " ".join(str(message or error).split())


def _usage(usage: Mapping[str, Any] | None, prefix: tuple[str, str]) -> tuple[int | None, int | None]:
    if not usage:
        return None, None
    first, second = (usage.get(f"{name}_tokens") for name in prefix)
    return first, second


def _streamed(**fields: Any) -> dict[str, Any]:
    return fields | {"stream": True, "stream_options": {"include_usage": True}}


def _completion_body(prompt: Prompt, output_tokens: int) -> dict[str, Any]:
    return _streamed(prompt=prompt, max_tokens=output_tokens)


def _read_completion(event: Mapping[str, Any]) -> Event:
    usage = _usage(event.get("usage"), ("prompt", "completion"))
    if not (choices := event.get("choices")):
        return Event(False, "", False, *usage)
    text, finished = choices[0].get("text") or "", choices[0].get("finish_reason") is not None
    # A token's text may be empty, such as the first bytes of a character.
    return Event(bool(text) or not finished, text, finished, *usage)


def _chat_body(prompt: Prompt, output_tokens: int) -> dict[str, Any]:
    return _streamed(messages=[{"role": "user", "content": prompt}], max_completion_tokens=output_tokens)


def _read_chat(event: Mapping[str, Any]) -> Event:
    usage = _usage(event.get("usage"), ("prompt", "completion"))
    if not (choices := event.get("choices")):
        return Event(False, "", False, *usage)
    delta, finished = choices[0].get("delta") or {}, choices[0].get("finish_reason") is not None
    text = delta.get("content") or ""
    # Servers stream reasoning under either name. A delta with only the role comes before any output.
    output = text or any(delta.get(name) for name in ("reasoning_content", "reasoning", "tool_calls", "refusal"))
    return Event(bool(output), text, finished, *usage)


def _responses_body(prompt: Prompt, output_tokens: int) -> dict[str, Any]:
    return {"input": prompt, "max_output_tokens": output_tokens, "stream": True}


def _read_responses(event: Mapping[str, Any]) -> Event:
    kind = event["type"]
    if kind.endswith(".delta"):
        # Text, reasoning, refusals and the arguments of tool calls.
        return Event(True, event.get("delta") or "" if kind == "response.output_text.delta" else "")
    if kind in ("response.completed", "response.incomplete"):
        return Event(False, "", True, *_usage(event["response"].get("usage"), ("input", "output")))
    if kind == "response.failed":
        raise EventError(error_message(event["response"]) or "the response failed")
    if kind == "error":
        raise EventError(" ".join(str(event.get("message") or event).split()))
    return Event(False)


ENDPOINTS = {
    "openai": Endpoint("/v1/completions", _completion_body, _read_completion),
    "openai-chat": Endpoint("/v1/chat/completions", _chat_body, _read_chat),
    "openai-responses": Endpoint("/v1/responses", _responses_body, _read_responses),
}
"""By the names of `--backend`."""


def read_event(endpoint: Endpoint, event: Any) -> Event:
    """What a parsed event says. Raises EventError."""
    try:
        if event.get("error") is not None and (message := error_message(event)):
            raise EventError(message)
        return endpoint.read(event)
    except (AttributeError, KeyError, IndexError, TypeError):
        raise EventError(f"unexpected event: {event!r:.120}") from None
