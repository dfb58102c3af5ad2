"""What the commands share: flags in one spelling, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gptoss_jax.errors import GptOssError, UsageError, named
from sharding.errors import ClusterError, ShardingError
from sharding.processes import current

if TYPE_CHECKING:
    from gptoss_jax.engine.engine import EngineOptions
    from gptoss_jax.serving.client import LLM
    from gptoss_jax.types import SamplingParams, StructuredOutputsParams


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


def add_engine_flags(flags: argparse.ArgumentParser, max_num_seqs: bool = True) -> None:
    """How much runs at once, and what the cache may take."""
    group = flags.add_argument_group("engine")
    if max_num_seqs:
        add_max_num_seqs(group)
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="most tokens of a request, with its output (the model's context)",
    )
    group.add_argument(
        "--kv-cache-memory",
        type=int,
        metavar="BYTES",
        help="of each device (default: 0.85 of what weights leave free)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help="instead: the share of each device's memory that weights and cache take together",
    )
    group.add_argument("--kv-cache-dtype", choices=("bfloat16", "float32", "float8"), help="default: as --dtype")
    group.add_argument(
        "--long-prefill-token-threshold",
        type=int,
        metavar="N",
        help="most prompt tokens of one sequence in a step (default: 2048; on CPUs 512)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="most prompt tokens of all sequences in a step (default: as many)",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse what the cache holds of earlier prompts that begin alike (default: yes)",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help="draft N tokens a step from the text so far, and verify them (default: 0)",
    )
    group.add_argument(
        "--warm-up",
        action="store_true",
        help="compile every step shape at the start, not when it is first needed",
    )


def add_max_num_seqs(flags: argparse._ActionsContainer) -> None:
    """How many sequences run together."""
    flags.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences that run together (default: 8)")


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
    from gptoss_jax.types import SamplingParams

    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
    given = {name: getattr(options, name) for name in names}
    return SamplingParams(max_tokens=options.max_new_tokens, **given, **more)


def structured_outputs(options: argparse.Namespace) -> StructuredOutputsParams | None:
    """The form that a flag asks for, checked. Raises UsageError, naming the flag."""
    from gptoss_jax.text.structured import check
    from gptoss_jax.types import StructuredOutputsParams

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
    from gptoss_jax.commands import multihost

    if (cluster := multihost.join(command, options)) is not None:
        # The others are to end with a process that dies.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return (lambda: multihost.follow(cluster, options)) if cluster and follows() else None


def load_llm(options: argparse.Namespace, **more: Any) -> LLM:
    """The model of the flags; in all processes where there are several."""
    if cluster := current():
        from gptoss_jax.commands import multihost

        return multihost.lead(cluster, options, more)

    from gptoss_jax.checkpoints.loading import EMBEDDED
    from gptoss_jax.serving.client import LLM

    engine = engine_options(options, **more)
    return LLM(options.model or EMBEDDED, options.mesh, options.dtype, engine=engine, warm_up=options.warm_up)


def engine_options(options: argparse.Namespace, **more: Any) -> EngineOptions:
    """The engine flags as EngineOptions; `more` has precedence. Raises UsageError, naming the field."""
    from gptoss_jax.engine.engine import EngineOptions

    names = [field.name for field in dataclasses.fields(EngineOptions)]
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    return dataclasses.replace(EngineOptions(**given), **more)


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
    from gptoss_jax.text.harmony.tools import function_tools

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
    sys.unraisablehook = _signal_again
    with _streams_guarded(), _warnings_shown():
        code, reason = _outcome(main)
    if cluster := current():
        cluster.end(code or 0, reason)
    sys.exit(code)


class _Terminated(SystemExit):
    """SIGTERM unwinds as Ctrl-C does, so that nothing half-written and no process that was started is left behind."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated(128 + number)


def _signal_again(lost: sys.UnraisableHookArgs) -> None:
    """What a signal raises is lost where Python takes no exceptions, as in jax's part of garbage collection."""
    raised = {KeyboardInterrupt: signal.SIGINT, _Terminated: signal.SIGTERM}.get(lost.exc_type)
    if raised is None:
        sys.__unraisablehook__(lost)
    else:
        threading.Timer(0.05, os.kill, (os.getpid(), raised)).start()


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


@contextlib.contextmanager
def _streams_guarded() -> Iterator[None]:
    """Progress that cannot be shown does not end a command; an answer that cannot be written does."""
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
        code = main()
        sys.stdout.flush()
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
        # The reader of standard output has left, with all that it wanted.
        return 0, ""
    except Exception as error:
        if not (cluster := current()):
            raise
        cluster.await_cause()
        traceback.print_exc()
        return 1, f"{'' if follows() else 'process 0: '}{type(error).__name__}: {error}"
    return code, ""
