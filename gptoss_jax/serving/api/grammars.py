"""Checks the grammars of requests in other processes, so that a hostile one neither holds up nor ends the server."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from gptoss_jax.errors import EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api.grammar_worker import LENGTH, Question, Verdict, frame
from gptoss_jax.types import StructuredOutputsParams

CPU_SECONDS = 0.7
"""Seconds of CPU time that the check of a grammar may take."""

WALL_SECONDS = 10.0
"""Seconds that it may take, on a machine that is busy with other things."""

START_SECONDS = 60.0
"""Seconds that a process may take to start."""

MAX_BYTES = 2**19
"""Bytes of a grammar."""

MAX_WAITING = 64
"""Grammars that are checked or wait for it at once."""

CACHED = 1024
"""Verdicts that are kept."""

_logger = logging.getLogger(__name__)


class GrammarChecks:
    """Checks grammars in `processes` processes of about 40 MB each, which have no jax.

    They are not those of multiprocessing, which run the main module again and read pickles. A process that takes too
    long or too much memory is replaced.
    """

    def __init__(
        self, processes: int = 2, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS
    ) -> None:
        self._size, self._cpu_seconds, self._wall_seconds = processes, cpu_seconds, wall_seconds
        self._verdicts: collections.OrderedDict[bytes, Verdict] = collections.OrderedDict()
        self._checks: dict[bytes, asyncio.Task[Verdict]] = {}
        self._free: asyncio.Queue[_Process] = asyncio.Queue()
        self._processes: list[_Process] = []

    def start(self) -> None:
        """Start the processes, as the first check does."""
        while len(self._processes) < self._size:
            self._add()

    async def close(self) -> None:
        """End the processes, and the checks that are running."""
        checks, self._size = list(self._checks.values()), 0
        for task in checks:
            task.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        for process in self._processes:
            process.end()
        await asyncio.gather(*(process.ended for process in self._processes), return_exceptions=True)
        self._processes.clear()

    async def check(self, params: StructuredOutputsParams | None) -> None:
        """Check a request's grammar.

        Raises UsageError, which names the field, for one that cannot be used or takes too long to compile,
        OverloadedError if too many are being checked, and EngineError if the processes do not start.
        """
        if params is None or params.json_object:
            return
        names = [field.name for field in dataclasses.fields(params)]
        name, value = next((name, v) for name in names if (v := getattr(params, name)) is not None)
        question = _question(name, value, self._cpu_seconds)
        digest = hashlib.sha256(question).digest()
        verdict = self._verdicts.get(digest) or await self._asked(digest, question, name)
        if verdict.message is not None:
            raise UsageError(verdict.message, verdict.field)

    async def _asked(self, digest: bytes, question: bytes, name: str) -> Verdict:
        """The verdict of a process; requests that leave do not end the check, which others may wait for."""
        check = self._checks.get(digest)
        if check is None:
            if len(self._checks) >= MAX_WAITING:
                raise OverloadedError("overloaded: too many grammars are being checked")
            check = self._checks[digest] = asyncio.ensure_future(self._ask(question, name))
            check.add_done_callback(lambda done: self._note(digest, done))
        return await asyncio.shield(check)

    def _note(self, digest: bytes, check: asyncio.Task[Verdict]) -> None:
        del self._checks[digest]
        if not check.cancelled() and check.exception() is None:
            self._verdicts[digest] = check.result()
            if len(self._verdicts) > CACHED:
                self._verdicts.popitem(last=False)

    async def _ask(self, question: bytes, name: str) -> Verdict:
        self.start()
        process = await self._free.get()
        try:
            await process.started()
            async with asyncio.timeout(self._wall_seconds):
                verdict = await process.answer(question)
        except EngineError:
            self._replace(process)
            raise
        except (TimeoutError, EOFError, OSError):
            # It took too much time or memory; the kernel ends it for the former.
            self._replace(process)
            return Verdict("takes too long or too much memory to compile", f"structured_outputs.{name}")
        except BaseException:
            self._replace(process)
            raise
        self._free.put_nowait(process)
        return verdict

    def _add(self) -> None:
        process = _Process()
        self._processes.append(process)
        self._free.put_nowait(process)

    def _replace(self, process: _Process) -> None:
        process.end()
        self._processes.remove(process)
        self.start()


def _question(name: str, value: Any, seconds: float) -> bytes:
    """The question about a grammar, as it is sent. Raises UsageError if it is too large."""
    field = f"structured_outputs.{name}"
    if not isinstance(value, str):
        value = dict(value) if isinstance(value, Mapping) else list(value)
    try:
        question = frame(Question(name, value, seconds))
    except RecursionError:
        raise UsageError("nested too deeply", field) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"not valid JSON: {error}", field) from None
    if len(question) > MAX_BYTES:
        raise UsageError(f"expected at most {MAX_BYTES} bytes, found {len(question)}", field)
    return question


class _Process:
    """A process that checks grammars, which starts in the background."""

    def __init__(self) -> None:
        self._starting = asyncio.ensure_future(self._start())
        self._popen: subprocess.Popen[bytes] | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def started(self) -> None:
        """Wait until it can be asked. Raises EngineError if it does not start."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.shield(self._starting)
        except (TimeoutError, EOFError, OSError) as error:
            _logger.error("a process that checks grammars did not start: %r", error)
            raise EngineError("structured output cannot be checked; the server's log has the details") from None

    async def answer(self, question: bytes) -> Verdict:
        """The verdict on a question. Raises EOFError or OSError if the process ends before."""
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(question)
        await writer.drain()
        return await self._read(reader)

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._starting.cancel()
        if self._streams:
            self._streams[1].close()
        if self._popen:
            self._popen.kill()
            self.ended = asyncio.ensure_future(asyncio.to_thread(self._popen.wait))
        else:
            self.ended.cancel()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.callback(ours.close)
            self._popen = _popen(theirs)
            self._streams = await asyncio.open_unix_connection(sock=ours)
            unless_started.pop_all()
        await self._read(self._streams[0])

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> Verdict:
        [length] = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return msgspec.msgpack.decode(await reader.readexactly(length), type=Verdict)


def _popen(connection: socket.socket) -> subprocess.Popen[bytes]:
    """Start a process with a socket as its standard input; Ctrl-C at the terminal does not reach it."""
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "gptoss_jax.serving.api.grammar_worker"],
        stdin=connection.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
