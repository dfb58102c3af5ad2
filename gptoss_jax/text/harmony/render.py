"""Renders messages to tokens: header, content and special tokens, each encoded separately."""

from collections.abc import Sequence

from gptoss_jax.errors import UsageError
from gptoss_jax.text.harmony.messages import Content, DeveloperContent, Message, SystemContent
from gptoss_jax.text.harmony.tools import render_tools
from gptoss_jax.text.harmony.typescript import to_json
from gptoss_jax.text.tokenizer import Tokenizer

_CONSTRAIN = "<|constrain|>"


def render_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    next_role: str | None = "assistant",
    auto_drop_analysis: bool = True,
) -> list[int]:
    """The tokens of a conversation, up to the beginning of a message of `next_role` (None: the conversation alone).

    With `auto_drop_analysis` the reasoning before the first final answer is omitted if the assistant's last message is
    a final answer, as in openai-harmony. Raises UsageError for a message that cannot be rendered.
    """
    has_functions = any(
        namespace.name == "functions" and namespace.functions
        for message in messages
        for content in message.content
        if isinstance(content, DeveloperContent)
        for namespace in content.tools
    )
    finals = [index for index, message in enumerate(messages) if message.channel == "final"]
    channels = [message.channel for message in messages if message.role == "assistant"]
    drop_before = finals[0] if auto_drop_analysis and finals and channels and channels[-1] == "final" else 0
    tokens: list[int] = []
    for index, message in enumerate(messages):
        if not (index < drop_before and message.channel == "analysis"):
            tokens += _message(index, message, tokenizer, has_functions)
    if next_role is not None:
        tokens += [tokenizer.encode_special("<|start|>"), *tokenizer.encode(next_role)]
    return tokens


def _message(index: int, message: Message, tokenizer: Tokenizer, has_functions: bool) -> list[int]:
    special, encode = tokenizer.encode_special, tokenizer.encode
    tokens = [special("<|start|>")]
    if message.role == "tool":
        if message.name is None:
            raise UsageError("expected the tool's name, found nothing", f"messages[{index}].name")
        tokens += encode(message.name)
    else:
        tokens += encode(message.role)
        if message.name is not None:
            tokens += encode(f":{message.name}")
    if message.recipient is not None and message.recipient != "all":
        tokens += encode(f" to={message.recipient}")
    if message.channel is not None:
        tokens += [special("<|channel|>"), *encode(message.channel)]
    if message.content_type is not None:
        if message.content_type.startswith(_CONSTRAIN):
            rest = message.content_type.removeprefix(_CONSTRAIN)
            tokens += [*encode(" "), special(_CONSTRAIN), *encode(rest)]
        else:
            tokens += encode(f" {message.content_type}")
    tokens.append(special("<|message|>"))
    for content in message.content:
        tokens += encode(_content(index, message.role, content, has_functions))
    is_call = message.role == "assistant" and message.recipient is not None
    return [*tokens, special("<|call|>" if is_call else "<|end|>")]


def _content(index: int, role: str, content: Content, has_functions: bool) -> str:
    if isinstance(content, str):
        return content
    belongs, written = (
        ("system", _system(content, has_functions))
        if isinstance(content, SystemContent)
        else ("developer", _developer(content))
    )
    if role != belongs:
        raise UsageError(f"{belongs} content in a message of role {role}", f"messages[{index}].content")
    return written


def _system(content: SystemContent, has_functions: bool) -> str:
    top = [
        content.model_identity,
        _labelled("Knowledge cutoff", content.knowledge_cutoff),
        _labelled("Current date", content.current_date),
    ]
    lines = [line for line in top if line is not None]
    sections = ["\n".join(lines)] if lines else []
    if content.reasoning_effort is not None:
        sections.append(f"Reasoning: {content.reasoning_effort}")
    if content.tools:
        sections.append(render_tools(content.tools))
    if content.valid_channels:
        channels = f"# Valid channels: {', '.join(content.valid_channels)}."
        if content.channel_required:
            channels += " Channel must be included for every message."
        if has_functions:
            channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(channels)
    return "\n\n".join(sections)


def _labelled(label: str, value: str | None) -> str | None:
    return None if value is None else f"{label}: {value}"


def _developer(content: DeveloperContent) -> str:
    sections = []
    if content.instructions is not None:
        sections += ["# Instructions", content.instructions]
    if content.tools:
        sections.append(render_tools(content.tools))
    if content.response_format is not None:
        shape = content.response_format
        described = "".join(f"// {line}\n" for line in (shape.description or "").splitlines())
        sections += ["# Response Formats", f"## {shape.name}", described + to_json(shape.schema)]
    return "\n\n".join(sections)
