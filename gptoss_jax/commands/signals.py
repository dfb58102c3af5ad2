"""SIGINT and SIGTERM end a command at any time, after it has cleaned up."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from sharding.processes import current

_OWN = frozenset({"__main__", "gptoss_jax", "sharding", "tools", "benchmarks"})
"""Packages whose code catches a signal's exception only to handle it."""


_arrived: list[tuple[int, float]] = []
"""The signals raised as exceptions so far, and when, in seconds of the monotonic clock."""

ATTRIBUTED = 2.0
"""Errors raised within this many seconds of a signal are attributed to it."""


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C; the signal is sent again if a library drops the exception."""

    def __del__(self) -> None:
        _send_if_lost(self, signal.SIGINT)


class Terminated(SystemExit):
    """SIGTERM; it unwinds like Ctrl-C, so that no partial files or child processes are left behind."""

    def __del__(self) -> None:
        _send_if_lost(self, signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _arrived.append((number, time.monotonic()))
    _end_before_jax_runs(number, frame, b"interrupted\n")
    raise _Interrupted


def _terminate(number: int, frame: FrameType | None) -> None:
    _arrived.append((number, time.monotonic()))
    _end_before_jax_runs(number, frame)
    raise Terminated(128 + number)


def _end_before_jax_runs(number: int, frame: FrameType | None, line: bytes = b"") -> None:
    """End the process while jax is imported or looks for plugins: jax would log a traceback, and nothing has begun."""
    spec = getattr(sys.modules.get("jax"), "__spec__", None)
    early = getattr(spec, "_initializing", False)
    while frame is not None and not early:
        early = frame.f_code.co_name == "discover_pjrt_plugins"
        frame = frame.f_back
    if early and current() is None:
        with contextlib.suppress(OSError):
            os.write(2, line)
        os._exit(128 + number)


def _send_if_lost(error: BaseException, number: int) -> None:
    """Send a signal again when its exception is deleted, unless this project's code has caught it.

    In some places jaxlib drops exceptions raised by the Python functions that it calls, and the command would go on.
    """
    if (reached := error.__traceback__) is not None:
        frame = reached.tb_frame
        caught = frame.f_globals.get("__name__", "").partition(".")[0] in _OWN
        if not caught or frame.f_code in (_interrupt.__code__, _terminate.__code__):
            _send_soon(number)


def _send_soon(number: int) -> None:
    # No thread can start while the interpreter exits.
    with contextlib.suppress(RuntimeError):
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


def _signal_again(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose exception Python cannot propagate, as in jax's garbage-collection callbacks."""
    if not isinstance(lost.exc_value, _Interrupted | Terminated):
        sys.__unraisablehook__(lost)
        return
    # __del__ must not send it as well.
    lost.exc_value.__traceback__ = None
    _send_soon(signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT)


def handle() -> None:
    """Raise SIGTERM, and SIGINT unless it is ignored, as exceptions that no library can drop."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _signal_again


def end_at_once() -> None:
    """Let signals end the process immediately from now on: nothing is left to clean up."""
    _answer(lambda number, frame: os._exit(128 + number))


def ignore() -> None:
    """Ignore signals from now on: the command is done, and the interpreter is about to exit."""
    _answer(signal.SIG_IGN)


def _answer(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def exit_code(error: BaseException) -> int:
    """The exit code for an error caused by a signal, even if a library wrapped it; 0 for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt | Terminated):
            return 128 + (signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT)
        cause = cause.__cause__ or cause.__context__
    if not _arrived:
        return 0
    # jax and extension modules may replace the signal's exception with another; while they are imported, ImportError.
    number, when = _arrived[-1]
    return 128 + number if isinstance(error, ImportError) or time.monotonic() - when < ATTRIBUTED else 0
