"""The data model of harmony conversations: messages with a role, a header and content."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)

ReasoningEffort = Literal["low", "medium", "high"]
REASONING_EFFORTS: tuple[str, ...] = get_args(ReasoningEffort)

MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
CHANNELS = ("analysis", "commentary", "final")

STOP_TOKENS = ("<|return|>", "<|call|>")
"""The special tokens at which generation stops."""


@dataclass(frozen=True)
class FunctionTool:
    """A function that the model may call; `parameters` is a JSON schema, or None if it takes no arguments.

    `strict` says whether calls must follow the schema. The model does not see it.
    """

    name: str
    description: str = ""
    parameters: Any = None
    strict: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class ToolNamespace:
    """A named group of functions; without functions, a tool that takes free text, such as python."""

    name: str
    description: str | None = None
    functions: tuple[FunctionTool, ...] = ()


@dataclass(frozen=True)
class SystemContent:
    """The content of the system message; fields that are None are omitted."""

    model_identity: str | None = MODEL_IDENTITY
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF
    current_date: str | None = None
    reasoning_effort: str | None = "medium"
    valid_channels: tuple[str, ...] = CHANNELS
    channel_required: bool = True
    tools: tuple[ToolNamespace, ...] = ()


@dataclass(frozen=True)
class ResponseFormat:
    """A JSON schema that the final answer should follow."""

    name: str
    schema: Any
    description: str | None = None


@dataclass(frozen=True)
class DeveloperContent:
    """The content of the developer message: instructions, function tools and the response format."""

    instructions: str | None = None
    tools: tuple[ToolNamespace, ...] = ()
    response_format: ResponseFormat | None = None


Content = str | SystemContent | DeveloperContent


@dataclass(frozen=True)
class Message:
    """One message: the header's fields and the content, whose parts are joined without a separator."""

    role: Role
    content: tuple[Content, ...] = ()
    name: str | None = None
    recipient: str | None = None
    channel: str | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class ParsedMessage:
    """A message read from tokens.

    `stop` is the special token that ended it, or None if the tokens ended first. `span` is the range of its tokens,
    start and end (exclusive), header and stop token included. `written` is the header's text before `<|message|>`,
    without the role announced by the prompt, or None if there was no `<|message|>`.
    """

    role: Role
    text: str
    name: str | None = None
    recipient: str | None = None
    channel: str | None = None
    content_type: str | None = None
    stop: str | None = None
    span: tuple[int, int] = (0, 0)
    written: str | None = None


@dataclass(frozen=True)
class ParsedCompletion:
    """The messages of a completion.

    `malformed` lists violations of the format, one line each. `stray` holds the spans of tokens that belong to no
    message; together with the messages' spans they cover every token.
    """

    messages: list[ParsedMessage] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    stray: list[tuple[int, int]] = field(default_factory=list)
