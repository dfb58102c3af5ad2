"""What is sent between the engine's process and the front: frames of MessagePack.

Both ends are processes of one user on one machine, started from the same installation; nothing here is meant for a
network.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.errors import DeadlineError, EngineError, OverloadedError, UsageError
from gptoss_jax.types import SamplingParams, Scope, TokenLogprobs

HEADER = struct.Struct("<I")
"""The length of a frame, which precedes it, in bytes."""


class Submit(msgspec.Struct, tag=True, array_like=True):
    """A request, to be answered by Accepted with the same `ask`; the prompt's tokens are int32."""

    ask: int
    prompt: bytes
    params: SamplingParams
    scope: Scope
    priority: int
    timeout: float | None


class Abort(msgspec.Struct, tag=True, array_like=True):
    """The end of a request, or of one of its completions."""

    name: str
    index: int | None


class AskLoad(msgspec.Struct, tag=True, array_like=True):
    """Asks for a LoadReply with the same `ask`."""

    ask: int


class Accepted(msgspec.Struct, tag=True, array_like=True):
    """A request was queued under a name, which its events have, or refused with an error."""

    ask: int
    name: str
    error: tuple[str, ...] | None = None


class Events(msgspec.Struct, tag=True, array_like=True):
    """The events of one or more steps, as `packed` makes them."""

    events: list[tuple[Any, ...]]


class LoadReply(msgspec.Struct, tag=True, array_like=True):
    """The engine's load, or why there is none."""

    ask: int
    load: Load | None
    error: tuple[str, ...] | None = None


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The engine takes requests."""

    max_model_len: int
    vocab_size: int


class Ended(msgspec.Struct, tag=True, array_like=True):
    """The engine has ended, with the reason."""

    reason: str


Command = Submit | Abort | AskLoad
Reply = Accepted | Events | LoadReply | Ready | Ended


def encoded(message: Command | Reply) -> bytes:
    """A frame."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


_encoder = msgspec.msgpack.Encoder()
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def packed(event: TokenEvent) -> tuple[Any, ...]:
    """An event's fields; what few events have comes last, and only if there is any of it."""
    head = (event.request_id, event.index, event.token_id, event.finish_reason, event.cached_tokens)
    if (
        event.logprobs is None
        and event.prompt_logprobs is None
        and event.error is None
        and not event.queue_seconds
    ):
        return head
    error = None if event.error is None else error_fields(event.error)
    return (*head, event.logprobs, event.prompt_logprobs, error, event.queue_seconds)


class _Tail(msgspec.Struct, array_like=True):
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    error: tuple[str, ...] | None
    queue_seconds: float


def unpacked(fields: tuple[Any, ...]) -> TokenEvent:
    """The event again."""
    name, index, token, finish, cached = fields[:5]
    event = TokenEvent(name, index, token, None, None, finish, cached)
    if len(fields) > 5:
        rest = msgspec.convert(fields[5:], _Tail)
        event.logprobs, event.prompt_logprobs = rest.logprobs, rest.prompt_logprobs
        event.error = None if rest.error is None else error_of(rest.error)
        event.queue_seconds = rest.queue_seconds
    return event


_ERRORS = {kind.__name__: kind for kind in (EngineError, OverloadedError, DeadlineError)}


def error_fields(error: Exception) -> tuple[str, ...]:
    """An error's class and text; a UsageError's field, too."""
    if isinstance(error, UsageError):
        return ("UsageError", error.message, error.field or "")
    text = str(error).strip().partition("\n")[0]
    if type(error).__name__ in _ERRORS:
        return (type(error).__name__, text)
    return ("EngineError", f"{type(error).__name__}: {text}")


def error_of(fields: tuple[str, ...]) -> Exception:
    """The error again."""
    if fields[0] == "UsageError":
        return UsageError(fields[1], fields[2] or None)
    return _ERRORS[fields[0]](fields[1])
