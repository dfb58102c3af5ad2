"""The harmony response format of gpt-oss: renders conversations to tokens, and parses tokens to messages.

>>> tokens = render([{"role": "user", "content": "hi"}], tokenizer)
>>> completion = parse(sampled, tokenizer)
>>> to_openai(completion.messages), completion.malformed
"""

from gptoss_jax.text.harmony.meaning import Kind, Meaning, meaning
from gptoss_jax.text.harmony.messages import (
    STOP_TOKENS,
    DeveloperContent,
    FunctionTool,
    Message,
    ParsedCompletion,
    ParsedMessage,
    ResponseFormat,
    SystemContent,
    ToolNamespace,
)
from gptoss_jax.text.harmony.openai import (
    SEPARATOR,
    is_tool_call,
    join_texts,
    render,
    to_messages,
    to_openai,
    tool_names,
    tool_recipients,
)
from gptoss_jax.text.harmony.parse import Delta, Event, MessageEnd, MessageStart, StreamParser, parse
from gptoss_jax.text.harmony.render import render_conversation
from gptoss_jax.text.harmony.tools import from_function, function_tools
from gptoss_jax.text.tokenizer import Tokenizer

__all__ = [
    "SEPARATOR",
    "STOP_TOKENS",
    "Delta",
    "DeveloperContent",
    "Event",
    "FunctionTool",
    "Kind",
    "Meaning",
    "Message",
    "MessageEnd",
    "MessageStart",
    "ParsedCompletion",
    "ParsedMessage",
    "ResponseFormat",
    "StreamParser",
    "SystemContent",
    "ToolNamespace",
    "from_function",
    "function_tools",
    "is_tool_call",
    "join_texts",
    "meaning",
    "parse",
    "render",
    "render_conversation",
    "stop_token_ids",
    "to_messages",
    "to_openai",
    "tool_names",
    "tool_recipients",
]


def stop_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids at which generation stops."""
    return tuple(tokenizer.encode_special(name) for name in STOP_TOKENS)
