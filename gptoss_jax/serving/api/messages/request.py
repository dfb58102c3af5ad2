"""The requests, and how they become requests of the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.body import convert
from gptoss_jax.serving.api.errors import ApiError, bad_request
from gptoss_jax.serving.api.fields import Refused, decode_request
from gptoss_jax.serving.api.messages.conversation import Conversation, Turn, conversation
from gptoss_jax.serving.api.messages.events import Events, Reasoning
from gptoss_jax.serving.api.sampling import StopString
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.generated import Request
from gptoss_jax.types import SamplingParams, StructuredOutputsParams

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_BUDGETS = ((10000, "high"), (5000, "medium"), (0, "low"))


class Thinking(msgspec.Struct):
    """Whether the model's reasoning is shown."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Meta(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class Format(msgspec.Struct):
    """The JSON schema of an answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    """The effort and the format of an answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None


class Tool(msgspec.Struct):
    """A tool of the client; other tools lack a schema."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    """Which tools the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """The fields of a request that the prompt depends on, which are all that counting its tokens needs."""

    model: str
    messages: list[Any]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None

    @property
    def format(self) -> tuple[str, Format] | None:
        """The answer's format, after the name of its field; beta requests have a field of their own for it."""
        if self.output_config and self.output_config.format:
            return "output_config.format", self.output_config.format
        return ("output_format", self.output_format) if self.output_format else None


class MessageRequest(CountRequest, kw_only=True):
    """The fields of a request for a message that have an effect."""

    max_tokens: int
    stop_sequences: Annotated[list[StopString], Meta(max_length=64)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


_REFUSED = {
    "container": Refused("not supported"),
    "mcp_servers": Refused("not supported; connect to MCP servers in the client, and pass their tools"),
    "inference_geo": Refused("the server does not know where it is"),
    **dict.fromkeys(
        (
            *("response_format", "structured_outputs"),
            *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        ),
        Refused("not supported; use output_config.format"),
    ),
}
_IGNORED = frozenset(
    (
        *("metadata", "service_tier", "speed", "cache_control", "context_management", "diagnostics"),
        *("user_profile_id", "workspace_id", "anthropic_version", "betas", *MessageRequest.__struct_fields__),
    )
)


@dataclasses.dataclass
class Job:
    """A request of the engine, and the request over HTTP that it is for.

    `fitted` says whether the context ends the answer before `max_tokens` does.
    """

    request: Request
    asked: CountRequest
    model: str
    talk: Conversation
    fitted: bool = False

    @property
    def stream(self) -> bool:
        """Whether the answer is streamed."""
        return isinstance(self.asked, MessageRequest) and bool(self.asked.stream)

    def events(self) -> Events:
        """The events of the answer."""
        return Events(self.request.request_id, self.model, _reasoning(self.asked), self.fitted)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """UsageErrors of the block get the names that fields have in the request over HTTP."""
        with _named(self.asked, self.talk):
            yield


def prepare(server: Server, body: bytes, kind: type[CountRequest]) -> Job:
    """The engine's request for a body; one that only counts tokens is not to be run. Raises ApiError and UsageError."""
    asked = decode_request(server, body, kind, _REFUSED, _IGNORED)
    model = server.name(asked.model)
    if asked.thinking and asked.thinking.budget_tokens is not None:
        server.note_once("thinking.budget_tokens", "chooses the reasoning effort, and does not limit the tokens")
    turns = [convert(turn, Turn, f"messages[{index}]") for index, turn in enumerate(asked.messages)]
    talk = conversation(asked.system, turns)
    if isinstance(asked, MessageRequest) and turns and turns[-1].role == "assistant":
        raise bad_request("messages: the last message must be the user's, since an answer cannot be prefilled")
    with _named(asked, talk):
        params, options = _params(asked), _options(asked)
        request = server.prompts.chat_request(f"msg_{uuid.uuid4().hex[:24]}", talk.messages, params, **options)
    job = Job(request, asked, model, talk)
    if isinstance(asked, MessageRequest) and server.max_model_len:
        _fit(job, server.max_model_len)
    return job


def reasoning_effort(asked: CountRequest) -> str | None:
    """The reasoning effort: None is the model's default.

    `output_config.effort` goes first; its levels above "high" are "high". "disabled" thinking is "low", the least that
    the model can do, and a budget is "low" below 5000 tokens, "medium" below 10000, else "high"; it is no limit.
    """
    if asked.output_config and asked.output_config.effort:
        return _EFFORTS[asked.output_config.effort]
    if asked.thinking is None:
        return None
    if asked.thinking.type == "disabled":
        return "low"
    budget = asked.thinking.budget_tokens
    return None if budget is None else next(effort for least, effort in _BUDGETS if budget >= least)


def _reasoning(asked: CountRequest) -> Reasoning:
    if asked.thinking is None:
        return "shown"
    if asked.thinking.type == "disabled":
        return "hidden"
    return "omitted" if asked.thinking.display == "omitted" else "shown"


def _params(asked: CountRequest) -> SamplingParams:
    given: dict[str, Any] = {}
    if asked.format:
        given["structured_outputs"] = StructuredOutputsParams(json=asked.format[1].schema)
    if isinstance(asked, MessageRequest):
        names = ("max_tokens", "temperature", "top_p", "top_k")
        given |= {name: value for name in names if (value := getattr(asked, name)) is not None}
        given["stop"] = asked.stop_sequences or ()
    return SamplingParams(**given)


def _options(asked: CountRequest) -> dict[str, Any]:
    """The options of `Prompts.chat_request`."""
    options: dict[str, Any] = {"reasoning_effort": reasoning_effort(asked)}
    if asked.format:
        options["response_format"] = {"type": "json_schema", "schema": asked.format[1].schema}
    tools = [convert(tool, Tool, f"tools[{index}]") for index, tool in enumerate(asked.tools or ())]
    if tools:
        options["tools"] = [_function(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
    if asked.tool_choice:
        options |= _choice(asked.tool_choice, [tool.name for tool in tools])
    return options


def _function(place: str, tool: Tool) -> dict[str, Any]:
    """A tool in OpenAI's shape."""
    if tool.type not in (None, "custom"):
        raise bad_request(
            f"{place}.type: {tool.type!r:.80} is not supported; expected a tool with an input_schema",
            f"{place}.type",
        )
    if tool.input_schema is None:
        raise bad_request(f"{place}.input_schema: expected a JSON schema, found nothing", f"{place}.input_schema")
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice, names: list[str | None]) -> dict[str, Any]:
    """`tool_choice` and `parallel_tool_calls` in OpenAI's shape, where they are not the default."""
    options: dict[str, Any] = {}
    if choice.type in ("any", "tool") and not names:
        raise bad_request(f"tool_choice.type: {choice.type!r} needs tools", "tool_choice.type")
    if choice.type == "tool":
        if choice.name not in names:
            raise bad_request(
                f"tool_choice.name: expected the name of a tool, found {choice.name!r:.80}", "tool_choice.name"
            )
        options["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice.type != "auto":
        options["tool_choice"] = {"any": "required", "none": "none"}[choice.type]
    if choice.disable_parallel_tool_use and names:
        options["parallel_tool_calls"] = False
    return options


def _fit(job: Job, context: int) -> None:
    """Limit the tokens to generate to the context. Raises ApiError if the prompt leaves no room."""
    request = job.request
    room = context - len(request.prompt_token_ids)
    if room < 1:
        # Clients find the numbers by this wording, which is Anthropic's, to shorten the conversation.
        tokens = f"{len(request.prompt_token_ids)} tokens > {context - 1} maximum"
        raise ApiError(400, f"prompt is too long: {tokens}", code="context_length_exceeded")
    if request.params.max_tokens is not None and request.params.max_tokens > room:
        job.fitted = True
        request.params = dataclasses.replace(request.params, max_tokens=room)


@contextlib.contextmanager
def _named(asked: CountRequest, talk: Conversation) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        field = error.field and _field(error.field, asked, talk)
        raise UsageError(error.message, field, error.where) from None


def _field(field: str, asked: CountRequest, talk: Conversation) -> str:
    """A field of the request over HTTP for one of the engine's request."""
    name = re.match(r"\w*", field)
    match name and name[0]:
        case "messages":
            return talk.field(field)
        case "tools":
            return field.replace(".function", "", 1).replace(".parameters", ".input_schema", 1)
        case "structured_outputs" | "response_format" if asked.format:
            return f"{asked.format[0]}.schema"
        case "stop":
            return field.replace("stop", "stop_sequences", 1)
    return field
