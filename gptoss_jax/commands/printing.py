"""Standard streams: any text encoding, closed pipes, and warnings as single lines."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from gptoss_jax.errors import UsageError
from sharding.processes import follows


def dimmed(text: str, stream: TextIO) -> str:
    """The text, dimmed if the stream is a terminal."""
    return f"\033[2m{text}\033[0m" if stream.isatty() else text


class _Guarded:
    """A standard stream that may fail, because its reader has closed it or the disk is full.

    Later output is dropped. The failure is ignored unless the stream is `needed`; then it raises BrokenPipeError or
    UsageError.
    """

    def __init__(self, stream: TextIO | None, name: str, needed: bool) -> None:
        # Python sets the stream to None in a process started without it.
        self._stream, self._name, self._needed = stream or open(os.devnull), name, needed  # noqa: SIM115

    def write(self, text: str) -> int:
        """See TextIO."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """See TextIO."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            # Flushing the buffered text at exit must not raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._needed and isinstance(error, BrokenPipeError):
                raise
            if self._needed:
                raise UsageError(f"{error.strerror or error}", self._name) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


ESCAPED = "gptoss_jax.escaped"
"""The error handler that writes unencodable characters, including lone surrogates, as JSON escapes.

JSON output is thus valid in every encoding.
"""


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPED, _escape)


@contextlib.contextmanager
def streams_guarded() -> Iterator[None]:
    """Guard the standard streams: failures of standard output end the command, those of standard error do not.

    Standard input is read as UTF-8, like files, unless it is a terminal; other bytes become lone surrogates.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors=ESCAPED)
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        # reconfigure() fails if something has already been read.
        with contextlib.suppress(OSError):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    out: Any = _Guarded(sys.stdout, "standard output", needed=True)
    err: Any = _Guarded(sys.stderr, "standard error", needed=False)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _Warnings(logging.Handler):
    """Prints warnings as single lines on standard error, in process 0 only."""

    def emit(self, record: logging.LogRecord) -> None:
        if not follows():
            print(f"warning: {record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Print this project's warnings, such as that of an op without a kernel for the platform."""
    handler = _Warnings(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("gptoss_jax", "sharding", "pallas_kernels")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
