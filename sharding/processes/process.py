"""How a process writes and ends when other threads and libraries may hold it up."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import NoReturn


def keep_output_for_python() -> None:
    """Leave standard output to Python: what libraries write there themselves goes to standard error."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def silence_output() -> None:
    """Python writes nothing to standard output; what libraries write there goes to standard error."""
    sys.stdout.flush()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(2, 1)


def report(line: str) -> None:
    """An error line on standard error, whatever the other threads hold or do."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {' '.join(line.splitlines())}\n".encode(errors="backslashreplace"))


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for anything; what was written is flushed if that takes no waiting."""
    flusher = threading.Thread(target=_flush, daemon=True)
    flusher.start()
    flusher.join(1)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def exit_late(seconds: float, code: int) -> None:
    """`exit_now` after some seconds, which a thread of its own waits."""
    time.sleep(seconds)
    exit_now(code)


def silence_libraries() -> None:
    """Drop what libraries write to standard output themselves, past Python."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
