"""Makes the request for the engine from a conversation's items, with errors in the request's own field names."""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.errors import ApiError, as_api_error
from gptoss_jax.serving.api.responses.fields import CreateRequest, response_format, sampling
from gptoss_jax.serving.api.responses.items import Item, to_messages
from gptoss_jax.serving.api.responses.tools import Tools, read_choice
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.prompts import Prompts

_FIELDS = {
    "max_tokens": "max_output_tokens",
    "prompt": "input",
    "messages": "input",
    "logprobs": "top_logprobs",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
"""The Responses API's names of fields of the lower layers."""

_PARTS = {
    ".tool_calls[0].function": "",
    ".tool_calls[0].id": ".call_id",
    ".tool_call_id": ".call_id",
    ".thinking": ".content",
}
"""The names of an item's fields, by those of the message that is made of it."""


@dataclasses.dataclass
class Context:
    """What a response is generated from.

    Args:
      request: the body.
      before: the items of the conversation before.
      given: the request's own items.
      tools: the request's tools.
      date: the date in the system message, as YYYY-MM-DD.
    """

    request: CreateRequest
    before: Sequence[Item]
    given: Sequence[Item]
    tools: Tools
    date: str


def make_request(request_id: str, context: Context, prompts: Prompts, max_model_len: int) -> Request:
    """The request for the engine. Raises ApiError, which names the field."""
    made = _render(request_id, context, prompts, 0)
    room = max_model_len - len(made.prompt_token_ids)
    if context.request.truncation == "auto" and room < _reserve(context.request, max_model_len):
        made = _truncated(request_id, context, prompts, max_model_len) or made
        room = max_model_len - len(made.prompt_token_ids)
    made.priority = context.request.priority or 0
    if (most := context.request.max_output_tokens) is not None and most >= room:
        # The context ends the response before this limit does.
        made.params = dataclasses.replace(made.params, max_tokens=None)
    return made


def _reserve(request: CreateRequest, max_model_len: int) -> int:
    """The tokens of the context that truncation leaves for the response."""
    return min(request.max_output_tokens or max_model_len // 8, max_model_len // 2)


def _truncated(request_id: str, context: Context, prompts: Prompts, max_model_len: int) -> Request | None:
    """The request without as many of the first items as necessary, up to a user's message; None if that is too long."""
    items = [*context.before, *context.given]
    starts = [i for i, item in enumerate(items) if item["type"] == "message" and item["role"] == "user" and i]
    most = max_model_len - _reserve(context.request, max_model_len)

    def made(start: int) -> Request:
        return _render(request_id, context, prompts, start)

    chosen = bisect.bisect_left(starts, True, key=lambda start: len(made(start).prompt_token_ids) <= most)
    return made(starts[chosen]) if chosen < len(starts) else None


def _render(request_id: str, context: Context, prompts: Prompts, start: int) -> Request:
    """The request for the engine, of the instructions and the items from `start` on."""
    request, tools = context.request, context.tools
    places = ["previous_response_id"] * len(context.before)
    places += ["input" if isinstance(request.input, str) else f"input[{i}]" for i in range(len(context.given))]
    made = zip(to_messages([*context.before, *context.given]), places, strict=True)
    said = [(message, place) for message, place in list(made)[start:] if message is not None]
    if request.instructions is not None:
        said.insert(0, ({"role": "developer", "content": request.instructions}, "instructions"))
    options: dict[str, Any] = {
        "tools": tools.functions or None,
        "reasoning_effort": request.effort,
        "response_format": response_format(request),
        "current_date": context.date,
    }
    if (choice := read_choice(request.tool_choice, tools)) != "auto":
        options["tool_choice"] = choice
    if request.parallel_tool_calls is False and tools.functions:
        options["parallel_tool_calls"] = False
    try:
        return prompts.chat_request(request_id, [message for message, _ in said], sampling(request), **options)
    except UsageError as error:
        raise own_error(error, context, [place for _, place in said]) from None


def own_error(error: UsageError, context: Context, places: Sequence[str] = ()) -> ApiError:
    """The error of a lower layer with the request's name of the field; `places` has that of each message."""
    shared, name = as_api_error(error), _own_name(error.field, context, places)
    message = f"{name}: {error.message}" if name else error.message
    return ApiError(shared.status, message, shared.kind, name, shared.code)


def _own_name(field: str | None, context: Context, places: Sequence[str]) -> str | None:
    if field is None:
        return None
    if (found := re.fullmatch(r"messages\[(\d+)\](.*)", field)) and int(found[1]) < len(places):
        place, rest = places[int(found[1])], found[2]
        if "[" not in place:
            # A string of the request, or what is stored.
            return place
        known = next((part for part in _PARTS if rest.startswith(part)), None)
        return place + (rest if known is None else _PARTS[known] + rest.removeprefix(known))
    functions = context.tools.places
    if (found := re.fullmatch(r"tools\[(\d+)\](.*)", field)) and int(found[1]) < len(functions):
        return functions[int(found[1])] + found[2]
    if field.startswith("structured_outputs") and context.request.structured_outputs is None:
        return "text.format.schema" if field == "structured_outputs.json" else "text.format"
    for name, own in _FIELDS.items():
        if field == name or field.startswith((f"{name}.", f"{name}[")):
            return own + field.removeprefix(name)
    return field
