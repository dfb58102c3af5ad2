"""Runs a command's main function, with exit codes and one-line errors."""

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
    """Run a command and exit the process.

    Bad input is reported in one line on standard error and exits with 2, Ctrl-C exits with 130 and SIGTERM with 143.
    The other processes of a cluster end with this one.
    """
    signals.handle()
    own_process = main.__module__ == "__main__"
    code: int | None
    try:
        with streams_guarded(), warnings_shown():
            code, reason = _outcome(main)
        finished = not code
    except (KeyboardInterrupt, signals.Terminated, BrokenPipeError) as end:
        # A reader that closes standard output has all that it wanted.
        finished, reason = False, ""
        code = 0 if isinstance(end, BrokenPipeError) else signals.exit_code(end)
    if own_process:
        signals.end_at_once()
    if cluster := current():
        cluster.end(code or 0, reason)
    if own_process and not finished:
        # A step may still be running or compiling. At interpreter exit, XLA's threads would abort the process, and
        # compilations would be waited for.
        exit_now(code or 0)
    if own_process:
        # Interpreter exit would restore the signals' default actions.
        signals.ignore()
    sys.exit(code)


def _outcome(main: Callable[[], int | None]) -> tuple[int | None, str]:
    """A command's exit code, and its error as reported to the other processes."""
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
    """A command's exit code, after flushing standard output; --help and the like raise SystemExit."""
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
