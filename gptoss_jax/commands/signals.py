"""SIGINT and SIGTERM end a command at any moment, with what it has begun undone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from sharding.processes import current

_OWN = frozenset({"__main__", "gptoss_jax", "sharding", "tools", "benchmarks"})
"""Packages whose code catches the exception of a signal only where it is done with it."""


_arrived: list[int] = []
"""The signals that have been raised as exceptions."""


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C; sent again where a library drops it."""

    def __del__(self) -> None:
        _send_if_lost(self, signal.SIGINT)


class Terminated(SystemExit):
    """SIGTERM unwinds as Ctrl-C does, so that nothing half-written and no process that was started is left behind."""

    def __del__(self) -> None:
        _send_if_lost(self, signal.SIGTERM)


def _interrupt(number: int, frame: object) -> None:
    _arrived.append(number)
    _end_an_import(number, b"interrupted\n")
    raise _Interrupted


def _terminate(number: int, frame: object) -> None:
    _arrived.append(number)
    _end_an_import(number)
    raise Terminated(128 + number)


def _end_an_import(number: int, line: bytes = b"") -> None:
    """End a process that is importing jax, which has begun nothing: jaxlib would print a traceback, and then fail."""
    spec = getattr(sys.modules.get("jax"), "__spec__", None)
    if getattr(spec, "_initializing", False) and current() is None:
        with contextlib.suppress(OSError):
            os.write(2, line)
        os._exit(128 + number)


def _send_if_lost(error: BaseException, number: int) -> None:
    """Send a signal again whose exception is gone, unless code of this project has caught it.

    jaxlib drops what is raised in the Python functions that it calls in some places, and the command would go on.
    """
    if (reached := error.__traceback__) is not None:
        frame = reached.tb_frame
        caught = frame.f_globals.get("__name__", "").partition(".")[0] in _OWN
        if not caught or frame.f_code in (_interrupt.__code__, _terminate.__code__):
            _send_soon(number)


def _send_soon(number: int) -> None:
    # The interpreter that is ending starts no threads.
    with contextlib.suppress(RuntimeError):
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


def _signal_again(lost: sys.UnraisableHookArgs) -> None:
    """What a signal raises is lost where Python takes no exceptions, as in jax's part of garbage collection."""
    if not isinstance(lost.exc_value, _Interrupted | Terminated):
        sys.__unraisablehook__(lost)
        return
    # It is sent from here.
    lost.exc_value.__traceback__ = None
    _send_soon(signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT)


def handle() -> None:
    """SIGTERM, and SIGINT unless it is ignored, are raised as exceptions that no library can drop."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _signal_again


def end_at_once() -> None:
    """Signals end the process from now on: nothing is left to be undone."""
    _answer(lambda number, frame: os._exit(128 + number))


def ignore() -> None:
    """Signals change nothing from now on: all is done, and the interpreter ends."""
    _answer(signal.SIG_IGN)


def _answer(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def exit_code(error: BaseException) -> int:
    """The exit code of a command that a signal ended, also where a library made its own error of it; else 0."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt | Terminated):
            return 128 + (signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT)
        cause = cause.__cause__ or cause.__context__
    # An extension module that is being imported, such as jaxlib, drops what was raised and fails.
    return 128 + _arrived[-1] if _arrived and isinstance(error, ImportError) else 0
