"""The process that checks grammars: it may take too long or too much memory, and is then ended.

It is started with a socket as its standard input, over which length-prefixed MessagePack goes in both directions.
"""

from __future__ import annotations

import resource
import signal
import socket
import struct
from io import BufferedRWPair
from typing import Any

import msgspec

LENGTH = struct.Struct(">I")
MEMORY = 2 * 2**30
"""Bytes of address space."""


class Question(msgspec.Struct, array_like=True):
    """The field of StructuredOutputsParams that is set, its value, and the seconds of CPU time for it."""

    field: str
    value: str | dict | list | bool
    seconds: float


class Verdict(msgspec.Struct, array_like=True):
    """The message and field of the UsageError of a grammar; no message if it can be used."""

    message: str | None = None
    field: str | None = None


def frame(value: msgspec.Struct) -> bytes:
    """A message as it is sent."""
    data = msgspec.msgpack.encode(value)
    return LENGTH.pack(len(data)) + data


def _verdict(question: Question) -> Verdict:
    from gptoss_jax.errors import UsageError
    from gptoss_jax.text import structured
    from gptoss_jax.types import StructuredOutputsParams

    # The kernel ends the process, whatever it is doing, after this much CPU time, so a busy machine is no reason.
    signal.setitimer(signal.ITIMER_PROF, question.seconds)
    try:
        fields: dict[str, Any] = {question.field: question.value}
        structured.check(StructuredOutputsParams(**fields))
    except UsageError as error:
        return Verdict(error.message, error.field)
    except (MemoryError, RecursionError):
        return Verdict("too large or nested too deeply", f"structured_outputs.{question.field}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return Verdict()


def _serve(stream: BufferedRWPair) -> None:
    while len(length := stream.read(LENGTH.size)) == LENGTH.size:
        question = msgspec.msgpack.decode(stream.read(*LENGTH.unpack(length)), type=Question)
        stream.write(frame(_verdict(question)))
        stream.flush()


def main() -> None:
    """Answer questions until the other end of the socket is closed; an empty verdict says that it is ready."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as connection, connection.makefile("rwb") as stream:
        _verdict(Question("json_object", True, 60.0))
        stream.write(frame(Verdict()))
        stream.flush()
        _serve(stream)


if __name__ == "__main__":
    main()
