"""Runs a command: exit codes, and errors as one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from gptoss_jax.commands import signals
from gptoss_jax.commands.printing import streams_guarded, warnings_shown
from gptoss_jax.errors import GptOssError
from sharding.errors import ClusterError, ShardingError
from sharding.processes import current, follows
from sharding.processes.process import exit_now


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command: bad input is one line on standard error and exit code 2, Ctrl-C exits with 130, SIGTERM with 143.

    Of several processes, the others end with this one.
    """
    signals.handle()
    own_process = main.__module__ == "__main__"
    code: int | None
    try:
        with streams_guarded(), warnings_shown():
            code, reason = _outcome(main)
        finished = not code
    except (KeyboardInterrupt, signals.Terminated, BrokenPipeError) as end:
        # The reader of standard output that has left has all that it wanted.
        finished, reason = False, ""
        code = 0 if isinstance(end, BrokenPipeError) else signals.exit_code(end)
    if own_process:
        signals.end_at_once()
    if cluster := current():
        cluster.end(code or 0, reason)
    if own_process and not finished:
        # A step may still be computing. XLA's threads that meet the end of the interpreter abort the process, and those
        # that compile would be waited for.
        exit_now(code or 0)
    if own_process:
        # The interpreter that ends would leave the signals to the system's default.
        signals.ignore()
    sys.exit(code)


def _outcome(main: Callable[[], int | None]) -> tuple[int | None, str]:
    """A command's exit code, and the error that it ended with as other processes are to read it."""
    try:
        code = _flushed(main)
    except (GptOssError, ShardingError) as error:
        reason = " ".join(str(error).splitlines())
        if follows():
            return 2, reason
        print(f"error: {reason}", file=sys.stderr)
        return 2, reason if isinstance(error, ClusterError) else f"process 0: {reason}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130, ""
    except BrokenPipeError:
        raise
    except Exception as error:
        if signalled := signals.exit_code(error):
            print("interrupted", file=sys.stderr)
            return signalled, ""
        if not (cluster := current()):
            raise
        cluster.await_cause()
        traceback.print_exc()
        return 1, f"{'' if follows() else 'process 0: '}{type(error).__name__}: {error}"
    return code, ""


def _flushed(main: Callable[[], int | None]) -> int | None:
    """A command's exit code once all that it has written is out; --help and the like leave by SystemExit."""
    try:
        code = main()
    except signals.Terminated:
        raise
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code
    sys.stdout.flush()
    return code
