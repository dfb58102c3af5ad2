"""Output and exit of a process in which other threads or libraries may block."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import NoReturn


def keep_output_for_python() -> None:
    """Reserve standard output for Python: redirect direct writes of libraries to standard error."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def silence_output() -> None:
    """Discard Python's standard output, and redirect direct writes of libraries to standard error."""
    sys.stdout.flush()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(2, 1)


def report(line: str) -> None:
    """Print an error line to standard error; locks that other threads hold cannot block it."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {' '.join(line.splitlines())}\n".encode(errors="backslashreplace"))


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for other threads; flushes output if that takes less than a second."""
    flusher = threading.Thread(target=_flush, daemon=True)
    flusher.start()
    flusher.join(1)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def exit_late(seconds: float, code: int) -> None:
    """Call `exit_now` after some seconds; meant to run in a background thread."""
    time.sleep(seconds)
    exit_now(code)


def silence_libraries() -> None:
    """Discard direct writes of libraries to standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
