"""python -m gptoss_jax.harmony render|parse: reads and writes JSON lines."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.commands.files import parse_json
from gptoss_jax.commands.flags import Parser
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import UsageError, named
from gptoss_jax.text.harmony.json_messages import HEADER_FIELDS, read_messages
from gptoss_jax.text.harmony.messages import ROLES, ParsedMessage
from gptoss_jax.text.harmony.openai import render
from gptoss_jax.text.harmony.parse import parse
from gptoss_jax.text.harmony.render import render_conversation
from gptoss_jax.text.tokenizer import Tokenizer

_EMBEDDED = Path(__file__).parent / "embedded"
_OPENAI_OPTIONS = (
    "tools",
    "builtin_tools",
    "reasoning_effort",
    "model_identity",
    "current_date",
    "knowledge_cutoff",
    "response_format",
)
# The last field of each is the other command's output, which can thus be piped in.
_RENDER_FIELDS = (
    "id",
    "harmony_json",
    "messages",
    *_OPENAI_OPTIONS,
    "next_role",
    "auto_drop_analysis",
    "malformed",
)
_PARSE_FIELDS = ("id", "tokens", "role", "strict", "text")
_DESCRIPTION = """\
render: each input line is an object with one of
  "harmony_json"  a conversation in openai-harmony's JSON format, {"messages": [...]}
  "messages"      messages in the neutral format (content objects of type "system" or "developer", header fields
                  such as "channel", or "text" instead of "content", as parse writes; also an empty list), or else
                  OpenAI-style messages, with the options tools, builtin_tools, reasoning_effort, model_identity,
                  current_date, knowledge_cutoff and response_format
and optionally "id", "next_role" (null: none) and "auto_drop_analysis"; the output is {"id", "tokens", "text"}.

parse: each input line is an object with "tokens" and optionally "id", "role" (default assistant; null:
not known) and "strict" (default false); the output is {"id", "messages", "malformed"}.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Raises UsageError naming the input line."""
    parser = Parser(
        prog="python -m gptoss_jax.harmony",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("render", "parse"))
    parser.add_argument(
        "--tokenizer",
        metavar="DIR|NAME",
        default=str(_EMBEDDED),
        help="a directory with a tokenizer.json, or o200k_harmony (default: the embedded model's)",
    )
    options = parser.parse_args(arguments)
    tokenizer = _tokenizer(options.tokenizer)
    handle = _render if options.command == "render" else _parse
    for number, line in enumerate(sys.stdin.buffer, 1):
        if line.strip():
            with named(f"line {number}"):
                found = handle(parse_json(line, None, dict), tokenizer)
            print(json.dumps(found), flush=True)
    return 0


def _tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_dir(name) if os.path.exists(name) or os.sep in name else Tokenizer.from_name(name)


def _check_fields(line: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in line:
        if key not in known:
            raise UsageError("unknown field", key)


def _option(line: Mapping[str, Any], key: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    value = line.get(key, default)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise UsageError(f"expected one of {', '.join(map(json.dumps, allowed))}, found {json.dumps(value)}", key)
    return value


def _render(line: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    _check_fields(line, _RENDER_FIELDS)
    next_role = _option(line, "next_role", "assistant", (*ROLES, None))
    drop = _option(line, "auto_drop_analysis", True, (True, False))
    conversation = line.get("harmony_json")
    if isinstance(conversation, str):
        conversation = parse_json(conversation, "harmony_json", dict)
    if conversation is not None and not isinstance(conversation, Mapping):
        raise UsageError(f"expected an object, found {type(conversation).__name__}", "harmony_json")
    if conversation is None and "messages" not in line:
        raise UsageError("expected a list, found nothing", "messages")
    if conversation is not None or _is_neutral(line["messages"], line):
        with contextlib.nullcontext() if conversation is None else named("harmony_json"):
            messages = read_messages((line if conversation is None else conversation).get("messages"))
            tokens = render_conversation(messages, tokenizer, next_role=next_role, auto_drop_analysis=drop)
    else:
        given = {key: line[key] for key in _OPENAI_OPTIONS if line.get(key) is not None}
        tokens = render(line["messages"], tokenizer, next_role=next_role, auto_drop_analysis=drop, **given)
    return {"id": line.get("id"), "tokens": tokens, "text": tokenizer.decode(tokens)}


def _is_neutral(messages: Any, line: Mapping[str, Any]) -> bool:
    if not isinstance(messages, list) or any(key in line for key in _OPENAI_OPTIONS):
        return False
    return not messages or any(
        isinstance(message, Mapping)
        and (
            isinstance(message.get("content"), Mapping)
            or any(message.get(key) is not None for key in (*HEADER_FIELDS, "text"))
        )
        for message in messages
    )


def _parse(line: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    _check_fields(line, _PARSE_FIELDS)
    tokens = line.get("tokens")
    if not isinstance(tokens, list):
        raise UsageError(
            f"expected a list, found {'nothing' if tokens is None else type(tokens).__name__}", "tokens"
        )
    for index, token in enumerate(tokens):
        if not isinstance(token, int) or isinstance(token, bool):
            raise UsageError(f"expected an integer, found {json.dumps(token)[:80]}", f"tokens[{index}]")
        if not 0 <= token < tokenizer.vocab_size:
            found = f"token {token!s:.30} is outside the vocabulary of {tokenizer.vocab_size}"
            raise UsageError(found, f"tokens[{index}]")
    role = _option(line, "role", "assistant", (*ROLES, None))
    strict = _option(line, "strict", False, (True, False))
    completion = parse(tokens, tokenizer, role, strict=strict)
    messages = [_as_json(message) for message in completion.messages]
    return {"id": line.get("id"), "messages": messages, "malformed": completion.malformed}


def _as_json(message: ParsedMessage) -> dict[str, Any]:
    keys = ("role", "name", "channel", "recipient", "content_type", "text")
    return {key: getattr(message, key) for key in keys}


if __name__ == "__main__":
    run_command(main)
