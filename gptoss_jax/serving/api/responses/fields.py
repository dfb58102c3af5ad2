"""The fields of requests to the Responses API, and how they become sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gptoss_jax.serving.api.chat import EFFORTS, Effort
from gptoss_jax.serving.api.errors import bad_request
from gptoss_jax.serving.api.fields import IGNORED, REFUSED, Refused, decode_request
from gptoss_jax.serving.api.objects import StreamOptions
from gptoss_jax.serving.api.sampling import SamplingFields, TopLogprobs, sampling_params
from gptoss_jax.serving.api.server import Server
from gptoss_jax.types import SamplingParams

Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]

ENCRYPTED: Includable = "reasoning.encrypted_content"
LOGPROBS: Includable = "message.output_text.logprobs"

Positive = Annotated[int, Meta(ge=1)]


class Reasoning(msgspec.Struct):
    """`reasoning`; summaries are not made."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class PlainText(msgspec.Struct, tag_field="type", tag="text"):
    """`text.format` without a constraint."""


class JsonObject(msgspec.Struct, tag_field="type", tag="json_object"):
    """`text.format` of any JSON object."""


class JsonSchema(msgspec.Struct, tag_field="type", tag="json_schema"):
    """`text.format` of a JSON schema, which is enforced whether or not it is `strict`."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct):
    """`text`; the verbosity changes nothing."""

    format: PlainText | JsonObject | JsonSchema | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class CreateRequest(SamplingFields, kw_only=True):
    """The body of POST /v1/responses, and of /v1/responses/input_tokens; null is as good as absent."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    include: list[Includable] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Positive | None = None
    max_output_tokens: Positive | None = None
    top_logprobs: TopLogprobs | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
        ]
        | None
    ) = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def includes(self, what: Includable) -> bool:
        """Whether `include` has this."""
        return what in (self.include or ())

    @property
    def effort(self) -> str | None:
        """The model's reasoning effort; None is the default."""
        effort = self.reasoning.effort if self.reasoning else None
        return None if effort is None else EFFORTS[effort]


_USE_TEXT_FORMAT = Refused("not supported; use text.format or structured_outputs")

_REFUSED = REFUSED | {
    **{name: _USE_TEXT_FORMAT for name, refused in REFUSED.items() if "structured_outputs" in refused.reason},
    "response_format": Refused("a field of Chat Completions; use text.format"),
    "messages": Refused("a field of Chat Completions; use input"),
    "conversation": Refused("not supported; use previous_response_id"),
    "prompt": Refused("stored prompts are not supported; use instructions and input"),
    "background": Refused("responses in the background are not supported"),
    "thinking_token_budget": Refused("not supported; use reasoning.effort or max_output_tokens"),
}
_IGNORED = IGNORED | {"client_metadata", "context_management", "access_programs", "image", "background_options"}


def read_request(body: bytes, server: Server) -> CreateRequest:
    """A body as a request. Raises ApiError, which names the field."""
    request = decode_request(server, body, CreateRequest, _REFUSED, _IGNORED)
    if request.n not in (None, 1):
        raise bad_request("n: expected 1, as a response has one completion", "n")
    if request.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs: not supported; use Chat Completions", "prompt_logprobs")
    return request


def sampling(request: CreateRequest) -> SamplingParams:
    """The sampling parameters of a request. Raises UsageError, with their names as fields, and ApiError."""
    given: dict[str, Any] = {"max_tokens": request.max_output_tokens}
    if request.includes(LOGPROBS) or request.top_logprobs:
        given["logprobs"] = request.top_logprobs or 0
    shape = request.text.format if request.text else None
    if shape is None or isinstance(shape, PlainText):
        return sampling_params(request, **given)
    if request.structured_outputs is not None:
        raise bad_request("structured_outputs: expected this or text.format, found both", "structured_outputs")
    constraint = {"json": shape.schema} if isinstance(shape, JsonSchema) else {"json_object": True}
    return sampling_params(request, **given, structured_outputs=constraint)


def response_format(request: CreateRequest) -> Mapping[str, Any] | None:
    """The format as the prompt shows it, in the notation of Chat Completions."""
    match request.text.format if request.text else None:
        case JsonSchema(name, schema, description):
            inner = {"name": name, "schema": schema, "description": description}
            return {"type": "json_schema", "json_schema": inner}
        case JsonObject():
            return {"type": "json_object"}
    return None


def shown_format(request: CreateRequest) -> dict[str, Any]:
    """The format as a response has it."""
    shape = request.text.format if request.text else None
    shown: dict[str, Any] = msgspec.to_builtins(shape or PlainText())
    if isinstance(shape, JsonSchema):
        shown["strict"] = bool(shape.strict)
    return shown
