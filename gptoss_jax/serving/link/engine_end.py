"""The engine's end of the link: carries out the front's commands, and sends it the events of each step."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from gptoss_jax.engine.engine import Engine
from gptoss_jax.errors import EngineError
from gptoss_jax.serving.link.messages import (
    HEADER,
    Abort,
    Accepted,
    AskLoad,
    Command,
    Ended,
    Events,
    LoadReply,
    Ready,
    Reply,
    Submit,
    decode_command,
    encoded,
    error_fields,
    packed,
)
from gptoss_jax.serving.worker import Inbox, Worker
from gptoss_jax.types import is_constrained

COMPILERS = 4
"""Threads for what may take long, such as compiling grammars, so that other requests need not wait."""


class EngineEnd:
    """Serves one front until the front closes its end.

    Args:
      connection: a connected stream socket.
      engine, worker: the engine and its owner.
    """

    def __init__(self, connection: socket.socket, engine: Engine, worker: Worker) -> None:
        self._connection, self._engine, self._worker = connection, engine, worker
        self._sending = threading.Lock()
        self._inbox = Inbox()

    def serve(self) -> None:
        """Carry out commands until the front closes its end, and then drop its requests."""
        self._send(Ready(self._engine.max_model_len, self._engine.config.vocab_size))
        for run in (self._send_events, self._report_end):
            threading.Thread(target=run, name="gptoss-jax link", daemon=True).start()
        with (
            ThreadPoolExecutor(COMPILERS) as pool,
            self._connection.makefile("rb") as frames,
            # A front that was killed may leave part of a frame.
            contextlib.suppress(OSError, msgspec.DecodeError),
        ):
            while len(header := frames.read(HEADER.size)) == HEADER.size:
                self._carry_out(decode_command(frames.read(HEADER.unpack(header)[0])), pool)
        self._worker.leave(self._inbox)

    def _carry_out(self, command: Command, pool: ThreadPoolExecutor) -> None:
        if isinstance(command, Abort):
            self._worker.abort(command.name, command.index)
        elif isinstance(command, AskLoad):
            pool.submit(self._send_load, command.ask)
        elif is_constrained(command.params.structured_outputs, command.scope):
            pool.submit(self._submit, command)
        else:
            self._submit(command)

    def _submit(self, command: Submit) -> None:
        prompt = np.frombuffer(command.prompt, np.int32)
        try:
            self._engine.check(prompt, command.params, command.scope)
            # Events of the request must not be sent before its name.
            with self._sending:
                name = self._worker.submit(
                    prompt,
                    command.params,
                    self._inbox,
                    command.scope,
                    priority=command.priority,
                    timeout=command.timeout,
                )
                self._write(Accepted(command.ask, name))
        except Exception as error:
            self._send(Accepted(command.ask, "", error_fields(error)))

    def _send_events(self) -> None:
        while self._send(Events(list(map(packed, self._inbox.get())))):
            pass

    def _send_load(self, ask: int) -> None:
        try:
            self._send(LoadReply(ask, self._worker.load()))
        except EngineError as error:
            self._send(LoadReply(ask, None, error_fields(error)))

    def _report_end(self) -> None:
        self._send(Ended(str(self._worker.join())))

    def _send(self, message: Reply) -> bool:
        """Send a message; False if the front has gone."""
        with self._sending:
            return self._write(message)

    def _write(self, message: Reply) -> bool:
        try:
            self._connection.sendall(encoded(message))
        except OSError:
            return False
        return True
