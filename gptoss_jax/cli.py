"""What the commands share: flags in one spelling, and errors as one line."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gptoss_jax.errors import GptOssError, UsageError, named
from sharding.errors import ClusterError, ShardingError
from sharding.multihost import current
from sharding.process import exit_now

if TYPE_CHECKING:
    from gptoss_jax.engine.engine import EngineOptions
    from gptoss_jax.engine.params import SamplingParams, StructuredOutputsParams
    from gptoss_jax.llm import LLM


BUILTIN_TOOLS = ("browser", "python")

JSON_KINDS = {
    dict: "a JSON object",
    list: "a JSON list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
"""What the types that JSON is read as are called."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, as every other wrong input is."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(message)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of these names, with commas between."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, found {name!r}")
        return names

    return parse


def sizes(text: str) -> list[int]:
    """The type of a flag that takes sizes with commas between."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 1,8,32, found {text!r:.60}") from None


def _not_empty(text: str) -> str:
    """The type of a flag whose value says something: an empty one comes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path or a name, found ''")
    return text


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser for `python -m gptoss_jax.<command>`."""
    return Parser(prog=f"python -m gptoss_jax.{command}", description=description)


def add_model_flags(
    flags: argparse.ArgumentParser,
    model: str = "a checkpoint's directory, or a Hub name such as openai/gpt-oss-20b",
) -> None:
    """Which model, and how it runs; `model` says what the flag takes."""
    group = flags.add_argument_group("model")
    group.add_argument(
        "--model",
        type=_not_empty,
        metavar="PATH|NAME",
        help=f"{model} (default: the small model that ships with the project)",
    )
    group.add_argument(
        "--mesh",
        metavar="MESH",
        help="devices to run on: expert=4,tensor=2 (also data=), or a preset of configs/meshes (default: one device; "
        "with several processes, experts over all devices)",
    )
    group.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all but the experts"
    )
    group.add_argument(
        "--kernels",
        metavar="reference|auto|NAME",
        help="what computes: plain JAX, the platform's kernels (default), or the backend of that name",
    )


def add_cluster_flags(flags: argparse.ArgumentParser) -> None:
    """Which processes run together."""
    group = flags.add_argument_group(
        "several processes",
        "The same command in each; process 0 reads and prints. On TPU pods, under Slurm, Open MPI and in "
        "indexed Jobs of Kubernetes none of these is needed.",
    )
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument(
        "--num-processes", type=int, metavar="N", help="how many there are; 1 for one alone, whatever is detected"
    )
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


def add_engine_flags(flags: argparse.ArgumentParser, max_batch: bool = True) -> None:
    """How much runs at once, and what the cache may take."""
    group = flags.add_argument_group("engine")
    if max_batch:
        group.add_argument("--max-batch", type=int, metavar="N", help="sequences that run together (default: 8)")
    group.add_argument(
        "--kv-cache-memory", type=int, metavar="BYTES", help="of each device (default: a share of what is free)"
    )
    group.add_argument("--kv-cache-dtype", choices=("bfloat16", "float32", "float8"), help="default: as --dtype")
    group.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="prompt tokens of one sequence in a step (2048; on CPUs 512)",
    )
    group.add_argument(
        "--step-tokens", type=int, metavar="N", help="prompt tokens of all sequences in a step (as many)"
    )
    group.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its beginning")
    group.add_argument(
        "--speculative-tokens",
        type=int,
        metavar="N",
        help="guess N tokens a step from the text so far, and verify them",
    )
    group.add_argument(
        "--warm-up",
        action="store_true",
        help="compile every kind of step at the start, not when it is first needed",
    )


def add_sampling_flags(flags: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    group = flags.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="default: what the context holds")
    group.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest token")
    group.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens")
    group.add_argument(
        "--min-p", type=float, default=0.0, help="keep tokens this likely relative to the likeliest"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="repeat the same tokens (default: a new seed each time)"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")


def add_structure_flags(flags: argparse.ArgumentParser) -> None:
    """The form of the answer."""
    group = flags.add_argument_group(
        "structured output (extra: structured)",
        "Of a chat's final answer, after any reasoning; of all of --raw text.",
    ).add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE|JSON", help="the answer is JSON that this schema describes")
    group.add_argument("--regex", metavar="REGEX", help="the answer matches this regular expression")
    group.add_argument("--grammar", type=Path, metavar="FILE", help="a Lark or GBNF grammar of the answer")


def add_conversation_flags(flags: argparse.ArgumentParser) -> None:
    """What the conversation's opening messages say."""
    group = flags.add_argument_group("conversation")
    group.add_argument("--instructions", metavar="TEXT", help="the developer message")
    group.add_argument("--tools", type=Path, metavar="FILE", help="a JSON list of OpenAI-style function tools")
    group.add_argument(
        "--builtin-tools",
        type=_names(BUILTIN_TOOLS),
        default=[],
        metavar=",".join(BUILTIN_TOOLS),
        help="tools that gpt-oss was trained on",
    )
    group.add_argument("--reasoning-effort", choices=("low", "medium", "high"), default="medium")


def sampling_params(options: argparse.Namespace, **more: Any) -> SamplingParams:
    """The sampling flags as SamplingParams. Raises UsageError, naming the field."""
    from gptoss_jax.engine.params import SamplingParams

    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
    given = {name: getattr(options, name) for name in names}
    return SamplingParams(max_tokens=options.max_new_tokens, **given, **more)


def structured_outputs(options: argparse.Namespace) -> StructuredOutputsParams | None:
    """The form that a flag asks for, checked. Raises UsageError, naming the flag."""
    from gptoss_jax.engine.params import StructuredOutputsParams
    from gptoss_jax.structured import check

    if options.json_schema is not None:
        flag, text = "--json-schema", options.json_schema
        form = StructuredOutputsParams(json=text if text[:1] == "{" else read_text(Path(text), flag))
    elif options.regex is not None:
        flag, form = "--regex", StructuredOutputsParams(regex=options.regex)
    elif options.grammar is not None:
        flag, form = "--grammar", StructuredOutputsParams(grammar=read_text(options.grammar, "--grammar"))
    else:
        return None
    try:
        check(form)
    except UsageError as error:
        raise UsageError(f"{flag}: {str(error).partition(': ')[2]}") from None
    return form


def conversation_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `LLM.chat` takes besides messages, from the flags; a schema of the answer is shown to the model, too."""
    form = structured_outputs(options) if getattr(options, "json_schema", None) else None
    return {
        "tools": read_tools(options.tools, "--tools") if options.tools else None,
        "builtin_tools": options.builtin_tools,
        "reasoning_effort": options.reasoning_effort,
        "response_format": form and {"type": "json_schema", "schema": json.loads(str(form.json))},
    }


def join(command: str, options: argparse.Namespace) -> Callable[[], int] | None:
    """Meet the other processes, if there are any; what this one is then to do where it only follows."""
    from gptoss_jax import multihost

    if (cluster := multihost.join(command, options)) is not None:
        # The others are to end with a process that dies.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return (lambda: multihost.follow(cluster, options)) if cluster and follows() else None


def load_llm(options: argparse.Namespace, **more: Any) -> LLM:
    """The model of the flags; in all processes where there are several."""
    if cluster := current():
        from gptoss_jax import multihost

        return multihost.lead(cluster, options, more)

    from gptoss_jax.llm import LLM
    from gptoss_jax.loading import EMBEDDED

    engine = engine_options(options, **more)
    return LLM(options.model or EMBEDDED, options.mesh, options.dtype, engine=engine, warm_up=options.warm_up)


def engine_options(options: argparse.Namespace, **more: Any) -> EngineOptions:
    """The engine flags as EngineOptions; `more` has precedence. Raises UsageError, naming the field."""
    from gptoss_jax.engine.engine import EngineOptions

    names = [
        *("max_batch", "kv_cache_memory", "kv_cache_dtype", "prefill_chunk", "step_tokens"),
        *("speculative_tokens", "kernels"),
    ]
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    return dataclasses.replace(EngineOptions(**given, prefix_cache=not options.no_prefix_cache), **more)


@contextlib.contextmanager
def by_flag(options: argparse.Namespace) -> Iterator[None]:
    """What runs here names a field that cannot be used as Python does; report it by the flag that sets it."""
    given = vars(options)
    try:
        yield
    except (UsageError, ShardingError) as error:
        # Of a single prompt it goes without saying which request it is.
        message = str(error).removeprefix("request prompt: ")
        field, _, rest = message.partition(":")
        name = {"max_tokens": "max_new_tokens"}.get(field, field)
        if name == "prompt" and given.get("prompt_tokens") is not None:
            name = "prompt_tokens"
        if name in given and name != "prompt":
            raise UsageError(f"--{name.replace('_', '-')}:{rest}") from None
        if isinstance(error, ShardingError) and not isinstance(error, ClusterError) and given.get("mesh"):
            raise UsageError(f"--mesh: {given['mesh']}: {message}") from None
        raise type(error)(message) from None


def read_text(path: Path, flag: str) -> str:
    """A text file named by a flag, less the byte order mark that some editors write. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{flag}: {path}: not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{flag}: {path}: {error.strerror}") from None


def check_writable(path: Path, flag: str) -> None:
    """Before the work whose result a file is for: raises UsageError where it could not be written. None is made yet."""
    try:
        there = path.exists()
        if there and not path.is_file():
            raise UsageError(f"{flag}: {path}: expected a regular file")
        if not os.access(path if there else path.absolute().parent, os.W_OK):
            raise UsageError(f"{flag}: {path}: expected a place that can be written")
    except OSError as error:
        raise UsageError(f"{flag}: {path}: {error.strerror}") from None


def parse_json(text: str, where: str, kind: type) -> Any:
    """JSON whose outermost value is a `kind`. Raises UsageError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise UsageError(f"{where}: expected {JSON_KINDS[kind]}, found {JSON_KINDS[type(value)]}")
    return value


def read_json(path: Path, flag: str, kind: type) -> Any:
    """A JSON file named by a flag, whose outermost value is a `kind`. Raises UsageError."""
    return parse_json(read_text(path, flag), f"{flag}: {path}", kind)


def read_tools(path: Path, flag: str) -> list[Any]:
    """The function tools of a JSON file named by a flag. Raises UsageError."""
    from gptoss_jax.harmony.tools import function_tools

    tools: list[Any] = read_json(path, flag, list)
    with named(f"{flag}: {path}"):
        function_tools(tools)
    return tools


def dimmed(text: str, stream: TextIO) -> str:
    """Text that a terminal shows dimmed; elsewhere as it is."""
    return f"\033[2m{text}\033[0m" if stream.isatty() else text


def follows() -> bool:
    """Whether this process only does what another one says."""
    cluster = current()
    return cluster is not None and not cluster.is_leader


def run(main: Callable[[], int | None]) -> None:
    """Run a command: bad input is one line on standard error and exit code 2, Ctrl-C exits with 130, SIGTERM with 143.

    Of several processes, the others end with this one.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _signal_again
    own_process = main.__module__ == "__main__"
    code: int | None
    try:
        with _streams_guarded(), _warnings_shown():
            code, reason = _outcome(main)
        finished = not code
    except (KeyboardInterrupt, _Terminated, BrokenPipeError) as end:
        # The reader of standard output that has left has all that it wanted.
        finished, reason = False, ""
        code = 0 if isinstance(end, BrokenPipeError) else _signal_code(end)
    if own_process:
        _answer_signals(_end_at_once)
    if cluster := current():
        cluster.end(code or 0, reason)
    if own_process and not finished:
        # A step may still be computing. XLA's threads that meet the end of the interpreter abort the process, and those
        # that compile would be waited for.
        exit_now(code or 0)
    if own_process:
        # All is done; as the interpreter ends it would leave the signals to the system's default.
        _answer_signals(signal.SIG_IGN)
    sys.exit(code)


_OWN = frozenset({"__main__", "gptoss_jax", "sharding", "tools", "benchmarks"})
"""Packages whose code catches the exception of a signal only where it is done with it."""

_arrived: list[int] = []
"""The signals that have been raised as exceptions."""


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C; sent again where a library drops it."""

    def __del__(self) -> None:
        _send_if_lost(self, signal.SIGINT)


class _Terminated(SystemExit):
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
    raise _Terminated(128 + number)


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
    if not isinstance(lost.exc_value, _Interrupted | _Terminated):
        sys.__unraisablehook__(lost)
        return
    # It is sent from here.
    lost.exc_value.__traceback__ = None
    _send_soon(signal.SIGTERM if isinstance(lost.exc_value, _Terminated) else signal.SIGINT)


def _answer_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _end_at_once(number: int, frame: object) -> None:
    """What a signal does once the command has ended: nothing is left to be undone."""
    os._exit(128 + number)


def _signal_code(error: BaseException) -> int:
    """The exit code of a command that a signal ended, also where a library made its own error of it; else 0."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt | _Terminated):
            return 128 + (signal.SIGTERM if isinstance(cause, _Terminated) else signal.SIGINT)
        cause = cause.__cause__ or cause.__context__
    # An extension module that is being imported, such as jaxlib, drops what was raised and fails.
    return 128 + _arrived[-1] if _arrived and isinstance(error, ImportError) else 0


class _Guarded:
    """A standard stream that may break, because its reader has left or the disk is full.

    What comes then is dropped, silently if the stream is not `needed`; else BrokenPipeError or UsageError is raised.
    """

    def __init__(self, stream: TextIO | None, name: str, needed: bool) -> None:
        # A process that was started without the stream has None in its place: this cannot be written either.
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
            # What is buffered must not raise again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._needed and isinstance(error, BrokenPipeError):
                raise
            if self._needed:
                raise UsageError(f"{self._name}: {error.strerror or error}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


ESCAPED = "gptoss_jax.escaped"
"""How text is encoded of which the encoding lacks characters, lone surrogates among them: as JSON escapes them.

JSON stays valid so, whatever the encoding.
"""


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPED, _escape)


@contextlib.contextmanager
def _streams_guarded() -> Iterator[None]:
    """Progress that cannot be shown does not end a command; an answer that cannot be written does.

    Standard input that is no terminal is UTF-8, as files are.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors=ESCAPED)
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        # Not once it has been read from.
        with contextlib.suppress(OSError):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    out: Any = _Guarded(sys.stdout, "standard output", needed=True)
    err: Any = _Guarded(sys.stderr, "standard error", needed=False)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _Warnings(logging.Handler):
    """Warnings as lines on standard error; of several processes, those of process 0."""

    def emit(self, record: logging.LogRecord) -> None:
        if not follows():
            print(f"warning: {record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show this project's warnings, such as that of an op without a kernel."""
    handler = _Warnings(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("gptoss_jax", "sharding", "pallas_kernels")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


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
        if signalled := _signal_code(error):
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
    except _Terminated:
        raise
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code
    sys.stdout.flush()
    return code
